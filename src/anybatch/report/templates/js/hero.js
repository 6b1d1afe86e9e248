/* The head of the page: one sentence, its picture, the numbers of the update, and its formula. */

const { data, h, svg, add, number, percent, fraction, counted, figure, examples } = page;
const { about } = data;
const { cancelled } = data.examples;
const { norms, parts } = data.layers;
const lost = cancelled && cancelled.lengths ? Math.max(0, 1 - cancelled.sum / cancelled.lengths) : null;
const moved = norms?.step === undefined || norms.step === null || !norms.weights ? null : norms.step / norms.weights;

function sentence() {
  const used = examples.factors ? examples.factors.filter((x) => x !== 0).length : examples.size;
  const many = used < examples.size ? `${used} of ${counted(examples.size, "example")}` : counted(used, "example");
  const strong = (text, id, value) => h("strong", { id, "data-value": value }, text);
  const share = () => strong(percent(lost), "headline-lost", lost);
  const first = lost === null ? [strong(many), " became one update"]
    : used === 1 ? [strong(many), " made this update"]
    : lost < 0.005 ? [strong(many), " pulled the same way; almost nothing cancelled"]
    : lost < 0.05 ? [strong(many), " pulled almost the same way; ", share(), " of it cancelled"]
    : [strong(many), " pulled in different directions; ", share(), " of it cancelled"];
  const last = moved === null ? ["."] : moved === 0 ? ["; the weights did not move."] : ["; the weights moved by ", strong(percent(moved), "headline-moved", moved), "."];
  return [...first, ...last];
}

/** Arrows from one point: each example's pull and their average, as long as they are. Up is along
    the update; to which side an arrow is drawn says nothing. */
function fan() {
  const every = Array.from(examples.norms.keys()).filter((i) => Number.isFinite(examples.angles[i]) && examples.factors[i] !== 0);
  const lengths = new Map(every.map((i) => [i, every.length * Math.abs(examples.factors[i]) * examples.norms[i]]));
  const { sum, lengths: mean } = cancelled;
  const limit = Math.max(sum, Math.min(Math.max(...lengths.values()), 2 * mean));
  every.sort((i, j) => examples.angles[i] - examples.angles[j]);
  const ends = every.map((i, k) => {
    const [angle, length] = [(examples.angles[i] * Math.PI) / 180, Math.min(lengths.get(i), limit)];
    return { i, x: (k % 2 ? -1 : 1) * length * Math.sin(angle), y: -length * Math.cos(angle), isCut: lengths.get(i) > limit, isAgainst: examples.angles[i] > 90 };
  });
  const far = (of) => ends.reduce((most, end) => Math.max(most, of(end)), 0);
  const [side, up, down] = [Math.max(far((e) => Math.abs(e.x)), 0.4 * limit), Math.max(far((e) => -e.y), mean), far((e) => e.y)];
  const scale = Math.min(300 / side, 250 / (up + down));
  const [x0, y0] = [side * scale + 12, up * scale + 12];
  const line = (end, kind) => svg("line", { class: kind, x1: x0, y1: y0, x2: x0 + end.x * scale, y2: y0 + end.y * scale });
  const drawn = ends.map((end) => add(line(end, `pull ${end.isAgainst ? "against" : ""} ${end.isCut ? "cut" : ""}`), svg("title", {}, `${examples.nameOf(end.i)}: ${number(lengths.get(end.i))} long, ${number(examples.angles[end.i])}°`)));
  const arrow = (length, kind) => {
    const head = Math.min(15, 0.7 * length * scale);
    return [line({ x: 0, y: Math.min(0, head / scale - length) }, kind), svg("path", { class: `tip ${kind}`, d: `M ${x0} ${y0 - length * scale} l ${-head * 0.55} ${head} h ${1.1 * head} z` })];
  };
  const numAgainst = ends.filter((end) => end.isAgainst).length;
  const numShort = every.filter((i) => lengths.get(i) * scale < 3).length;
  const numCut = ends.filter((end) => end.isCut).length;
  const label = `${ends.length} thin arrows, one an example, and a short thick one, their average. ${numAgainst} point against it.`;
  return h("figure", { class: "fan" },
    svg("svg", { viewBox: `0 0 ${2 * x0} ${(up + down) * scale + 24}`, role: "img", "aria-label": label }, drawn, arrow(mean, "agreed"), arrow(sum, "sum")),
    h("figcaption", {}, "Each thin line is the gradient of one example, drawn from the middle. ", h("span", { class: "key along" }, counted(ends.length - numAgainst, "example")), " pull along with the update (up), ", h("span", { class: "key against" }, number(numAgainst)), ` against it (down). Left or right means nothing.${numCut ? ` Dashed: ${numCut} too long for the picture.` : ""}${numShort ? ` ${numShort} too short to be seen.` : ""}`));
}

