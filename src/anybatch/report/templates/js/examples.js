/* The examples of the batch: a table to sort and filter, where each gradient points, and how much
   of each parameter's gradients cancels. */

const { data, h, add, unpack, number, percent, fraction, counted, cell, bar, table, scroll, why, chart, gallery } = page;
const found = data.examples;
const body = document.querySelector("#examples .body");

const columns = { norms: unpack(found.norms), angles: unpack(found.angles), share: unpack(found.share), factors: unpack(found.factors) };
const terms = found.terms.map((term) => ({ name: term.name, losses: unpack(term.losses), coefficients: unpack(term.coefficients), counts: unpack(term.counts) }));

function nameOf(i) {
  return `example ${found.ids[i]}${found.labels ? `, class ${found.labels[i]}` : ""}`;
}
const isEqual = (values) => values.every((x) => Math.abs(x - values[0]) <= 1e-6 * Math.abs(values[0]));
const picture = gallery(found.pictures, nameOf);
const isWrong = (i) => found.predicted !== null && found.predicted[i] !== found.labels[i];
const isAgainst = (i) => columns.angles !== null && columns.angles[i] > 90;
Object.assign(page, { examples: { ...columns, terms, nameOf, picture, isWrong, size: found.size, ids: found.ids } });

/* The columns of the table: name, value of example i, how it is shown, what it means. */
const heads = [{ name: "example", value: (i) => found.ids[i], show: (x) => String(x), help: "Number of the example in the data" }];
if (found.labels) heads.push({ name: "class", value: (i) => found.labels[i], isText: true, help: "The right answer" });
if (found.predicted) heads.push({ name: "predicted", value: (i) => found.predicted[i], isText: true, help: "The answer of the model before this update" });
for (const term of terms.filter((one) => one.losses)) {
  const of = terms.length > 1 ? ` (${term.name})` : "";
  heads.push({ name: `loss${of}`, value: (i) => term.losses[i], help: "Data loss of this example alone" });
  if (term.counts) heads.push({ name: `count${of}`, value: (i) => term.counts[i], help: "Number of terms in its loss, such as tokens, or its weight" });
  if (!isEqual(term.coefficients)) heads.push({ name: `coefficient${of}`, value: (i) => term.coefficients[i], help: "How much its loss counts in the batch" });
}
if (columns.norms) heads.push({ name: "gradient norm", value: (i) => columns.norms[i], help: "How hard the example pulls" });
if (columns.angles) heads.push({ name: "angle", value: (i) => columns.angles[i], show: page.degrees, help: "Between its gradient and that of the batch; over 90° it pulls against the update" });
if (columns.share) heads.push({ name: "share", value: (i) => columns.share[i], show: percent, hasBar: true, help: "Its part of the update; all add up to 100 %" });

/** What the columns mean, and what is the same for all examples. */
function explained() {
  const equal = terms.filter((one) => one.losses && isEqual(one.coefficients)).map((one) => `${one.counts ? "An example counts in proportion to its count" : `Each example counts ${fraction(one.coefficients[0])} (its coefficient)`}${terms.length > 1 ? ` in ${one.name}` : ""}.`);
  const differ = terms.some((one) => one.losses && !isEqual(one.coefficients));
  const known = [differ && "Coefficient: how much the loss of an example counts in the batch.", columns.norms && "Gradient norm: how hard an example pulls.", columns.angles && "Angle: how far it points from the gradient of the batch; over 90° it pulls against the update.", columns.share && "Share: its part of the update; all shares add up to 100 %, and a negative one slows the update down."];
  return h("p", { class: "note" }, [...equal, ...known].filter(Boolean).join(" "));
}

const wanted = { column: columns.share ? heads.length - 1 : 0, isDown: true, text: "", onlyWrong: false, onlyAgainst: false };
const largest = columns.share ? Math.max(...columns.share.map(Math.abs)) : 1;
const canCompare = !data.pairs.why;
const lines = Array.from({ length: found.size }, (_, i) => line(i));

