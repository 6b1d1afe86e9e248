/* The first k examples against the whole batch: how long their mean gradient is, and where it points. */

const { data, h, svg, add, unpack, number, percent, counted, chart } = page;
const SIDE = 220; // pixels of the drawing
const found = data.stages.firsts;

/** An arrow from one point, as a line with a tip. */
function arrow(kind, from, to) {
  const [dx, dy] = [to[0] - from[0], to[1] - from[1]];
  const length = Math.hypot(dx, dy) || 1;
  const size = Math.min(11, 0.6 * length);
  const [ux, uy] = [dx / length, dy / length];
  const neck = [to[0] - ux * size, to[1] - uy * size];
  const point = (side) => `${neck[0] - uy * side * size * 0.45} ${neck[1] + ux * side * size * 0.45}`;
  return [svg("line", { class: kind, x1: from[0], y1: from[1], x2: neck[0], y2: neck[1] }), svg("path", { class: `tip ${kind}`, d: `M ${to[0]} ${to[1]} L ${point(1)} L ${point(-1)} z` })];
}

/** Both gradients in the plane that they span; the dashed line is the distance of their tips. */
function draw(ratio, angle) {
  const [sideways, up] = [ratio * Math.sin((angle * Math.PI) / 180), ratio * Math.cos((angle * Math.PI) / 180)];
  const [low, high, right] = [Math.min(0, up), Math.max(1, up), Math.max(sideways, 0.3)];
  const scale = (SIDE - 24) / Math.max(high - low, right);
  const place = (x, y) => [16 + x * scale, 12 + (high - y) * scale];
  const [start, whole, part] = [place(0, 0), place(0, 1), place(sideways, up)];
  const label = `The gradient of these examples is ${number(ratio)} times as long as that of the batch, at ${number(angle)} degrees to it.`;
  return svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, role: "img", "aria-label": label },
    svg("line", { class: "apart", x1: whole[0], y1: whole[1], x2: part[0], y2: part[1] }), arrow("sum", start, whole), arrow("part", start, part));
}

function makeFirsts(size) {
  if (!found || size < 3) return null;
  const [ratios, angles, distances] = [unpack(found.ratios), unpack(found.angles), unpack(found.distances)];
  const k = Array.from(ratios, (_, i) => i + 1);
  const read = h("p", { role: "status", id: "firsts-text" });
  const picture = h("div", { class: "drawn" });
  const input = h("input", { type: "range", min: 1, max: size, value: Math.max(1, Math.round(size / 4)), oninput: show });
  function show() {
    const at = Number(input.value) - 1;
    picture.replaceChildren();
    if (!Number.isFinite(angles[at])) {
      read.textContent = `The first ${counted(at + 1, "example")} of ${number(size)} have no gradient.`;
      return;
    }
    add(picture, draw(ratios[at], angles[at]));
    read.textContent = at + 1 === size ? `All ${number(size)} examples: this is the gradient of the batch.` : `The first ${at + 1} of ${counted(size, "example")}: their mean gradient is ${number(Number(ratios[at].toPrecision(2)))} times as long as that of the batch and points ${page.degrees(Math.round(angles[at]))} away from it. From tip to tip it is ${percent(Number(distances[at].toPrecision(2)))} of the length of the batch gradient.`;
  }
  show();
  const ends = (axis) => ({ rangemode: "tozero", ...axis });
  return h("div", { class: "firsts card" }, h("h3", {}, "A part of the batch against the whole"),
    h("label", { class: "field" }, h("span", {}, "Examples, from the first"), input),
    h("div", { class: "beside" }, picture, add(h("div", { class: "stack" }), read, h("p", { class: "note" }, h("span", { class: "key" }, "Thin arrow"), ": mean gradient of these examples. Thick arrow: that of the whole batch. Dashed: how far apart they are."))),
    chart({
      title: "How far a part is from the whole", summary: `One example is ${percent(distances[0])} away, half of the batch ${percent(distances[Math.floor(size / 2) - 1])}.`,
      traces: [
        { type: "scatter", mode: "lines", name: "distance, % of the gradient", x: k, y: Array.from(distances, (x) => 100 * x), line: { color: "--accent", width: 2 } },
        { type: "scatter", mode: "lines", name: "angle, degrees", x: k, y: Array.from(angles), yaxis: "y2", line: { color: "--against", dash: "dash" } }],
      layout: { height: 250, xaxis: { title: { text: "examples" } }, yaxis: ends({ title: { text: "distance, %" } }), yaxis2: ends({ title: { text: "angle, degrees", font: { size: 12 } }, overlaying: "y", side: "right", tickmode: "auto", showgrid: false, automargin: true, linecolor: "--axis" }) },
      numbers: () => ({ head: ["examples", "distance, %", "angle, degrees", "length against the batch"], rows: k.map((n, i) => [String(n), 100 * distances[i], angles[i], ratios[i]]) }),
    }));
}

Object.assign(page, { makeFirsts });
