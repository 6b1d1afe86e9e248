/* A strip for learners: the worked batch of two, and where to go from there. */

const { data, h, add, number, cell, table, scroll } = page;
const hasStages = !data.stages.why;

/** Question 1: do losses that cancel have gradients that cancel? */
function worked() {
  const one = data.worked;
  const weights = one.before.map((_, k) => h("th", { scope: "col", class: "n" }, `w${k + 1}`));
  const still = one.mean.findIndex((x) => Math.abs(x) < 1e-12);
  const row = (name, values, kind = "") => h("tr", { class: kind }, h("th", { scope: "row" }, name), values.map((x) => cell(Math.abs(x) < 1e-12 ? 0 : x)));
  const [first, second] = one.losses.map((x) => number(Number(x.toFixed(9))));
  return h("div", { class: "card worked", id: "worked" },
    h("p", { class: "tag" }, "A made-up batch of two, not of this run"),
    h("h3", {}, `Losses ${first} and ${second}: is the gradient 0 too?`),
    h("p", {}, `No. The mean loss is 0, the mean gradient is not. Each example goes back on its own, and gradients are averaged, not losses. Only w${still + 1} stays where it is: there the gradients ${number(one.gradients[0][still])} and ${number(one.gradients[1][still])} cancel.`),
    scroll("The made-up batch", table(`Five weights, one update by SGD with learning rate ${number(one.lr)}`, ["", ...weights], [
      row("gradient of the first", one.gradients[0]), row("gradient of the second", one.gradients[1]),
      row("their mean", one.mean, "total"), row("weights before", one.before), row("weights after", one.after, "total")])));
}

/** What to look at, in this order. */
function guide() {
  const to = (id, text) => h("a", { href: `#${id}` }, text);
  const items = [
    ["A batch is a few examples. Each has a loss and a gradient of its own. The two here show why: their losses cancel, their gradients do not."],
    ["The picture at the top is the same for the real batch: thin lines for the examples, a short arrow for what is left of them."],
    hasStages && ["Press Play in ", to("stages", "Step by step"), ". The update is made again, one stage after the other."],
    hasStages && data.stages.firsts && ["Move the slider “Examples, from the first” there. Few examples give a gradient that points elsewhere."],
    ["Choose two in ", to("examples", "The examples"), ", and see where they agree and where they cancel."],
  ];
  return h("ol", {}, items.filter(Boolean).map((one) => h("li", {}, one)));
}

add(document.getElementById("start"), h("div", { class: "columns" },
  h("div", { class: "stack" }, h("h2", { id: "start-title" }, "Start here"), h("p", { class: "lead" }, "New to batches? Five minutes, from the smallest case to this one."), guide()),
  worked()));