function line(i) {
  return h("tr", { "data-place": i },
    canCompare && h("td", { class: "pick" }, ["A", "B"].map((side) => h("button", { type: "button", "aria-pressed": "false", "data-side": side, "aria-label": `Compare ${nameOf(i)} as ${side}`, onclick: () => page.tell("pick", { side, place: i }) }, side))),
    h("td", { class: "picture" }, picture(i)),
    heads.map((head) => {
      const x = head.value(i);
      if (head.isText) return h("td", { class: isWrong(i) && head.name === "predicted" ? "wrong" : "" }, x);
      const made = cell(x, head.show);
      if (head.hasBar) made.append(bar(x / largest, "share"));
      return made;
    }));
}

const tbody = h("tbody");
const count = h("p", { class: "count", role: "status" });
const buttons = heads.map((head, at) => h("th", { scope: "col", class: head.isText ? "" : "n" },
  h("button", { type: "button", title: head.help, onclick: () => sortBy(at) }, head.name, h("span", { class: "arrow", "aria-hidden": "true" }))));

function sortBy(at) {
  wanted.isDown = wanted.column === at ? !wanted.isDown : !heads[at].isText && heads[at].name !== "example";
  wanted.column = at;
  show();
}

function show() {
  const { value, isText } = heads[wanted.column];
  const text = wanted.text.trim().toLowerCase();
  const kept = lines.map((_, i) => i).filter((i) => (!wanted.onlyWrong || isWrong(i)) && (!wanted.onlyAgainst || isAgainst(i)) && (text === "" || `${found.ids[i]} ${found.labels?.[i] ?? ""} ${found.predicted?.[i] ?? ""} ${found.pictures?.texts?.[i] ?? ""}`.toLowerCase().includes(text)));
  const order = (i, j) => (isText ? String(value(i)).localeCompare(String(value(j)), "en", { numeric: true }) : (value(i) || 0) - (value(j) || 0));
  kept.sort((i, j) => (wanted.isDown ? -order(i, j) : order(i, j)) || i - j);
  tbody.replaceChildren(...kept.map((i) => lines[i]));
  buttons.forEach((head, at) => {
    const state = at === wanted.column ? (wanted.isDown ? "descending" : "ascending") : null;
    if (state) head.setAttribute("aria-sort", state);
    else head.removeAttribute("aria-sort");
    head.querySelector(".arrow").textContent = state ? (wanted.isDown ? " ↓" : " ↑") : "";
  });
  count.textContent = `${kept.length} of ${counted(found.size, "example")}`;
}

function check(label, key) {
  const box = h("input", { type: "checkbox", onchange: () => { wanted[key] = box.checked; show(); } });
  return h("label", { class: "field check" }, box, h("span", {}, label));
}

const search = h("input", { type: "search", placeholder: "id, class or text", oninput: () => { wanted.text = search.value; show(); } });
const filters = h("div", { class: "controls" },
  h("label", { class: "field" }, h("span", {}, "Find"), search),
  found.predicted ? check("predicted wrong", "onlyWrong") : null,
  columns.angles ? check("pulls against the update", "onlyAgainst") : null,
  count);
const ledger = table("The examples of this batch", [canCompare && h("th", { scope: "col" }, "compare"), h("th", { scope: "col" }, found.pictures?.kind === "texts" ? "input" : "picture"), ...buttons].filter(Boolean), [], { class: "ledger" });
ledger.tBodies[0].replaceWith(tbody);
show();

page.on("picked", ({ A, B }) => lines.forEach((one, i) => {
  one.classList.toggle("picked", i === A || i === B);
  one.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String((button.dataset.side === "A" ? A : B) === i)));
}));

function shrunk(pictures) {
  if (pictures?.kind !== "images") return null;
  const [, height, width] = pictures.pixels.shape;
  const [rows, columns] = pictures.size;
  return height < rows || width < columns ? h("p", { class: "note" }, `Images of ${rows} × ${columns} pixels are shown at ${height} × ${width}.`) : null;
}

