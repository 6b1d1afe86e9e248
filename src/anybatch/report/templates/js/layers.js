/* Section 3: the parts of the loss, the update by parameter, and a picture of each. */

const { data, h, add, unpack, number, percent, cell, bar, table, scroll, why, select, framed } = page;
const found = data.layers;
const body = document.querySelector("#layers .body");
const QUANTITIES = [["step", "|Δw|, size of the update"], ["relative", "|Δw| / |w|, against the weight"], ["update", "|U|, what the optimiser gets"], ["data", "|G|, of the data term"], ["penalty", "|∇Ω|, of the penalty"], ["weight", "|w|"]];

function parts() {
  const rows = found.parts.map((part) => h("tr", {}, h("th", { scope: "row" }, part.name), h("td", {}, part.is_penalty ? "penalty" : "data"), h("td", { class: "n wide", "data-value": part.value }, number(part.value), bar(part.value / found.loss, "share")), cell(part.value / found.loss, percent)));
  rows.push(h("tr", { class: "total" }, h("th", { scope: "row" }, "loss"), h("td", {}, "R + Ω"), cell(found.loss), cell(1, percent)));
  const metrics = Object.entries(found.metrics).map(([name, value]) => `${name} ${number(value)}`);
  return h("div", { class: "card" }, h("h3", {}, "Parts of the loss"), scroll("Parts of the loss", table("By name", ["part", "kind", "value", "of the loss"], rows), "low"), metrics.length ? h("p", { class: "note" }, `Metrics of the batch: ${metrics.join(", ")}.`) : null);
}

function norms() {
  const { norms } = found;
  return h("div", { class: "card" }, h("h3", {}, "In all"), h("dl", { class: "facts" },
    page.figure("|G|, data term", norms.data), page.figure("|∇Ω|, penalty", norms.penalty), page.figure("|U|, to the optimiser", norms.update), page.figure("|w|", norms.weights), page.figure("|Δw|", norms.step), page.figure("|Δw| / |w|", norms.step === null ? null : norms.step / norms.weights)));
}

function heat() {
  const layers = [...new Set(found.rows.map((row) => row.layer))];
  const kinds = [...new Set(found.rows.map((row) => row.kind))];
  const quantities = QUANTITIES.filter(([key]) => found.rows.some((row) => row[key] !== undefined && row[key] !== null));
  const holder = h("div");
  const detail = h("div", { class: "detail", "aria-live": "polite" });
  let chosen = found.rows.reduce((best, row) => ((row.step ?? row.update) > (best.step ?? best.update) ? row : best));

  function show(at) {
    const [key, title] = quantities[at];
    const most = Math.max(...found.rows.map((row) => row[key] ?? 0)) || 1;
    const square = (layer, kind) => {
      const row = found.rows.find((one) => one.layer === layer && one.kind === kind);
      if (!row) return h("td", { class: "none" }, h("span", { class: "hidden" }, "none"));
      const share = Math.sqrt((row[key] ?? 0) / most);
      return h("td", { class: "heat n", "data-value": row[key] },
        h("button", { type: "button", "aria-pressed": String(row === chosen), style: { "--heat": `${Math.round(40 * share)}%` }, "aria-label": `${row.name}: ${number(row[key])}. Show where in it.`, onclick: () => { chosen = row; show(at); picture(); } }, number(row[key], 3)));
    };
    holder.replaceChildren(scroll(title, table(title, ["layer", ...kinds.map((kind) => kind)], layers.map((layer) => h("tr", {}, h("th", { scope: "row" }, layer, " ", h("span", { class: "note" }, found.rows.find((one) => one.layer === layer).module)), kinds.map((kind) => square(layer, kind)))), { class: "heatmap" })));
  }

  function picture() {
    const pictures = [[chosen.picture, "U, what the optimiser gets"], [chosen.step_picture, "Δw, the update"]].filter(([one]) => one);
    detail.replaceChildren();
    add(detail, h("h4", {}, `${chosen.name}, ${chosen.shape.join(" × ")}`), h("div", { class: "maps" }, pictures.map(([one, title]) => {
      const values = unpack(one.values);
      const [rows, columns] = values.shape.slice(-2);
      const cut = Math.max(...one.blocks) > 1 ? `, root mean square over blocks of ${one.blocks.join(" × ")}` : ", absolute values";
      const largest = values.reduce((a, b) => Math.max(a, b), 0);
      return framed(title, { label: `${title} of ${chosen.name}${cut}; the largest is ${number(largest)}`, values, rows, columns, size: 260 }, `0 to ${number(largest)}${cut}`);
    })), h("dl", { class: "facts" }, page.figure("|w|", chosen.weight), page.figure("|U|", chosen.update), chosen.step === undefined ? null : page.figure("|Δw|", chosen.step), page.figure("weights", chosen.elements)));
  }

  show(0);
  picture();
  return h("div", { class: "card" }, h("h3", {}, "By layer and parameter"), select("Show", quantities.map(([, title]) => title), show), h("div", { class: "columns" }, holder, detail));
}

add(body, found.why ? [parts(), why(found.why)] : [h("div", { class: "columns" }, parts(), norms()), heat()]);
