/* Section 2: the same batch under every reduction, and Sum and Mean carried over. */

const { data, h, add, unpack, number, percent, cell, bar, table, scroll, why, chart, examples } = page;
const found = data.reductions;
const body = document.querySelector("#reductions .body");

if (found.why) {
  add(body, why(found.why));
} else {
  const rows = found.rows.map((row) => ({ ...row, weight: unpack(row.weight) }));
  const known = rows.some((row) => row.norm !== undefined);
  const head = ["reduction", "R", "value", "examples used", ...(known ? ["|G|", "times that of Mean", "angle to Mean"] : [])];
  const most = Math.max(...rows.map((row) => Math.log1p(row.norm ?? 0)));
  const line = (row) => h("tr", { class: row.name === found.own ? "total" : "" },
    h("th", { scope: "row" }, row.name, row.name === found.own ? h("span", { class: "tag" }, "this run") : null),
    h("td", {}, row.formula), cell(row.value), cell(row.used),
    known ? [h("td", { class: "n wide", "data-value": row.norm }, number(row.norm), bar(Math.log1p(row.norm) / (most || 1), "share")), cell(row.ratio), cell(row.angle, (x) => `${number(x, 3)}°`)] : null);

  const losses = examples.terms[0].losses;
  const order = Array.from(losses.keys()).sort((i, j) => losses[i] - losses[j]);
  const styles = ["--accent", "--fourth", "--against", "--third", "--against", "--accent"];
  const curve = chart({
    title: "What weight each example gets, by its loss",
    summary: "Mean and Sum weigh all alike; Max takes the largest alone; TopFraction the larger half; Tilted grows with the loss.",
    traces: rows.filter((row) => row.name !== "Sum").map((row, k) => ({ type: "scatter", mode: "lines+markers", name: row.name === "Mean" ? "Mean and Sum" : row.name, visible: row.name === "Max" ? "legendonly" : true, x: order.map((i) => losses[i]), y: order.map((i) => row.weight[i]), line: { shape: row.name.startsWith("Top") ? "hv" : "linear", width: 1.5, color: styles[k] }, marker: { size: 4, symbol: k, color: styles[k] } })),
    layout: { xaxis: { title: { text: "loss of the example, m" }, zeroline: false }, yaxis: { title: { text: "weight, c n of all" }, rangemode: "tozero" } },
    numbers: () => ({ head: ["example", "loss", ...rows.map((row) => row.name)], rows: order.map((i) => [String(examples.ids[i]), losses[i], ...rows.map((row) => row.weight[i])]) }),
  });
  add(body,
    scroll("Reductions", table("This batch under every reduction", head, rows.map(line))),
    known ? null : why("How long the gradients are is not known here: give model=, objective= and batch=, or observe gradients."),
    curve, found.compared ? conversions(found.compared) : why("Sum and Mean cannot be compared without the gradients under both."));
}

function conversions({ norms, distance, rate, penalty, clip }) {
  const n = number(found.count);
  const card = (title, ...content) => h("div", { class: "card" }, h("h3", {}, title), content);
  return h("div", { class: "columns three" },
    card("The rate that makes them equal", rateText(rate, n), h("p", {}, `|G| is ${number(norms.mean)} under Mean and ${number(norms.sum)} under Sum. Sum's gradient is ${n} times that of Mean to within `, h("strong", { "data-value": distance }, number(distance, 2)), " (relative, measured).")),
    card("The penalty", penalty ? [h("p", {}, `Its gradient is ${number(penalty.norm)} long, ${percent(penalty.norm / norms.mean)} of the data term's under Mean. Left unchanged under Sum, it is ${percent(penalty.norm / norms.sum)}, and the two updates are `, h("strong", { "data-value": penalty.unchanged }, number(penalty.unchanged, 3)), ` apart; times ${n} they are `, h("strong", { "data-value": penalty.times_count }, number(penalty.times_count, 2)), " apart (relative, measured).")] : why("This objective has no penalty.")),
    card("The clip norm", clip ? table("What a clip norm does", ["case", "|U| before", "max_norm", "factor"], clip.map((one) => h("tr", {}, h("th", { scope: "row" }, one.case), cell(one.norm), cell(one.max_norm), cell(one.factor)))) : why("The whole gradient is not clipped here.")));
}

function rateText(rate, n) {
  if (!rate) return why("No rate: the reduction of this run is neither Mean nor Sum, or no optimiser was given.");
  const carried = Object.entries(rate.carried ?? {}).map(([name, power]) => ` ${name} has to be multiplied by ${power === 1 ? "Σ n" : "(Σ n)²"}.`);
  if (rate.rule === "rate") return h("p", {}, "lr = ", h("strong", { id: "lr-mean", "data-value": rate.mean }, number(rate.mean)), " under Mean and lr = ", h("strong", { id: "lr-sum", "data-value": rate.sum }, number(rate.sum)), ` under Sum make the same update: the rate is divided by Σ n = ${n}.`, carried);
  if (rate.rule === "direction") return h("p", {}, `${rate.optimizer} divides by the size of the gradient itself, so the same rate, `, h("strong", { "data-value": rate.sum }, number(rate.sum)), `, serves both. Σ n is ${n}.`, carried);
  return why(`No rule is known for ${rate.optimizer}.`);
}
