/* Noise: how gradient norms are spread, the noise scale, and what a larger batch would buy. */

const { data, h, add, number, rough, percent, counted, cell, table, scroll, why, chart, examples } = page;
const found = data.noise;
const body = document.querySelector("#noise .body");
const FEWEST = 8; // examples of a histogram
const FEWEST_POINTS = 3; // of a curve

/** Norms on a logarithmic axis where the longest are far above the others, else on a plain one. */
function histogram() {
  const norms = Array.from(examples.norms).filter((x) => x > 0);
  const sorted = [...norms].sort((a, b) => a - b);
  const [low, high, middle] = [sorted[0], sorted.at(-1), sorted[Math.floor(sorted.length / 2)]];
  if (!norms.length) return why("all gradients are 0.");
  if (norms.length < FEWEST) return why(`a spread of ${counted(norms.length, "gradient norm")} is no spread: ${FEWEST} or more make a histogram.`);
  if (high / low < 1.001) return why(`all gradient norms are the same, ${number(low)}.`);
  const isLog = high > 10 * middle;
  const [to, from] = isLog ? [Math.log10, (x) => 10 ** x] : [(x) => x, (x) => x];
  const bins = Math.min(24, Math.max(5, Math.round(Math.sqrt(norms.length) * 1.5)));
  const width = (to(high) - to(low)) / bins;
  const counts = new Array(bins).fill(0);
  norms.forEach((x) => { counts[Math.min(bins - 1, Math.floor((to(x) - to(low)) / width))] += 1; });
  const edges = Array.from({ length: bins + 1 }, (_, k) => from(to(low) + k * width));
  const powers = Array.from({ length: 40 }, (_, k) => k - 20);
  return chart({
    title: "How hard the examples pull",
    summary: `Gradient norms go from ${number(low)} to ${number(high)}; half of the examples are below ${number(middle)}.`,
    traces: [{ type: "bar", x: counts.map((_, k) => to(low) + (k + 0.5) * width), y: counts, width, text: counts.map((n, k) => `gradient norm ${number(edges[k])} to ${number(edges[k + 1])}: ${counted(n, "example")}`), textposition: "none", marker: { color: "--accent", line: { color: "--raised", width: 1 } }, hovertemplate: "%{text}<extra></extra>" }],
    layout: { height: 230, xaxis: { title: { text: "gradient norm of an example" }, ...(isLog ? { tickvals: powers, ticktext: powers.map((k) => number(10 ** k)) } : {}) }, yaxis: { title: { text: "examples" } }, bargap: 0 },
    numbers: () => ({ head: ["gradient norm from", "to", "examples"], rows: counts.map((n, k) => [edges[k], edges[k + 1], n]) }),
  });
}

/** "27 to 1,400", "more than 27". */
function interval({ low, high }) {
  if (low === null) return null;
  return high === null ? `more than ${rough(low)}` : `${rough(low)} to ${rough(high)}`;
}

function scaleCard() {
  const { scale, size } = found;
  if (scale.value === null) {
    const least = scale.low > 1 ? ` The noise scale is above about ${counted(Math.round(Number(scale.low.toPrecision(2))), "example")}.` : "";
    return h("div", { class: "card" }, h("h3", {}, "Noise scale"), why(`from these ${counted(size, "example")} alone, the gradient cannot be told from its noise.${least}`),
      h("p", {}, "The noise scale is the batch size at which the noise of the gradient is as long as the gradient itself. A larger batch, or the mean over many steps, would show it."));
  }
  if (scale.value < 0.01) return h("div", { class: "card" }, h("h3", {}, "Noise scale"), h("p", {}, "About 0: the examples have the same gradient, so there is no noise."));
  const range = interval(scale);
  return h("div", { class: "card" }, h("h3", {}, "Noise scale"),
    h("p", { class: "said" }, "About ", h("strong", { "data-value": scale.value, id: "noise-scale" }, counted(Number(scale.value.toPrecision(2)), "example")), range ? ` (${range})` : "", "."),
    h("p", {}, `In a batch of this size, the noise of the gradient is as long as the gradient itself. This batch has ${number(size)}: its gradient is off by about ${percent(Number(Math.sqrt(scale.value / size).toPrecision(2)))} of its length.`),
    h("p", { class: "note" }, `tr(S) / |G|², with S the covariance of the examples' gradients. ${range ? "In brackets: its 95 % interval." : "One batch does not tell how far this may be off."}`));
}

