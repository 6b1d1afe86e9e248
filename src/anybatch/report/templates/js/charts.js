/* Charts with axes, drawn by Plotly once they come into view, each with a table of its numbers. */

const { h, table, cell, scroll } = page;
const ROWS = 200; // of a table beside a curve, at most
const drawn = new Set();
let ready = null;

/** Start Plotly's script: it is in the page, compressed, and its hash is in the policy. */
async function load() {
  const holder = document.getElementById("plotly");
  const bytes = Uint8Array.from(atob(holder.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  holder.remove();
  document.head.append(script);
  if (!globalThis.Plotly) throw new Error("Plotly did not start");
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Whatever says "--name" becomes that colour of the theme. */
function themed(value) {
  if (typeof value === "string") return value.startsWith("--") ? colour(value.slice(2)) : value;
  if (Array.isArray(value)) return value.map(themed);
  if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
  }
  return value;
}

/** Text from data as it stands: Plotly takes tags and entities in text for markup. */
function literal(text) {
  if (Array.isArray(text)) return text.map(literal);
  return typeof text === "string" ? text.replaceAll("&", "&amp;").replaceAll("<", "&lt;") : text;
}

function tracesOf(chart) {
  return themed(chart.traces).map((one) => ({ ...one, name: literal(one.name), text: literal(one.text) }));
}

function layoutOf(chart) {
  const axis = { gridcolor: "--line", zerolinecolor: "--axis", linecolor: "--axis", automargin: true, exponentformat: "none", title: { font: { size: 12 } } };
  const { xaxis = {}, yaxis = {}, ...others } = chart.layout;
  return themed({
    height: 280,
    margin: { l: 8, r: 12, t: 8, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: "--text" },
    colorway: ["--accent", "--against", "--third", "--fourth"],
    hoverlabel: { bgcolor: "--raised", bordercolor: "--axis", font: { color: "--text" } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...others,
  });
}

async function draw(chart) {
  try {
    await (ready ??= load());
  } catch (error) {
    chart.plot.textContent = "This browser cannot draw the chart; its numbers are below.";
    return;
  }
  await Plotly.react(chart.plot, tracesOf(chart), layoutOf(chart), { displayModeBar: false, responsive: true });
  chart.plot.classList.add("drawn");
  if (chart.click && !chart.listens) {
    chart.plot.on("plotly_click", (event) => chart.click(event.points[0]));
    chart.listens = true;
  }
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const chart = entry.target.chart;
    if (entry.isIntersecting && !drawn.has(chart)) {
      drawn.add(chart);
      draw(chart);
    }
  }
}, { rootMargin: "300px" });

function numbersOf(chart) {
  const { head, rows } = chart.numbers();
  const step = Math.ceil(rows.length / ROWS);
  const some = rows.filter((_, i) => i % step === 0);
  const caption = step > 1 ? `${chart.title}, one row in ${step} of ${rows.length}` : chart.title;
  return scroll(chart.title, table(caption, head, some.map((row) => h("tr", {}, row.map((x) => (typeof x === "number" || x === null ? cell(x) : h("td", {}, x)))))), "low");
}

/**
 * A chart in a figure.
 * title, summary: what it is, and what it shows, in words; traces, layout: Plotly's, with colours
 * as "--name"; numbers: () => {head, rows}, its table; note: a sentence below; click: of a point.
 */
function chart(given) {
  const plot = h("div", { class: "plot", role: "img", "aria-label": `${given.title}. ${given.summary}` });
  const one = { layout: {}, ...given, plot };
  const details = page.opening("Table of this chart", () => numbersOf(one));
  plot.chart = one;
  seen.observe(plot);
  return h("figure", { class: "chart" }, h("figcaption", {}, given.title), plot, given.note ? h("p", { class: "note" }, given.note) : null, details);
}

page.on("theme", () => drawn.forEach((one) => (one.plot.isConnected ? draw(one) : drawn.delete(one))));
const { epoch_steps: epochSteps } = page.data.about;
const stepAxis = epochSteps ? `step (an epoch has ${page.counted(epochSteps, "step")})` : "step";
/** Steps of a logarithmic axis: 1, 2, 5, 10 over a short range, powers of ten over a long one. */
function logTick(values) {
  const sizes = Array.from(values).filter((x) => x > 0);
  return Math.max(...sizes) > 300 * Math.min(...sizes) ? 1 : "D2";
}

Object.assign(page, { chart, logTick, colour, literal, stepAxis });
