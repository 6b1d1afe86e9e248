/* What all sections share: the figures, elements, numbers, and who listens to whom.
   Text from data only ever becomes text nodes and attributes: nothing is parsed as HTML. */

const data = JSON.parse(document.getElementById("data").textContent);

const TYPES = { f8: Float64Array, f4: Float32Array, u1: Uint8Array, u2: Uint16Array, i4: Int32Array };

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** IEEE half precision. */
function halves(words) {
  const found = new Float32Array(words.length);
  for (let i = 0; i < words.length; i += 1) {
    const sign = words[i] & 0x8000 ? -1 : 1;
    const exponent = (words[i] >> 10) & 31;
    const fraction = words[i] & 1023;
    if (exponent === 31) found[i] = fraction ? NaN : sign * Infinity;
    else if (exponent === 0) found[i] = sign * fraction * 2 ** -24;
    else found[i] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return found;
}

/** A packed array as a typed one, with its shape. */
function unpack(packed) {
  if (packed === null || packed === undefined) return null;
  const buffer = bytesOf(packed.data).buffer;
  const values = packed.dtype === "f2" ? halves(new Uint16Array(buffer)) : new TYPES[packed.dtype](buffer);
  values.shape = packed.shape;
  return values;
}

/** An element; children are elements or text. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([key, to]) => element.style.setProperty(key, to));
    else element.setAttribute(name, value === true ? "" : value);
  }
  return add(element, ...children);
}

/** Append what is there. */
function add(parent, ...children) {
  parent.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  return parent;
}

/** An element of a picture. */
function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return add(element, ...children);
}

/** Three significant digits; whole numbers as they are. */
function number(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  if (x === 0) return "0"; // and not −0
  const size = Math.abs(x);
  if (size < 1e-4 || size >= 1e12) {
    const [mantissa, power] = x.toExponential(digits - 1).split("e");
    const raised = power.replace("+", "").replace(/[-\d]/g, (c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻");
    return `${Number(mantissa)} × 10${raised}`.replaceAll("-", "−");
  }
  const rounded = Number.isInteger(x) || size >= 10 ** digits ? Math.round(x) : Number(x.toPrecision(digits));
  return rounded.toLocaleString("en", { maximumFractionDigits: 8 }).replaceAll("-", "−");
}

/** Two significant digits, for what is known no better than that. */
function rough(x) {
  if (!Number.isFinite(x) || x === 0) return number(x);
  const size = Math.abs(x) >= 1 ? Number(x.toPrecision(2)) : Number(x.toPrecision(1));
  return number(size);
}

/** Per cent as one says it: 83 %, 1.2 %, 0.3 %. */
function percent(x) {
  if (x === null || x === undefined || !Number.isFinite(x)) return "–";
  const size = Math.abs(100 * x);
  const sign = x < 0 ? "−" : "";
  if (size === 0) return "0\u00a0%";
  if (size < 1e-4) return x < 0 ? "about 0\u00a0%" : "less than 0.0001\u00a0%";
  if (size > 99 && size < 100) return `${sign}${Math.floor(10 * size) / 10}\u00a0%`;
  return `${sign}${number(Number(size.toPrecision(size >= 100 ? 3 : size < 0.01 ? 1 : 2)))}\u00a0%`;
}

function degrees(x) {
  return Number.isFinite(x) ? `${number(x)}°` : "–";
}

/** 1/64 where that is what it is. */
function fraction(x) {
  const below = Math.round(1 / x);
  return x > 0 && below > 1 && Math.abs(x * below - 1) < 1e-5 ? `1/${number(below)}` : number(x);
}

/** "1 example", "64 examples". */
function counted(n, noun) {
  return `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
}

/** A cell with a number: to be read, and with all its digits. */
function cell(x, show = number) {
  const value = x === null || x === undefined ? "" : x;
  return h("td", { class: "n", "data-value": value }, show(x));
}

/** A length in per cent of a cell's width, signed ones from its middle. */
function bar(share, kind = "") {
  const width = `${Math.min(100, Math.abs(share) * 100)}%`;
  return h("span", { class: `bar ${kind} ${share < 0 ? "negative" : ""}`, "aria-hidden": "true" }, h("span", { style: { width } }));
}

/** Text in which what follows a low line is set lower: g_i. */
function math(text) {
  return text.split(/_(\w)/).map((part, i) => (i % 2 ? h("sub", {}, part) : part));
}

/** A table; heads stand to the right above numbers. */
function table(caption, head, rows, attributes = {}) {
  const isNumber = (k) => rows.length > 0 && rows[0].children[k]?.classList.contains("n");
  return h("table", attributes,
    h("caption", {}, h("span", {}, caption)),
    h("thead", {}, h("tr", {}, head.map((one, k) => (one instanceof Node ? one : h("th", { scope: "col", class: isNumber(k) ? "n" : null }, math(one)))))),
    h("tbody", {}, rows));
}

/** A table that scrolls in itself, never the page. */
function scroll(label, content, kind = "") {
  return h("div", { class: `scroll ${kind}`, tabindex: "0", role: "region", "aria-label": label }, content);
}

/** What is made when it is opened. */
function opening(summary, content) {
  const details = h("details", {}, h("summary", {}, summary));
  details.addEventListener("toggle", () => details.append(content()), { once: true });
  return details;
}

/** In place of a chart or a number that cannot be had, and the reason. */
function why(reason) {
  return h("p", { class: "why" }, h("strong", {}, "Not measurable here. "), reason[0].toUpperCase() + reason.slice(1));
}

function figure(name, value, note = null, show = number) {
  return h("div", { class: "figure" },
    h("dt", {}, math(name)),
    h("dd", {}, h("span", { class: "value", "data-value": value ?? "" }, show(value)), note ? h("span", { class: "note" }, note) : null));
}

/** A choice among names; `change` gets its place. */
function select(label, names, change, chosen = 0) {
  const list = h("select", { onchange: () => change(Number(list.value)) },
    names.map((name, i) => h("option", { value: i, selected: i === chosen }, name)));
  return h("label", { class: "field" }, h("span", {}, label), list);
}

const listeners = {};
const sections = {};

globalThis.page = {
  data, unpack, h, svg, add, number, rough, percent, degrees, fraction, counted, cell, bar, math, table, scroll, opening, why, figure, select, sections,
  on(event, listener) { (listeners[event] ??= []).push(listener); },
  tell(event, value) { (listeners[event] ?? []).forEach((listener) => listener(value)); },
};