function buys() {
  if (found.scale.value === null || found.scale.value < 0.01) return null;
  const ends = ({ low, high }, [from, to], key) => (low[key] === null || high[key] === null ? "" : h("span", { class: "note" }, `${rough([low, high][from][key])} to ${rough([low, high][to][key])}`));
  const both = (row, key, order) => h("td", { class: "n", "data-value": row.value[key] }, rough(row.value[key]), h("br"), ends(row, order, key));
  const inEpoch = page.data.about.epoch_steps ? page.data.about.epoch_steps * found.size : Infinity;
  const lines = found.buys.filter((row) => row.size <= Math.max(inEpoch, found.size)).map((row) => h("tr", { class: row.size === found.size ? "total" : "" }, h("th", { scope: "row" }, number(row.size), row.size === found.size ? [" ", h("span", { class: "tag" }, "this batch")] : null), cell(row.value.off, (x) => percent(Number(x.toPrecision(2)))), both(row, "steps", [0, 1]), both(row, "examples", [1, 0])));
  return h("div", { class: "card" }, h("h3", {}, "What another batch size would cost"),
    h("p", { class: "note" }, "Predicted from the noise scale: steps and examples to the same loss, as multiples of the fewest that any batch size needs (McCandlish et al. 2018). Small numbers: 95 % interval. Try it before you rely on it."),
    scroll("What another batch size would cost", table("Batch sizes", ["batch", "gradient is off by", "times the steps", "times the examples"], lines)));
}

/** How to get a curve of the noise scale. */
function advice() {
  return found.why_not_over_training ? sentence(found.why_not_over_training) : "Train longer, or with larger batches.";
}

function overTraining() {
  if (!data.run) return null;
  const rows = found.over_training;
  const told = rows.filter((row) => row.value !== null || row.low > 0);
  if (told.length < FEWEST_POINTS) return why(`the noise scale over training. A curve needs ${FEWEST_POINTS} steps with a noise scale, and this run has ${told.length}. ${advice()}`);
  const x = rows.map((row) => (row.first + row.last) / 2);
  const ends = told.map((row) => row.value ?? row.low);
  const known = rows.filter((row) => row.high !== null && row.low !== null);
  const isOpen = (row) => row.value === null && row.low > 0; // |G| is not told from its noise
  return [chart({
    title: "Noise scale over training",
    summary: `${rows.length} estimates, from ${rough(rows[0].value)} to ${rough(rows.at(-1).value)} examples.`,
    traces: [{
      type: "scatter", mode: rows.length > 1 ? "lines+markers" : "markers", x, y: rows.map((row) => row.value), name: "noise scale", line: { color: "--accent" }, marker: { size: 6 },
      error_y: { type: "data", symmetric: false, array: rows.map((row) => (row.high ?? row.value) - row.value), arrayminus: rows.map((row) => row.value - (row.low ?? row.value)), color: "--third", thickness: 1 },
      hovertemplate: "step %{x}: about %{y:.2g} examples<extra></extra>",
    }, {
      type: "scatter", mode: "markers", name: "at least", x: x.filter((_, k) => isOpen(rows[k])), y: rows.filter(isOpen).map((row) => row.low), marker: { symbol: "triangle-up-open", size: 9, color: "--third", line: { width: 1.5 } },
      hovertemplate: "step %{x}: above %{y:.2g} examples<extra></extra>",
    }],
    layout: { height: found.scale.value === null ? 280 : 390, showlegend: rows.some(isOpen), xaxis: { title: { text: page.stepAxis } }, yaxis: { title: { text: "examples" }, type: "log", tickformat: "~g", dtick: page.logTick(ends) } },
    numbers: () => ({ head: ["steps", "noise scale", "low", "high", "examples"], rows: rows.map((row) => [row.first === row.last ? `${row.first}` : `${row.first} to ${row.last}`, row.value, row.low, row.high, row.examples]) }),
    note: found.why_not_over_training ? sentence(found.why_not_over_training) : `From the run's ledger. Each point joins the estimates of some steps; bars are 95 % intervals, where they have ends (${known.length} of ${rows.length}).`,
  })];
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}`;
}

add(body,
  h("div", { class: "columns level" }, examples.norms ? histogram() : null, found.why ? why(found.why) : scaleCard()),
  found.why ? null : lower());

/** The two lower cards: side by side if both are tall. */
function lower() {
  const [card, over] = [buys(), overTraining()];
  const areTall = card !== null && Array.isArray(over);
  return areTall ? h("div", { class: "columns level" }, card, over) : [card, over];
}
