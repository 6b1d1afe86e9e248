/* The same batch under every reduction, and Sum and Mean carried over. */

const { data, h, add, unpack, number, percent, cell, bar, table, scroll, why, chart, examples } = page;
const found = data.reductions;
const body = document.querySelector("#reductions .body");

if (found.why) {
  add(body, why(found.why));
} else {
  const rows = found.rows.map((row) => ({ ...row, weight: unpack(row.weight) }));
  const known = rows.some((row) => row.norm !== undefined);
  const head = ["reduction", "formula", "data loss", "examples used", ...(known ? ["gradient norm", "times that of Mean", "angle to Mean"] : [])];
  const most = Math.max(...rows.map((row) => Math.log1p(row.norm ?? 0)));
  const [term] = examples.terms;
  const losses = term.losses;
  const line = (row) => h("tr", { class: row.name === found.own ? "total" : "" },
    h("th", { scope: "row" }, row.name, row.name === found.own ? h("span", { class: "tag" }, "this run") : null),
    h("td", {}, term.counts ? row.formula : row.formula.replace("sum of the counts", "number of examples")), cell(row.value), cell(row.used),
    known ? [h("td", { class: "n wide", "data-value": row.norm }, number(row.norm), bar(Math.log1p(row.norm) / (most || 1), "share")), cell(row.ratio), cell(row.angle, page.degrees)] : null);

  const order = Array.from(losses.keys()).sort((i, j) => losses[i] - losses[j]);
  const styles = ["--accent", "--fourth", "--against", "--third", "--against", "--accent"];
  const curve = chart({
    title: "How much each example counts, by its loss",
    summary: "Mean and Sum count all examples alike; Max takes the largest loss alone; TopFraction the larger half; Tilted grows with the loss.",
    traces: rows.filter((row) => row.name !== "Sum").map((row, k) => ({ type: "scatter", mode: "lines+markers", name: row.name === "Mean" ? "Mean and Sum" : row.name, visible: row.name === "Max" ? "legendonly" : true, x: order.map((i) => losses[i]), y: order.map((i) => row.weight[i]), line: { shape: row.name.startsWith("Top") ? "hv" : "linear", width: 1.5, color: styles[k] }, marker: { size: 4, symbol: k, color: styles[k] } })),
    layout: { xaxis: { title: { text: "loss of the example" }, zeroline: false }, yaxis: { title: { text: "part of the whole" }, rangemode: "tozero" } },
    numbers: () => ({ head: ["example", "loss", ...rows.map((row) => row.name)], rows: order.map((i) => [String(examples.ids[i]), losses[i], ...rows.map((row) => row.weight[i])]) }),
  });
  add(body,
    scroll("Reductions", table("This batch under each reduction", head, rows.map(line), { class: "names" })),
    known ? null : why("the length of the gradients. Give model=, objective= and batch=, or observe gradients."),
    curve, found.compared ? conversions(found.compared) : null);
}

function conversions({ norms, distance, rate, penalty, clip }) {
  const n = number(found.count);
  const card = (title, ...content) => h("div", { class: "card" }, h("h3", {}, title), content);
  const strong = (value, digits = 3, id = null) => h("strong", { id, "data-value": value }, number(value, digits));
  const cards = [
    card("The learning rate", rateText(rate, n, strong), h("p", {}, `The gradient is ${number(norms.mean)} long under Mean and ${number(norms.sum)} under Sum: ${n} times as long, with a relative error of `, strong(distance, 2), " (measured).")),
    penalty && card("The penalty", h("p", {}, `Its gradient is ${number(penalty.norm)} long: ${percent(penalty.norm / norms.mean)} of that of the data loss under Mean, but ${percent(penalty.norm / norms.sum)} under Sum. Unchanged, it makes the two updates differ by `, h("strong", { "data-value": penalty.unchanged }, percent(penalty.unchanged)), `. Multiplied by ${n}, it makes them the same, with a relative error of `, strong(penalty.times_count, 2), " (measured).")),
    clip && card("The clip norm", scroll("What a clip norm does", table("What a clip norm does", ["case", "norm before", "max_norm", "times"], clip.map((one) => h("tr", {}, h("th", { scope: "row" }, one.case), cell(one.norm), cell(one.max_norm), cell(one.factor)))), "low")),
  ].filter(Boolean);
  return [h("h3", {}, "From Mean to Sum and back"), h("div", { class: `columns level ${["", "", "", "three"][cards.length] ?? ""}` }, cards)];
}

function rateText(rate, n, strong) {
  if (!rate) return why("no rule without an optimiser, or for a reduction that is neither Mean nor Sum.");
  const carried = Object.entries(rate.carried ?? {}).map(([name, power]) => ` Multiply ${name} by ${power === 1 ? n : `${n} twice`} for Sum.`);
  if (rate.rule === "rate") return h("p", {}, "Learning rate ", strong(rate.mean, 3, "lr-mean"), " under Mean and ", strong(rate.sum, 3, "lr-sum"), ` under Sum make the same update: divide by ${n}, the count of the batch.`, carried);
  if (rate.rule === "direction") return h("p", {}, `${rate.optimizer} divides by the size of the gradient itself. So the same rate, `, strong(rate.sum), ", serves both.", carried);
  return why(`no rule is known for ${rate.optimizer}.`);
}
