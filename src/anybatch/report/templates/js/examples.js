/* Section 1: every example of the batch in a table to sort and filter, what cancels, and the
   worked batch of question 1. */

const { data, h, add, unpack, number, percent, cell, bar, table, scroll, why, figure, chart, gallery } = page;
const found = data.examples;
const body = document.querySelector("#examples .body");

const columns = { norms: unpack(found.norms), angles: unpack(found.angles), share: unpack(found.share), factors: unpack(found.factors) };
const terms = found.terms.map((term) => ({ name: term.name, losses: unpack(term.losses), coefficients: unpack(term.coefficients), counts: unpack(term.counts) }));

function nameOf(i) {
  return `example ${found.ids[i]}${found.labels ? `, class ${found.labels[i]}` : ""}`;
}
const picture = gallery(found.pictures, nameOf);
const isWrong = (i) => found.predicted !== null && found.predicted[i] !== found.labels[i];
const isAgainst = (i) => columns.angles !== null && columns.angles[i] > 90;
Object.assign(page, { examples: { ...columns, terms, nameOf, picture, isWrong, size: found.size, ids: found.ids } });

/* The columns of the table: name, value of example i, how it is shown, what it means. */
const heads = [{ name: "example", value: (i) => found.ids[i], show: (x) => String(x), help: "its id in the data" }];
if (found.labels) heads.push({ name: "class", value: (i) => found.labels[i], isText: true, help: "of its target" });
if (found.predicted) heads.push({ name: "predicted", value: (i) => found.predicted[i], isText: true, help: "by the weights before the update" });
for (const term of terms.filter((one) => one.losses)) {
  const of = terms.length > 1 ? ` (${term.name})` : "";
  heads.push({ name: `loss${of}`, value: (i) => term.losses[i], help: "m, its own mean loss" });
  if (term.counts) heads.push({ name: `count${of}`, value: (i) => term.counts[i], help: "n, terms or weight that its loss sums over" });
  heads.push({ name: `coefficient${of}`, value: (i) => term.coefficients[i], help: "c = dR/dv" });
}
if (columns.norms) heads.push({ name: "norm", value: (i) => columns.norms[i], help: "|grad m|" });
if (columns.angles) heads.push({ name: "angle", value: (i) => columns.angles[i], show: (x) => `${number(x, 3)}°`, help: "to the batch gradient; over 90° it goes against" });
if (columns.share) heads.push({ name: "share", value: (i) => columns.share[i], show: percent, hasBar: true, help: "of the update; all add up to 100 %" });

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
  count.textContent = `${kept.length} of ${found.size} examples`;
}

function check(label, key) {
  const box = h("input", { type: "checkbox", onchange: () => { wanted[key] = box.checked; show(); } });
  return h("label", { class: "field check" }, box, h("span", {}, label));
}

const search = h("input", { type: "search", placeholder: "id, class or text", oninput: () => { wanted.text = search.value; show(); } });
const filters = h("div", { class: "controls" },
  h("label", { class: "field" }, h("span", {}, "Find"), search),
  found.predicted ? check("predicted wrongly", "onlyWrong") : null,
  columns.angles ? check("against the update", "onlyAgainst") : null,
  count);
const ledger = table("The examples of this batch", [canCompare && h("th", { scope: "col" }, "compare"), h("th", { scope: "col" }, "picture"), ...buttons].filter(Boolean), [], { class: "ledger" });
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

/* How much cancels. */
function cancels() {
  const { sum, lengths, parameters } = found.cancelled;
  const rows = parameters.map((one) => h("tr", {}, h("th", { scope: "row" }, one.name), cell(one.sum), cell(one.lengths), h("td", { class: "n wide", "data-value": 1 - one.sum / one.lengths }, percent(one.lengths ? 1 - one.sum / one.lengths : null), bar(one.lengths ? 1 - one.sum / one.lengths : 0, "lost"))));
  return h("div", { class: "card" },
    h("h3", {}, "How much cancels"),
    h("p", {}, "The gradient of the batch is ", h("strong", { "data-value": sum, id: "cancel-sum" }, number(sum)), " long; what the examples add to it, each by itself, is ", h("strong", { "data-value": lengths, id: "cancel-lengths" }, number(lengths)), " in all. ", h("strong", { "data-value": 1 - sum / lengths, id: "cancelled" }, percent(1 - sum / lengths)), " of that cancels."),
    h("div", { class: "lengths", "aria-hidden": "true" }, h("div", { class: "of" }, h("span", { style: { width: `${(100 * sum) / lengths}%` } }, "|Σ c g|")), h("div", { class: "all" }, h("span", {}, "Σ |c g|"))),
    rows.length ? scroll("What cancels, by parameter", table("By parameter", ["parameter", "|Σ c g|", "Σ |c g|", "cancels"], rows), "low") : null);
}

