/* The parts of the loss, the update by parameter, and a picture of each. */

const { data, h, add, unpack, number, percent, cell, bar, table, scroll, why, select, framed } = page;
const found = data.layers;
const body = document.querySelector("#layers .body");
const QUANTITIES = [["relative", "Change against the weights, in per cent", percent], ["step", "Length of the change", number], ["update", "Gradient U, for the optimiser", number], ["data", "Gradient G of the data loss", number], ["penalty", "Gradient of the penalty", number], ["weight", "Length of the weights", number]];

function parts() {
  const rows = found.parts.map((part) => h("tr", {}, h("th", { scope: "row" }, part.name), h("td", {}, part.is_penalty ? "penalty" : "data loss"), h("td", { class: "n wide", "data-value": part.value }, number(part.value), bar(found.loss ? part.value / found.loss : 0, "share"))));
  rows.push(h("tr", { class: "total" }, h("th", { scope: "row" }, "total loss"), h("td", {}, "all parts"), cell(found.loss)));
  const metrics = Object.entries(found.metrics).map(([name, value]) => `${name} ${name === "accuracy" ? percent(value) : number(value)}`);
  return h("div", { class: "card" }, h("h3", {}, "Parts of the loss"), scroll("Parts of the loss", table("What is minimised, by name", ["part", "kind", "value"], rows), "low"), metrics.length ? h("p", { class: "note" }, `On this batch, before the update: ${metrics.join(", ")}.`) : null);
}

function norms() {
  const { norms } = found;
  const hasPenalty = norms.penalty > 0;
  return h("div", { class: "card" }, h("h3", {}, "Over all weights"), h("dl", { class: "facts" },
    page.figure("gradient of the data loss", norms.data, "length of G"), hasPenalty ? page.figure("gradient of the penalty", norms.penalty, "length of ∇Ω") : null, page.figure("for the optimiser", norms.update, "length of U"), page.figure("weights", norms.weights, "length of w"), norms.step === null ? null : page.figure("change of the weights", norms.step, "length of Δw"), norms.step === null ? null : page.figure("weights moved by", norms.weights ? norms.step / norms.weights : null, "Δw against w", percent)));
}

function heat() {
  const layers = [...new Set(found.rows.map((row) => row.layer))];
  const kinds = [...new Set(found.rows.map((row) => row.kind))];
  const quantities = QUANTITIES.filter(([key]) => found.rows.some((row) => row[key] !== undefined && row[key] !== null));
  const holder = h("div");
  const detail = h("div", { class: "detail", "aria-live": "polite" });
  const facts = h("div", { class: "detail" });
  let chosen = found.rows.reduce((best, row) => ((row.step ?? row.update) > (best.step ?? best.update) ? row : best));

  function show(at) {
    const [key, title, shown] = quantities[at];
    const most = Math.max(...found.rows.map((row) => row[key] ?? 0)) || 1;
    const square = (layer, kind) => {
      const row = found.rows.find((one) => one.layer === layer && one.kind === kind);
      if (!row) return h("td", { class: "none" }, h("span", { class: "hidden" }, "none"));
      const share = Math.sqrt((row[key] ?? 0) / most);
      return h("td", { class: "heat n", "data-value": row[key] },
        h("button", { type: "button", "aria-pressed": String(row === chosen), style: { "--heat": `${Math.round(40 * share)}%` }, "aria-label": `${row.name}: ${shown(row[key])}. Show where in it.`, onclick: () => { chosen = row; show(at); picture(); } }, shown(row[key])));
    };
    holder.replaceChildren(scroll(title, table(title, ["layer", ...kinds.map((kind) => kind)], layers.map((layer) => h("tr", {}, h("th", { scope: "row" }, layer, " ", h("span", { class: "note" }, found.rows.find((one) => one.layer === layer).module)), kinds.map((kind) => square(layer, kind)))), { class: "heatmap" })));
  }

  function picture() {
    const pictures = [[chosen.picture, "Gradient U, for the optimiser"], [chosen.step_picture, "Change of the weights"]].filter(([one]) => one);
    detail.replaceChildren();
    add(detail, h("h4", {}, `${chosen.name}, ${chosen.shape.join(" × ")}`), h("div", { class: "maps" }, pictures.map(([one, title]) => {
      const values = unpack(one.values);
      const [rows, columns] = values.shape.slice(-2);
      const cut = Math.max(...one.blocks) > 1 ? `, root mean square over blocks of ${one.blocks.join(" × ")}` : ", absolute values";
      const largest = values.reduce((a, b) => Math.max(a, b), 0);
      return framed(title, { label: `${title} of ${chosen.name}${cut}; the largest is ${number(largest)}`, values, rows, columns, size: 260 }, `0 to ${number(largest)}${cut}`);
    })));
    facts.replaceChildren(h("dl", { class: "facts" }, page.figure("weights", chosen.elements), page.figure("their length", chosen.weight), page.figure("gradient U", chosen.update, "its length"), chosen.step === undefined ? null : page.figure("change", chosen.step, "its length")));
  }

  show(0);
  picture();
  return h("div", { class: "card" }, h("h3", {}, "By layer and parameter"), select("Show", quantities.map(([, title]) => title), show), h("div", { class: "columns" }, h("div", { class: "stack" }, holder, facts), detail));
}

add(body, found.why ? [parts(), why(found.why)] : [h("div", { class: "columns level" }, parts(), norms()), heat()]);
