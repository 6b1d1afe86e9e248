/* Section 7: the update as it was made, a stage at a time, and one weight followed through it. */

const { data, h, add, unpack, number, percent, cell, table, why, select, chart, examples } = page;
const found = data.stages;
const body = document.querySelector("#stages .body");
const SECONDS = 2.6; // that a stage stays while the update is played

const factor = found.way === "divide" ? found.count : 1; // of the sum, before it is divided

if (found.why) add(body, why(found.why));
else add(body, player());

/** The stages of this update: name, equation, what happened, figures, what a weight has then. */
function listed() {
  const { count, way, clip } = found;
  const { about, layers: { norms } } = data;
  const losses = examples.terms.find((one) => one.losses)?.losses ?? [];
  const [least, most] = [Math.min(...losses), Math.max(...losses)];
  const all = [
    { name: "forward", equation: "v_i = loss of example i", text: `Each of the ${number(examples.size)} examples goes forward on its own and yields its loss. Reduced over the batch, with the penalty, they are ${number(about.loss)}.`, figures: [["lowest loss", least], ["highest loss", most], ["loss of the batch", about.loss]] },
    { name: "backward", equation: "g_i = ∇v_i", text: "Each example goes back on its own: its gradient belongs to it alone.", figures: [["mean of |g_i|", found.mean_norm]] },
    clip?.kind === "ClipExamples" ? { name: "shorten", equation: "g_i ← g_i · min(1, M / |g_i|)", text: `${number(clip.shortened)} of ${number(examples.size)} gradients are longer than ${number(clip.max_norm)} and are shortened to it.`, figures: [["M", clip.max_norm]] } : null,
    { name: way === "weigh" ? "weigh and sum" : "sum", equation: way === "weigh" ? "G = Σ c_i g_i" : "Σ g_i", text: way === "weigh" ? `Under ${about.reduction} each has a coefficient of its own, c_i = ∂R/∂v_i.` : "They are added up, one after the other. What is opposite cancels on the way.", figures: [["length of the sum", norms.data * factor]], hasSum: true },
    way === "divide" ? { name: "divide", equation: "G = Σ g_i / Σ n", text: `The sum is divided once, by the count of the whole batch, ${number(count)}.`, figures: [["Σ n", count], ["|G|", norms.data]] } : null,
    !about.penalty.length ? null : { name: "penalty", equation: "G + ∇Ω", text: `The penalty (${about.penalty.join("; ")}) is added once an update, whatever the batch.`, figures: [["|∇Ω|", norms.penalty], ["of |G|", norms.penalty / norms.data, percent]] },
    clip?.kind === "ClipNorm" ? { name: "clip", equation: "U = (G + ∇Ω) · min(1, M / |G + ∇Ω|)", text: clip.norm > clip.max_norm ? `It is ${number(clip.norm)} long and is shortened to ${number(clip.max_norm)}.` : `It is ${number(clip.norm)} long, no more than ${number(clip.max_norm)}, and stays.`, figures: [["|U|", norms.update]] } : null,
    norms.step === null ? null : { name: "optimise", equation: `w ← ${about.optimizer}(w, U)`, text: `${about.optimizer} makes one update of it, at the rate ${number(about.lr)}.`, figures: [["|U|", norms.update], ["|Δw|", norms.step], ["|Δw| / |w|", norms.step / norms.weights]] },
  ];
  return all.filter(Boolean);
}

function player() {
  const all = listed();
  const state = { at: 0, timer: null, weight: 0 };
  const panel = h("div", { class: "stage", id: "stage", "aria-live": "polite" });
  const steps = all.map((stage, k) => h("li", {}, h("button", { type: "button", onclick: () => { stop(); to(k); } }, h("span", { class: "number", "aria-hidden": "true" }, k + 1), " ", stage.name)));
  const play = h("button", { type: "button", id: "play", onclick: () => (state.timer ? stop() : start()) }, "Play");
  const back = h("button", { type: "button", onclick: () => { stop(); to(state.at - 1); } }, "Back");
  const next = h("button", { type: "button", id: "next", onclick: () => { stop(); to(state.at + 1); } }, "Next");
  const follow = follower(state, all);
  const sums = partialSums();

  function to(k) {
    state.at = Math.max(0, Math.min(all.length - 1, k));
    const stage = all[state.at];
    steps.forEach((one, i) => {
      one.classList.toggle("done", i < state.at);
      if (i === state.at) one.firstChild.setAttribute("aria-current", "step");
      else one.firstChild.removeAttribute("aria-current");
    });
    back.disabled = state.at === 0;
    next.disabled = state.at === all.length - 1;
    panel.replaceChildren();
    add(panel, h("p", { class: "equation" }, page.math(stage.equation)), h("p", {}, stage.text), h("dl", { class: "facts" }, stage.figures.map(([name, value, show]) => page.figure(name, value, null, show ?? number))));
    if (sums) sums.hidden = !stage.hasSum;
    follow?.show();
  }
  function stop() {
    clearInterval(state.timer);
    state.timer = null;
    play.textContent = "Play";
  }
  function start() {
    if (state.at === all.length - 1) to(0);
    play.textContent = "Pause";
    state.timer = setInterval(() => {
      to(state.at + 1);
      if (state.at === all.length - 1) stop();
    }, SECONDS * 1000);
  }

  const keys = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (move && event.target.tagName === "BUTTON") { stop(); to(state.at + move); event.preventDefault(); }
  };
  const element = h("div", { class: "player", onkeydown: keys }, h("ol", { class: "steps", "aria-label": "Stages" }, steps), h("div", { class: "controls" }, back, play, next), panel, sums, follow ? follow.element : null);
  to(0);
  return element;
}