/* The worked batch. */
function worked() {
  const one = data.worked;
  const weights = one.before.map((_, k) => h("th", { scope: "col", class: "n" }, `w${k + 1}`));
  const [sum, lengths] = [Math.hypot(...one.mean), (one.norms[0] + one.norms[1]) / 2];
  const still = one.mean.findIndex((x) => Math.abs(x) < 1e-12);
  const row = (name, values, kind = "") => h("tr", { class: kind }, h("th", { scope: "row" }, name), values.map((x) => cell(x + 0)));
  return h("div", { class: "card worked", id: "worked" },
    h("p", { class: "tag" }, "Worked batch, not of this run"),
    h("h3", {}, `Losses ${number(one.losses[0])} and ${number(one.losses[1])}: is the gradient zero too?`),
    h("p", {}, `The mean loss is ${number(Math.abs(one.loss) < 1e-12 ? 0 : one.loss)}. No: gradients are averaged, not losses. Their lengths are ${number(one.norms[0])} and ${number(one.norms[1])}, in the mean ${number(lengths)}; the mean of the gradients is ${number(sum)} long, so ${percent(1 - sum / lengths)} cancels. Weight ${still + 1} stays where it is: ${number(one.gradients[0][still])} and ${number(one.gradients[1][still])}.`),
    scroll("The worked batch", table(`One update by SGD at ${number(one.lr)}`, ["", ...weights], [
      row("gradient of the first", one.gradients[0]), row("gradient of the second", one.gradients[1]),
      row("their mean", one.mean, "total"), row("w before", one.before), row("w after", one.after, "total")])));
}

/* Norm against angle. */
function scatter() {
  const every = Array.from({ length: found.size }, (_, i) => i);
  const groups = found.predicted ? [["predicted rightly", every.filter((i) => !isWrong(i)), "--accent", "circle"], ["predicted wrongly", every.filter(isWrong), "--against", "diamond"]] : [["examples", every, "--accent", "circle"]];
  const numAgainst = every.filter(isAgainst).length;
  return chart({
    title: "How long each gradient is, and where it points",
    summary: `${numAgainst} of ${found.size} gradients are at more than 90 degrees to the batch gradient.`,
    traces: groups.map(([name, places, fill, symbol]) => ({
      type: "scatter", mode: "markers", name, x: places.map((i) => columns.angles[i]), y: places.map((i) => columns.norms[i]), customdata: places,
      text: places.map((i) => `example ${found.ids[i]}`), hovertemplate: "%{text}<br>%{x:.1f}°, norm %{y:.4g}<extra></extra>",
      marker: { color: fill, symbol, size: 7, opacity: 0.75, line: { width: 1, color: "--raised" } },
    })),
    layout: { xaxis: { title: { text: "angle to the batch gradient, degrees" }, range: [0, 182], dtick: 45 }, yaxis: { title: { text: "norm" }, type: "log", exponentformat: "power" }, shapes: [{ type: "line", x0: 90, x1: 90, yref: "paper", y0: 0, y1: 1, line: { color: "--axis", dash: "dot", width: 1 } }], showlegend: groups.length > 1 },
    numbers: () => ({ head: ["example", "angle, degrees", "norm"], rows: every.map((i) => [String(found.ids[i]), columns.angles[i], columns.norms[i]]) }),
    click: (point) => page.tell("pick", { place: point.customdata }),
  });
}

const unknown = (text) => (found.unseen ? null : why(text));
add(body,
  found.unseen ? why(`The ledger tells nothing of single examples here: ${found.unseen}`) : null,
  filters, scroll("The examples of this batch", ledger, "tall"),
  shrunk(found.pictures),
  h("div", { class: "columns" },
    h("div", { class: "stack" }, columns.angles && columns.norms ? scatter() : unknown("Where gradients point is not known: the ledger was not asked for alignments."), worked()),
    found.cancelled ? cancels() : unknown("What cancels is not known: the ledger was not asked for norms and alignments.")),
  h("div", { id: "compare" }));

/* Key figures at the head of the page. */
const { about } = data;
document.getElementById("facts").append(...[
  figure("loss", about.loss, about.reduction),
  data.layers.norms ? figure("|U|, the update gradient", data.layers.norms.update) : figure("|G|, of the data term", found.cancelled?.sum),
  figure("cancels", found.cancelled ? 1 - found.cancelled.sum / found.cancelled.lengths : null, "of what the examples add", percent),
  figure("learning rate", about.lr, about.optimizer),
  figure("|Δw| / |w|", data.layers.norms?.step ? data.layers.norms.step / data.layers.norms.weights : null, "size of the update"),
].filter(Boolean));
const told = [about.model && `model ${about.model}`, about.weights && `${number(about.weights)} weights`, about.data && `data ${about.data}`, about.loss_name && `loss ${about.loss_name}`, ...about.penalty, about.clip, typeof about.recorded_loss === "number" && `loss of this step in the run's records: ${number(about.recorded_loss)}`, about.base !== undefined && (about.base === null ? `weights: the recipe's start, ${about.replayed} updates replayed` : `weights of the checkpoint after ${number(about.base)} updates${about.replayed ? `, ${number(about.replayed)} more replayed` : ""}`)];
document.getElementById("facts").after(h("p", { class: "told" }, told.filter(Boolean).join(" · ")));