/* How much cancels, by parameter. */
function cancels() {
  const { sum, lengths, parameters } = found.cancelled;
  const lost = (one) => (one.lengths ? 1 - one.sum / one.lengths : 0);
  const row = (one, name, kind) => h("tr", { class: kind }, h("th", { scope: "row" }, name), cell(one.lengths), cell(one.sum), h("td", { class: "n wide", "data-value": lost(one) }, percent(lost(one)), bar(lost(one), "lost")));
  return h("div", { class: "card", id: "cancels" },
    h("h3", {}, "How much cancels"),
    h("p", {}, "An example that wants a weight larger and one that wants it smaller cancel. Without that the gradient would be ", h("strong", { "data-value": lengths, id: "cancel-lengths" }, number(lengths)), " long; it is ", h("strong", { "data-value": sum, id: "cancel-sum" }, number(sum)), ". ", h("strong", { "data-value": lost({ sum, lengths }), id: "cancelled" }, percent(lost({ sum, lengths }))), " cancels."),
    parameters.length ? scroll("How much cancels, by parameter", table("Length of the gradient, by parameter", ["parameter", "if all agreed", "as it is", "cancels"], [row({ sum, lengths }, "all weights", "total"), ...parameters.map((one) => row(one, one.name, ""))]), "low") : null);
}

/* Gradient norm against angle. */
function scatter() {
  const every = Array.from({ length: found.size }, (_, i) => i);
  const groups = found.predicted ? [["predicted right", every.filter((i) => !isWrong(i)), "--accent", "circle"], ["predicted wrong", every.filter(isWrong), "--against", "diamond"]] : [["examples", every, "--accent", "circle"]];
  const numAgainst = every.filter(isAgainst).length;
  const known = columns.norms.filter((x) => x > 0);
  const isLog = Math.max(...known) > 20 * Math.min(...known);
  return chart({
    title: "How long each gradient is, and where it points",
    summary: `${numAgainst} of ${found.size} gradients are at more than 90 degrees to the batch gradient.`,
    traces: groups.map(([name, places, fill, symbol]) => ({
      type: "scatter", mode: "markers", name, x: places.map((i) => columns.angles[i]), y: places.map((i) => columns.norms[i]), customdata: places,
      text: places.map((i) => `example ${found.ids[i]}`), hovertemplate: "%{text}<br>%{x:.0f}°, gradient norm %{y:.3g}<extra></extra>",
      marker: { color: fill, symbol, size: 7, opacity: 0.75, line: { width: 1, color: "--raised" } },
    })),
    layout: { xaxis: { title: { text: "angle in degrees (over 90: against)" }, range: [0, 182], dtick: 45 }, height: 400, yaxis: { title: { text: "gradient norm" }, ...(isLog ? { type: "log", tickformat: "~g", dtick: page.logTick(known) } : { rangemode: "tozero" }) }, shapes: [{ type: "line", x0: 90, x1: 90, yref: "paper", y0: 0, y1: 1, line: { color: "--axis", dash: "dot", width: 1 } }], showlegend: groups.length > 1 },
    numbers: () => ({ head: ["example", "angle, degrees", "gradient norm"], rows: every.map((i) => [String(found.ids[i]), columns.angles[i], columns.norms[i]]) }),
    click: (point) => page.tell("pick", { place: point.customdata }),
  });
}

/** The table of examples is empty of gradients where the ledger cannot see them. */
const unknown = (text) => (found.unseen ? null : why(text));
add(body,
  found.unseen ? why(`The gradient of a single example is not known: ${found.unseen}`) : null,
  h("div", { id: "pair" }), filters, scroll("The examples of this batch", ledger, "tall"), explained(),
  shrunk(found.pictures),
  h("div", { class: "columns level" },
    columns.angles && columns.norms ? (found.size > 1 ? scatter() : null) : unknown("where gradients point: the ledger was not asked for alignments (observe.alignment)."),
    found.cancelled ? (found.size > 1 ? cancels() : null) : unknown("what cancels: the ledger was not asked for norms and alignments.")),
  h("div", { id: "compare" }));