function bars() {
  const { sum, lengths } = cancelled;
  const line = (kind, share, name, value) => h("div", { class: kind }, h("p", {}, name, " ", h("strong", { "data-value": value }, number(value))), h("div", { class: "length" }, h("span", { style: { width: `${100 * share}%` } })));
  return h("div", { class: "kept" },
    line("all", 1, "If all pulled the same way (long arrow):", lengths),
    line("of", sum / lengths, "What is left after cancelling (short arrow):", sum),
    h("p", { class: "note" }, `Lengths of the gradient, over all weights together. ${percent(lost)} cancels.`));
}

const [dataLoss, penalty] = [false, true].map((kind) => parts.filter((part) => part.is_penalty === kind).reduce((sum, part) => sum + part.value, 0));
const hasPenalty = parts.some((part) => part.is_penalty);

function facts() {
  return [
    figure("data loss", dataLoss, about.reduction ? `${about.reduction} over ${counted(examples.size, "example")}` : null),
    hasPenalty ? figure("penalty", penalty, "added to the data loss") : null,
    hasPenalty ? figure("total loss", about.loss, "data loss + penalty") : null,
    about.lr === null ? null : figure("learning rate", about.lr, about.optimizer),
    norms ? figure("gradient norm", norms.update, hasPenalty ? "with the penalty" : null) : cancelled ? figure("gradient norm", cancelled.sum, "of the data loss") : null,
    moved === null ? null : figure("weights moved by", moved, "of their own length", percent),
  ];
}

/** The formula, each symbol with its meaning in this batch. */
function symbols() {
  const term = examples.terms.find((one) => one.losses);
  const losses = term ? Array.from(term.losses) : [];
  const c = term ? Array.from(term.coefficients) : [];
  const isEqual = c.length > 0 && c.every((x) => Math.abs(x - c[0]) <= 1e-6 * Math.abs(c[0]));
  const means = [
    ["v_i", `the loss of example i.${losses.length ? ` In this batch from ${number(Math.min(...losses))} to ${number(Math.max(...losses))}.` : ""}`],
    ["∇v_i", "its gradient: for each weight, how much the loss of example i grows if the weight does."],
    ["c_i", isEqual ? `how much example i counts. Here ${term.counts ? `${number(c[0])} times its count` : fraction(c[0])} for each.` : `how much example i counts.${c.length ? ` Here from ${number(Math.min(...c))} to ${number(Math.max(...c))}.` : ""}`],
    ["Σ_i", "add up over all examples of the batch."],
    ["∇Ω", about.penalty.length ? `the gradient of the penalty, ${about.penalty.join(" and ")}: it keeps weights small.` : "the gradient of a penalty on large weights. There is none here."],
  ];
  return h("details", { class: "symbols" }, h("summary", {}, "The same as a formula"),
    h("p", { class: "equation", "aria-label": "update gradient equals the sum over all examples i of c i times the gradient of v i, plus the gradient of Omega" }, page.math("update gradient = Σ_i c_i ∇v_i + ∇Ω")),
    h("dl", {}, means.map(([symbol, meaning]) => h("div", {}, h("dt", {}, page.math(symbol)), h("dd", {}, meaning)))));
}

/** Where the numbers come from. */
function source() {
  const base = about.base === undefined ? null : `${about.base === null ? "starting from the first weights" : `starting from the checkpoint after ${counted(about.base, "update")}`}${about.replayed ? `, with ${counted(about.replayed, "update")} made again` : ""}`;
  const told = [about.model && `model ${about.model}`, about.weights && `${number(about.weights)} weights`, about.data && `data ${about.data}`, about.loss_name && `loss ${about.loss_name.replaceAll("_", " ")}`, about.clip, base];
  return h("p", { class: "told" }, told.filter(Boolean).join(" · "));
}

const canDraw = lost !== null && examples.size > 1 && examples.angles && cancelled.sum > 0;
add(document.getElementById("headline"), sentence());
add(document.getElementById("hero"),
  canDraw ? h("div", { class: "drawing" }, fan(), bars()) : null,
  h("dl", { class: "facts", id: "facts" }, facts().filter(Boolean)), source(), symbols());