/** Adding up one example after the other: the length of the sum against the sum of the lengths. */
function partialSums() {
  if (!found.partial) return null;
  const [sums, lengths] = [unpack(found.partial.sums), unpack(found.partial.lengths)];
  const k = Array.from(sums, (_, i) => i + 1);
  const read = h("p", { role: "status" });
  const input = h("input", { type: "range", min: 1, max: sums.length, value: sums.length, oninput: tell });
  function tell() {
    const at = Number(input.value) - 1;
    read.textContent = `After ${at + 1} of ${sums.length} examples the sum is ${number(factor * sums[at])} long, of ${number(factor * lengths[at])} that were added: ${percent(1 - sums[at] / lengths[at])} has cancelled.`;
  }
  tell();
  return h("div", { class: "sums card", hidden: true }, h("label", { class: "field" }, h("span", {}, "Examples added"), input), read, chart({
    title: "One example after the other", summary: `The sum ends at ${number(factor * sums.at(-1))}, the lengths add up to ${number(factor * lengths.at(-1))}.`,
    traces: [{ type: "scatter", mode: "lines", name: "length of the sum", x: k, y: Array.from(sums, (x) => factor * x), line: { color: "--accent", width: 2 } }, { type: "scatter", mode: "lines", name: "sum of the lengths", x: k, y: Array.from(lengths, (x) => factor * x), line: { color: "--fourth", dash: "dash" } }],
    layout: { xaxis: { title: { text: "examples added" } }, yaxis: { title: { text: "length" }, rangemode: "tozero" } },
    numbers: () => ({ head: ["examples", "length of the sum", "sum of the lengths"], rows: k.map((n, i) => [String(n), factor * sums[i], factor * lengths[i]]) }),
  }));
}

/** One weight through all stages. */
function follower(state, all) {
  const { weights, pairs } = data;
  if (!weights || !weights.before || pairs.why) return null;
  const of = Object.fromEntries(["before", "data", "penalty", "update", "after"].map((key) => [key, unpack(weights[key])]));
  const gradients = unpack(pairs.gradients);
  const width = gradients.shape[1];
  const names = weights.parameters.flatMap((one) => one.places.slice(0, 8).map((index) => `${one.name}[${index.join(", ")}]`));
  const begins = weights.parameters.reduce((sum, one) => [...sum, sum.at(-1) + one.places.length], [0]);
  const at = weights.parameters.flatMap((one, p) => one.places.slice(0, 8).map((_, k) => begins[p] + k));
  const isAll = pairs.places.length === examples.size;
  const holder = h("div");
  const element = h("div", { class: "card" }, h("h3", {}, "One weight, followed"), select("Weight", names, (k) => { state.weight = k; bars(); show(); }), h("div", { class: "columns" }, holder, h("div", { class: "bars" })));

  function each() {
    return pairs.places.map((i, row) => examples.factors[i] * gradients[row * width + at[state.weight]]);
  }
  function bars() {
    const values = each();
    const [plus, minus] = [values.filter((x) => x > 0).length, values.filter((x) => x < 0).length];
    element.querySelector(".bars").replaceChildren(chart({
      title: `What each example adds to ${names[state.weight]}`, summary: `${plus} examples pull it one way and ${minus} the other.`,
      traces: [{ type: "bar", x: values.map((_, k) => k + 1), y: values, text: pairs.places.map((i) => examples.nameOf(i)), textposition: "none", marker: { color: values.map((x) => (x < 0 ? "--against" : "--accent")) }, hovertemplate: "%{text}<br>%{y:.4g}<extra></extra>" }],
      layout: { height: 200, xaxis: { title: { text: isAll ? "examples" : `${values.length} of ${examples.size} examples` }, showticklabels: false, zeroline: false }, yaxis: { title: { text: "c g" } }, bargap: 0.1 },
      numbers: () => ({ head: ["example", "adds"], rows: values.map((x, k) => [String(examples.ids[pairs.places[k]]), x]) }),
    }));
  }
  function show() {
    const k = at[state.weight];
    const [name, now] = [all[state.at].name, state.at];
    const reached = (stage) => now >= all.findIndex((one) => one.name === stage);
    const rows = [["forward", "w, before", of.before[k]], [all.find((one) => one.hasSum).name, "sum of the examples' gradients", factor * of.data[k]], ["divide", "divided: G", of.data[k]], ["penalty", "∇Ω", of.penalty[k]], [all.some((one) => one.name === "clip") ? "clip" : "optimise", "U, to the optimiser", of.update[k]], ["optimise", "w, after", of.after ? of.after[k] : null], ["optimise", "Δw", of.after ? of.after[k] - of.before[k] : null]].filter(([stage]) => all.some((one) => one.name === stage));
    holder.replaceChildren(table(`${names[state.weight]}, up to “${name}”`, ["what", "value"], rows.map(([stage, what, value]) => h("tr", { class: stage === name ? "total" : "" }, h("th", { scope: "row" }, what), reached(stage) ? cell(value) : h("td", { class: "n" }, "…")))));
  }
  bars();
  return { element, show };
}
