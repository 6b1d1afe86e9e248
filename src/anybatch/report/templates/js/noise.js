/* Section 5: how norms are spread, the noise scale, and what a larger batch would buy. */

const { data, h, add, number, percent, cell, table, scroll, why, chart, examples } = page;
const found = data.noise;
const body = document.querySelector("#noise .body");

function histogram() {
  const norms = Array.from(examples.norms);
  const sorted = [...norms].sort((a, b) => a - b);
  const [low, high] = [sorted[0], sorted.at(-1)];
  const bins = Math.min(30, Math.max(5, Math.round(Math.sqrt(norms.length) * 1.5)));
  const width = (high - low) / bins || 1;
  const counts = new Array(bins).fill(0);
  norms.forEach((x) => { counts[Math.min(bins - 1, Math.floor((x - low) / width))] += 1; });
  const middle = sorted[Math.floor(sorted.length / 2)];
  return chart({
    title: "Norms of the examples' gradients",
    summary: `From ${number(low)} to ${number(high)}; half of them are below ${number(middle)}.`,
    traces: [{ type: "bar", x: counts.map((_, k) => low + (k + 0.5) * width), y: counts, width, marker: { color: "--accent", line: { color: "--raised", width: 1 } }, hovertemplate: "norm %{x:.4g}: %{y} examples<extra></extra>" }],
    layout: { xaxis: { title: { text: "norm" } }, yaxis: { title: { text: "examples" } }, bargap: 0 },
    numbers: () => ({ head: ["norm from", "to", "examples"], rows: counts.map((n, k) => [low + k * width, low + (k + 1) * width, n]) }),
  });
}

function interval({ low, high }) {
  return low === null ? "one batch says nothing about how far it may be off" : `95 % interval ${number(low)} to ${number(high ?? Infinity)}`;
}

function scaleCard() {
  const { scale, size } = found;
  const isKnown = scale.value !== null;
  return h("div", { class: "card" }, h("h3", {}, "Noise scale"),
    h("dl", { class: "facts" }, page.figure("tr(S) / |G|², in examples", isKnown ? scale.value : null, interval(scale)), page.figure("examples in this batch", size)),
    h("p", {}, isKnown ? `At a batch of ${number(scale.value)} examples the noise of the gradient is as long as the gradient itself. This one has ${number(size)}: its gradient is off by some ${percent(Math.sqrt(scale.value / size))} of its length.` : `This batch does not tell |G| from its noise: the noise scale is above ${number(scale.low)} examples, and how far is not known.`));
}

function buys() {
  const which = found.scale.value === null ? "low" : "value";
  const ends = (row, [from, to], key) => (row.low[key] === null && row.high[key] === null ? "" : h("span", { class: "note" }, `${number(row[from][key] ?? (key === "examples" ? 1 : Infinity), 3)} to ${number(row[to][key] ?? Infinity, 3)}`));
  const both = (row, key, order) => h("td", { class: "n", "data-value": row[which][key] }, number(row[which][key]), h("br"), ends(row, order, key));
  const lines = found.buys.map((row) => h("tr", { class: row.size === found.size ? "total" : "" }, h("th", { scope: "row" }, number(row.size)), cell(row[which].off, percent), both(row, "steps", ["low", "high"]), both(row, "examples", ["high", "low"])));
  return h("div", { class: "card" }, h("h3", {}, "What a larger batch would buy"),
    h("p", { class: "note" }, `Predicted from the noise scale${which === "low" ? ", of which only the lower end is known" : ""}: steps and examples to a given loss, as multiples of the fewest that any batch size needs (McCandlish et al. 2018). Measure before you rely on it.`),
    scroll("What a larger batch would buy", table("Batch sizes", ["batch", "gradient is off by", "steps ×, 95 %", "examples ×, 95 %"], lines)));
}

function overTraining() {
  const rows = found.over_training;
  if (!rows.length) return why(found.why_not_over_training);
  const x = rows.map((row) => (row.first + row.last) / 2);
  const known = rows.filter((row) => row.high !== null && row.low !== null);
  const isOpen = (row) => row.value === null && row.low > 0; // |G| is not told from its noise
  return [chart({
    title: "Noise scale over training",
    summary: `${rows.length} estimates, from ${number(rows[0].value)} to ${number(rows.at(-1).value)} examples.`,
    traces: [{
      type: "scatter", mode: rows.length > 1 ? "lines+markers" : "markers", x, y: rows.map((row) => row.value), name: "noise scale", line: { color: "--accent" }, marker: { size: 6 },
      error_y: { type: "data", symmetric: false, array: rows.map((row) => (row.high ?? row.value) - row.value), arrayminus: rows.map((row) => row.value - (row.low ?? row.value)), color: "--third", thickness: 1 },
      hovertemplate: "step %{x}: %{y:.4g} examples<extra></extra>",
    }, {
      type: "scatter", mode: "markers", name: "at least", x: x.filter((_, k) => isOpen(rows[k])), y: rows.filter(isOpen).map((row) => row.low), marker: { symbol: "triangle-up-open", size: 9, color: "--third", line: { width: 1.5 } },
      hovertemplate: "step %{x}: above %{y:.4g} examples<extra></extra>",
    }],
    layout: { showlegend: rows.some(isOpen), xaxis: { title: { text: "step" } }, yaxis: { title: { text: "examples" }, type: "log", exponentformat: "power" } },
    numbers: () => ({ head: ["steps", "noise scale", "low", "high", "examples"], rows: rows.map((row) => [row.first === row.last ? `${row.first}` : `${row.first} to ${row.last}`, row.value, row.low, row.high, row.examples]) }),
  }), found.why_not_over_training ? h("p", { class: "note" }, `${found.why_not_over_training[0].toUpperCase()}${found.why_not_over_training.slice(1)}`) : h("p", { class: "note" }, `From the run's ledger: each point adds up the estimates of some updates, with its 95 % interval where it is bounded (${known.length} of ${rows.length}).`)];
}

add(body,
  h("div", { class: "columns" }, examples.norms ? histogram() : null, found.why ? why(`No noise scale: ${found.why}`) : scaleCard()),
  found.why ? null : h("div", { class: "columns" }, buys(), h("div", { class: "stack" }, overTraining())));
