/* The update as it was made, a stage at a time, and one weight followed through it. */

const { data, h, add, unpack, number, percent, fraction, counted, cell, table, scroll, why, select, chart, examples } = page;
const found = data.stages;
const body = document.querySelector("#stages .body");
const SECONDS = 2.6; // that a stage stays while the update is played
const isWide = matchMedia("(min-width: 56rem)").matches; // two columns

/* Where the numbers of each stage are while the update is made. */
const STORED = {
  forward: "The losses are a tensor with one number for each example. Each layer keeps what it needs to go back.",
  backward: "Nowhere, as a rule: backward adds the gradients up at once. This page asked anybatch to observe them one by one.",
  shorten: "Nowhere: each gradient is shortened on its way into the sum.",
  sum: "In .grad of each parameter, one number for each weight, whatever the batch size.",
  divide: "In .grad, in place of the sum.",
  penalty: "In .grad, on top of what is there.",
  clip: "In .grad, which is shortened in place.",
  optimise: "In the parameters, over the old weights. Running means, such as momentum, stay in the optimiser. It only reads .grad.",
};

const factor = found.way === "divide" ? found.count : 1; // of the sum, before it is divided

if (found.why) add(body, why(found.why));
else add(body, player());

/** The stages of this update: name, equation, what happened, figures, what a weight has then. */
function listed() {
  const { count, way, clip } = found;
  const { about, layers: { norms, parts } } = data;
  const losses = examples.terms.find((one) => one.losses)?.losses ?? [];
  const [least, most] = [Math.min(...losses), Math.max(...losses)];
  const dataLoss = parts.filter((part) => !part.is_penalty).reduce((sum, part) => sum + part.value, 0);
  const many = counted(examples.size, "example");
  const moved = norms.step / norms.weights;
  const all = [
    { name: "forward", equation: "v_i = loss of example i", text: `Each of the ${many} goes through the model and gets ${losses.length ? "a loss" : "values"} of its own. Together they make the data loss of the batch, ${number(dataLoss)}.`, stored: STORED.forward, figures: [...(losses.length ? [["lowest loss", least], ["highest loss", most]] : []), ["data loss", dataLoss]] },
    { name: "backward", equation: "g_i = ∇v_i", text: "Each loss is followed back through the model. This gives every example a gradient of its own: for each weight, how much its loss would grow if the weight grew.", stored: STORED.backward, figures: [["mean gradient norm", found.mean_norm]] },
    clip?.kind === "ClipExamples" ? { name: "shorten", equation: "g_i ← g_i · min(1, M / |g_i|)", text: `Gradients of examples longer than M = ${number(clip.max_norm)} are shortened to it: ${clip.shortened} of ${examples.size}.`, stored: STORED.shorten, figures: [["M", clip.max_norm]] } : null,
    { name: way === "weigh" ? "weigh and sum" : "sum", equation: way === "weigh" ? "G = Σ c_i g_i" : "Σ g_i", text: way === "weigh" ? `The gradients are added up, each times its coefficient c: how much the example counts under ${about.reduction}. What is opposite cancels.` : "The gradients are added up, one example after the other. What is opposite cancels on the way.", stored: STORED.sum, figures: [[way === "weigh" ? "length of G" : "length of the sum", norms.data * factor]], hasSum: true },
    way === "divide" ? { name: "divide", equation: "G = Σ g_i / Σ n", text: `The sum is divided once, by the count of the whole batch, ${number(count)}. So each example counts ${count === examples.size ? fraction(1 / count) : "by its own count"}.`, stored: STORED.divide, figures: [["divided by", count], ["length of G", norms.data]] } : null,
    !about.penalty.length ? null : { name: "penalty", equation: "G + ∇Ω", text: `The gradient of the penalty (${about.penalty.join("; ")}) is added once an update, whatever the batch.`, stored: STORED.penalty, figures: [["length of ∇Ω", norms.penalty], ["against G", norms.penalty / norms.data, percent]] },
    clip?.kind === "ClipNorm" ? { name: "clip", equation: "U = (G + ∇Ω) · min(1, M / |G + ∇Ω|)", text: clip.norm > clip.max_norm ? `The gradient is ${number(clip.norm)} long. That is more than M = ${number(clip.max_norm)}, so it is shortened to M.` : `The gradient is ${number(clip.norm)} long. That is no more than M = ${number(clip.max_norm)}, so it stays as it is.`, stored: STORED.clip, figures: [["length of U", norms.update]] } : null,
    norms.step === null ? null : { name: "optimise", equation: `w ← ${about.optimizer}(w, U)`, text: `${about.optimizer} changes the weights w once, by the gradient U and the learning rate ${number(about.lr)}.`, stored: STORED.optimise, figures: [["length of U", norms.update], ["length of the change", norms.step], ["weights moved by", moved, percent]] },
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
  const [sums, firsts] = [partialSums(), page.makeFirsts(examples.size)];

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
    add(panel, h("p", {}, stage.text), h("p", { class: "equation" }, page.math(stage.equation)), h("p", { class: "stored" }, h("strong", {}, "Where it is stored. "), stage.stored), h("dl", { class: "facts" }, stage.figures.map(([name, value, show]) => page.figure(name, value, null, show ?? number))));
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
  const left = add(h("div", { class: "stack" }), h("ol", { class: "steps", "aria-label": "Stages" }, steps), panel, h("div", { class: "controls" }, back, play, next), sums);
  const right = add(h("div", { class: "stack" }), follow?.element, firsts);
  const element = add(h("div", { class: "player", onkeydown: keys }), h("div", { class: "columns" }, left, right.childElementCount ? right : null));
  to(0);
  return element;
}

/** The length of the sum as examples are added, against what it would be if all agreed. */
function partialSums() {
  if (!found.partial || examples.size < 3) return null;
  const [sums, lengths] = [unpack(found.partial.sums), unpack(found.partial.lengths)];
  const k = Array.from(sums, (_, i) => i + 1);
  const read = h("p", { role: "status" });
  const input = h("input", { type: "range", min: 1, max: sums.length, value: sums.length, oninput: tell });
  function tell() {
    const at = Number(input.value) - 1;
    read.textContent = `After ${at + 1} of ${counted(sums.length, "example")} the sum is ${number(factor * sums[at])} long. Without cancelling it would be ${number(factor * lengths[at])}: ${percent(lengths[at] ? Math.max(0, 1 - sums[at] / lengths[at]) : 0)} has cancelled.`;
  }
  tell();
  return h("div", { class: "sums card" }, h("h3", {}, "Added one after the other"), h("label", { class: "field" }, h("span", {}, "Examples added"), input), read, chart({
    title: "Length of the sum", summary: `The sum ends at ${number(factor * sums.at(-1))}; without cancelling it would end at ${number(factor * lengths.at(-1))}.`,
    traces: [{ type: "scatter", mode: "lines", name: "as it is", x: k, y: Array.from(sums, (x) => factor * x), line: { color: "--accent", width: 2 } }, { type: "scatter", mode: "lines", name: "if all agreed", x: k, y: Array.from(lengths, (x) => factor * x), line: { color: "--fourth", dash: "dash" } }],
    layout: { height: isWide ? 640 : 360, xaxis: { title: { text: "examples added" } }, yaxis: { title: { text: "length" }, rangemode: "tozero" } },
    numbers: () => ({ head: ["examples", "length of the sum", "if all agreed"], rows: k.map((n, i) => [String(n), factor * sums[i], factor * lengths[i]]) }),
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
  const element = h("div", { class: "card" }, h("h3", {}, "One weight, followed"), select("Weight", names, (k) => { state.weight = k; bars(); show(); }), holder, h("div", { class: "bars" }));

  function each() {
    return pairs.places.map((i, row) => examples.factors[i] * gradients[row * width + at[state.weight]]);
  }
  function bars() {
    const values = each();
    const [plus, minus] = [values.filter((x) => x > 0).length, values.filter((x) => x < 0).length];
    element.querySelector(".bars").replaceChildren(chart({
      title: `What each example adds to ${names[state.weight]}`, summary: `${plus} examples pull it one way and ${minus} the other.`,
      traces: [{ type: "bar", x: values.map((_, k) => k + 1), y: values, text: pairs.places.map((i) => examples.nameOf(i)), textposition: "none", marker: { color: values.map((x) => (x < 0 ? "--against" : "--accent")) }, hovertemplate: "%{text}<br>%{y:.3g}<extra></extra>" }],
      layout: { height: 170, xaxis: { title: { text: isAll ? "examples" : `${values.length} of ${examples.size} examples` }, showticklabels: false, zeroline: false }, yaxis: { title: { text: "adds to G" } }, bargap: 0.1 },
      numbers: () => ({ head: ["example", "adds"], rows: values.map((x, k) => [String(examples.ids[pairs.places[k]]), x]) }),
    }));
  }
  function show() {
    const k = at[state.weight];
    const [name, now] = [all[state.at].name, state.at];
    const reached = (stage) => now >= all.findIndex((one) => one.name === stage);
    const summing = all.find((one) => one.hasSum).name;
    const rows = [["forward", "weight before", of.before[k]], [summing, summing === "sum" ? "sum of the gradients" : "weighed sum G", factor * of.data[k]], ["divide", "divided: G", of.data[k]], ["penalty", "gradient of the penalty", of.penalty[k]], [all.some((one) => one.name === "clip") ? "clip" : "optimise", "U, for the optimiser", of.update[k]], ["optimise", "weight after", of.after ? of.after[k] : null], ["optimise", "change", of.after ? of.after[k] - of.before[k] : null]].filter(([stage]) => all.some((one) => one.name === stage));
    holder.replaceChildren(table(`${names[state.weight]}, up to the stage “${name}”`, ["", "value"], rows.map(([stage, what, value]) => h("tr", { class: stage === name ? "total" : "" }, h("th", { scope: "row" }, what), reached(stage) ? cell(value) : h("td", { class: "n" }, "…")))));
  }
  bars();
  return { element, show };
}
