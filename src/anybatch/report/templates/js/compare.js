/* Two examples side by side: where they agree and where they cancel, by parameter and by weight.

   <g_A, g_B> by parameter comes from the inner products of all pairs, which the page holds; single
   weights from those that it follows, the ones with the largest gradients over the batch. */

const { data, h, add, unpack, number, percent, cell, bar, table, scroll, why, select, chart, examples } = page;
const place = document.getElementById("compare");
const { pairs, weights } = data;
const picked = { A: null, B: null, next: "A" };

if (pairs.why) {
  add(place, h("div", { class: "card" }, h("h3", {}, "Two examples side by side"), why(pairs.why)));
} else {
  start();
}

function start() {
  const inner = unpack(pairs.inner);
  const gradients = unpack(pairs.gradients);
  const names = pairs.parameters;
  const rowOf = new Map(pairs.places.map((one, row) => [one, row]));
  const begins = weights.parameters.reduce((all, one) => [...all, all.at(-1) + one.places.length], [0]);
  const kept = examples.share ? "the largest share" : "the longest gradients";
  const result = h("div", { class: "result" });
  const strip = h("div", { class: "strip", role: "status" });
  add(document.getElementById("pair"), strip);
  let parameter = 0;

  /** <g_i, g_j> by parameter. */
  function product(i, j) {
    const [low, high] = i < j ? [i, j] : [j, i];
    const at = ((high * (high + 1)) / 2 + low) * names.length;
    return Array.from(inner.subarray(at, at + names.length));
  }
  const degrees = (cosine) => (Math.acos(Math.max(-1, Math.min(1, cosine))) * 180) / Math.PI;
  const total = (values) => values.reduce((sum, x) => sum + x, 0);

  function card(side, i) {
    const term = examples.terms.find((one) => one.losses);
    return h("div", { class: `side side-${side}` }, h("p", { class: "tag" }, side), examples.picture(i, true),
      h("p", {}, h("strong", {}, examples.nameOf(i)), h("br"), term ? `loss ${number(term.losses[i])}, ` : "", `gradient norm ${number(examples.norms[i])}`, examples.share ? `, share ${percent(examples.share[i])}` : ""));
  }

  function byParameter(ab, aa, bb) {
    const most = Math.max(...ab.map(Math.abs)) || 1;
    return scroll("Agreement by parameter", table("Inner product of the two gradients, by parameter. Bars to the right: they agree; to the left: they cancel", ["parameter", "inner product", "angle"],
      names.map((name, k) => h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "n wide", "data-value": ab[k] }, number(ab[k]), bar(ab[k] / most, "both")), cell(aa[k] && bb[k] ? degrees(ab[k] / Math.sqrt(aa[k] * bb[k])) : null, page.degrees)))), "low");
  }

  /** The followed weights of the parameter at hand, the largest products first. */
  function followed(a, b) {
    const { name, places } = weights.parameters[parameter];
    const [first, width] = [begins[parameter], gradients.shape[1]];
    const values = places.map((index, k) => ({ index: `[${index.join(", ")}]`, a: gradients[a * width + first + k], b: gradients[b * width + first + k] }));
    return { name, sorted: values.sort((x, y) => y.a * y.b - x.a * x.b) };
  }

  function byWeight({ name, sorted }, inAll) {
    const shown = total(sorted.map((one) => one.a * one.b));
    const groups = [["agree", sorted.filter((one) => one.a * one.b > 0), "--accent", "circle"], ["cancel", sorted.filter((one) => one.a * one.b <= 0), "--against", "diamond"]];
    const size = data.layers.rows?.find((row) => row.name === name)?.elements;
    return [
      h("p", { class: "note" }, `Shown are ${sorted.length}${size ? ` of ${number(size)}` : ""} weights of ${name}, those with the largest gradients. They make up ${number(shown)} of the inner product of ${number(inAll)}.`),
      chart({
        title: `Single weights of ${name}`, summary: `${groups[0][1].length} weights agree and ${groups[1][1].length} cancel.`,
        traces: groups.map(([group, of, fill, symbol]) => ({ type: "scatter", mode: "markers", name: group, x: of.map((one) => one.a), y: of.map((one) => one.b), text: of.map((one) => one.index), hovertemplate: "%{text}<br>A %{x:.4g}, B %{y:.4g}<extra></extra>", marker: { color: fill, symbol, size: 7, opacity: 0.75 } })),
        layout: { xaxis: { title: { text: "gradient of A" } }, yaxis: { title: { text: "gradient of B" } } },
        numbers: () => ({ head: ["weight", "A", "B", "product"], rows: sorted.map((one) => [one.index, one.a, one.b, one.a * one.b]) }),
      }),
    ];
  }

  /** The weights that agree most, and those that cancel most. */
  function extremes({ sorted }) {
    const line = (one) => h("tr", {}, h("th", { scope: "row" }, one.index), cell(one.a), cell(one.b), cell(one.a * one.b));
    return ["agree", "cancel"].map((kind) => {
      const some = (kind === "agree" ? sorted.filter((one) => one.a * one.b > 0) : sorted.filter((one) => one.a * one.b < 0).reverse()).slice(0, 5);
      return some.length ? scroll(`Weights where they ${kind}`, table(`Weights where A and B ${kind} most`, ["weight", "gradient of A", "gradient of B", "product"], some.map(line), { class: "names" }), "low") : null;
    });
  }

  function show() {
    const [a, b] = [rowOf.get(picked.A), rowOf.get(picked.B)];
    if (a === undefined || b === undefined) {
      strip.replaceChildren();
      result.replaceChildren(why(`This file holds the gradients of the examples with ${kept} alone, and one of these two is not among them. Choose another.`));
      return;
    }
    const [ab, aa, bb] = [product(a, b), product(a, a), product(b, b)];
    const [dot, lengthA, lengthB] = [total(ab), Math.sqrt(total(aa)), Math.sqrt(total(bb))];
    const [cA, cB] = [examples.factors[picked.A], examples.factors[picked.B]];
    const sum = Math.sqrt(Math.max(0, (cA * lengthA) ** 2 + (cB * lengthB) ** 2 + 2 * cA * cB * dot));
    const lengths = Math.abs(cA) * lengthA + Math.abs(cB) * lengthB;
    const angle = degrees(dot / (lengthA * lengthB));
    const [weight, most] = [h("div", { class: "stack" }), h("div", { class: "columns" })];
    const choose = (k) => {
      parameter = k;
      const values = followed(a, b);
      weight.replaceChildren();
      most.replaceChildren();
      add(weight, byWeight(values, ab[k]));
      add(most, extremes(values));
    };
    choose(parameter);
    const cancels = lengths ? 1 - sum / lengths : null;
    result.replaceChildren();
    strip.replaceChildren();
    add(strip, small("A", picked.A), small("B", picked.B), h("p", { class: "verdict" }, verdict(angle, cancels)));
    add(result,
      h("div", { class: "sides" }, card("A", picked.A), card("B", picked.B),
        h("dl", { class: "facts" },
          page.figure("angle between them", angle, "90° means nothing in common", page.degrees),
          page.figure("inner product", dot, dot < 0 ? "negative: they cancel" : "positive: they agree"),
          page.figure("they add together", sum, "to the update"),
          page.figure("cancels", cancels, `of ${number(lengths)}`, percent))),
      h("div", { class: "columns level" }, h("div", { class: "stack" }, h("h4", {}, "By parameter"), byParameter(ab, aa, bb)), h("div", { class: "stack" }, h("h4", {}, "By weight"), select("Parameter", names, choose, parameter), weight)), most);
  }

  function small(side, i) {
    return h("div", { class: "small" }, h("span", { class: "tag" }, side), examples.picture(i), h("span", {}, examples.nameOf(i)));
  }
  function verdict(angle, cancels) {
    if (!Number.isFinite(angle)) return "One of the two has no gradient here.";
    if (cancels === null) return `${number(angle)}° apart, but they do not count in this update.`;
    const said = angle > 100 ? "They pull against each other" : angle < 80 ? "They pull the same way" : "They have little to do with each other";
    return [`${said}: ${number(angle)}° apart, `, h("strong", {}, percent(cancels)), " cancels."];
  }

  page.on("pick", ({ side, place: i }) => {
    const to = side ?? picked.next;
    picked[to] = i;
    picked.next = to === "A" ? "B" : "A";
    page.tell("picked", picked);
    show();
  });

  /* At first the two that cancel most, of all pairs. */
  let worst = [0, 1, Infinity];
  for (let i = 1, at = 0; i < pairs.places.length; i += 1) {
    at = ((i * (i + 1)) / 2) * names.length;
    for (let j = 0; j < i; j += 1) {
      let dot = 0;
      for (let k = 0; k < names.length; k += 1, at += 1) dot += inner[at];
      dot *= examples.factors[pairs.places[i]] * examples.factors[pairs.places[j]];
      if (dot < worst[2]) worst = [i, j, dot];
    }
  }
  const firstParameter = product(worst[0], worst[1]).map(Math.abs);
  parameter = firstParameter.indexOf(Math.max(...firstParameter));
  add(place, h("div", { class: "card" }, h("h3", {}, "Two examples side by side"),
    h("p", { class: "note" }, `Choose them by A and B in the table, or in the chart. At first these are the two that cancel most${pairs.places.length < examples.size ? ` among the ${pairs.places.length} examples with ${kept}, which are in this file` : ""}.`), result));
  Object.assign(picked, { A: pairs.places[worst[0]], B: pairs.places[worst[1]] });
  page.tell("picked", picked);
  show();
}
