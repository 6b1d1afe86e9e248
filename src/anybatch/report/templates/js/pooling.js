/* Through max-pooling: input, activations, winners of each window, and the gradient that arrives. */

const { data, h, add, unpack, number, percent, table, scroll, select, framed, counted, examples } = page;
const found = data.pooling;
const body = document.querySelector("#pooling .body");

add(body, explorer());

/** How many windows have more than one largest input, and which of these wins. */
function ties() {
  const all = found.layers.map((one) => ({ ...one.ties, name: one.layer }));
  const [tied, first] = ["tied", "first"].map((key) => all.reduce((sum, one) => sum + one[key], 0));
  const each = all.map((one) => [`${one.name}: `, h("strong", { "data-value": one.tied / one.windows, class: "ties" }, percent(one.tied / one.windows)), ` of ${counted(one.windows, "window")}, with ${percent(one.gradient)} of the gradient. `]);
  const rule = first === tied ? "PyTorch gives the whole gradient to the first of them, by rows from left to right. It did so in every one of these windows." : `In ${percent(first / tied)} of these windows the first of them won, by rows from left to right.`;
  return h("div", { class: "card", id: "ties" }, h("h3", {}, "Windows with more than one largest input"), h("div", { class: "columns" }, h("div", { class: "stack" }, each.map((one) => h("p", {}, one)), tied ? h("p", {}, `In such a window several inputs are equal, and one must win. ${rule}`) : null),
    tied ? h("div", { class: "stack" }, h("p", {}, `Where a picture is blank, all inputs of a window are equal. So the dots there, and the counts over the whole batch below, stand in even rows, like the teeth of a comb, at the first place of each window. That is a rule of the program and says nothing about the data.`)) : null));
}

function explorer() {
  const layers = found.layers.map((one) => ({ ...one, inputs: unpack(one.inputs), winners: unpack(one.winners), gradients: unpack(one.gradients), maxima: unpack(one.maxima), tied: unpack(one.tied), chosen: unpack(one.chosen), reached: unpack(one.reached) }));
  const state = { layer: 0, example: first(0), channel: 0, row: 0, column: 0 };
  const controls = h("div", { class: "controls" });
  const maps = h("div", { class: "maps" });
  const inspector = h("div", { class: "card", "aria-live": "polite", id: "window" });
  const overBatch = h("div", { class: "card" });

  /** The example with the largest share of those that are kept. */
  function first(k) {
    const { places } = layers[k];
    if (!examples.share) return 0;
    return places.reduce((best, i, at) => (Math.abs(examples.share[i]) > Math.abs(examples.share[places[best]]) ? at : best), 0);
  }

  /** What is shown: planes of the example and channel at hand. */
  function planes() {
    const layer = layers[state.layer];
    const [, channels, height, width] = layer.inputs.shape;
    const [, , rows, columns] = layer.winners.shape;
    const at = state.example * channels + state.channel;
    const input = layer.inputs.subarray(at * height * width, (at + 1) * height * width);
    const winners = layer.winners.subarray(at * rows * columns, (at + 1) * rows * columns);
    const maxima = layer.maxima.subarray(at * rows * columns, (at + 1) * rows * columns);
    const tied = layer.tied.subarray(at * height * width, (at + 1) * height * width);
    const arriving = layer.gradients.subarray(at * rows * columns, (at + 1) * rows * columns);
    const routed = new Float64Array(height * width);
    for (let k = 0; k < winners.length; k += 1) routed[winners[k]] += arriving[k];
    return { layer, height, width, rows, columns, input, winners, maxima, tied, arriving, routed };
  }

  /** Inputs of a window that lie in the plane: [row, column]. */
  function inside({ layer, height, width }, r, c) {
    const of = (index, axis, size) => Array.from({ length: layer.kernel[axis] }, (_, k) => index * layer.stride[axis] - layer.padding[axis] + k * layer.dilation[axis]).filter((x) => x >= 0 && x < size);
    return [of(r, 0, height), of(c, 1, width)];
  }

  function marks(one, side, context) {
    const strong = getComputedStyle(document.documentElement).getPropertyValue("--text");
    context.fillStyle = strong;
    context.strokeStyle = strong;
    context.lineWidth = 1;
    const won = new Set(one.winners);
    (one.winners.length ? one.tied : []).forEach((isTied, n) => {
      if (!isTied || won.has(n)) return;
      context.beginPath();
      context.arc(((n % one.width) + 0.5) * side, (Math.floor(n / one.width) + 0.5) * side, Math.max(1.2, side / 6), 0, 7);
      context.stroke();
    });
    for (const winner of one.winners) {
      context.beginPath();
      context.arc(((winner % one.width) + 0.5) * side, (Math.floor(winner / one.width) + 0.5) * side, Math.max(1.2, side / 6), 0, 7);
      context.fill();
    }
    const [rows, columns] = inside(one, state.row, state.column);
    context.strokeStyle = strong;
    context.lineWidth = 2;
    context.strokeRect(columns[0] * side, rows[0] * side, (columns.at(-1) - columns[0] + 1) * side, (rows.at(-1) - rows[0] + 1) * side);
  }

  function toWindow(one, r, c) {
    const clamp = (x, most) => Math.max(0, Math.min(most - 1, x));
    state.row = clamp(Math.floor((r + one.layer.padding[0]) / one.layer.stride[0]), one.rows);
    state.column = clamp(Math.floor((c + one.layer.padding[1]) / one.layer.stride[1]), one.columns);
    control();
    show();
  }

  function range(label, key, size) {
    const output = h("output", {}, String(state[key]));
    const input = h("input", { type: "range", "aria-label": label, min: 0, max: size - 1, value: state[key], oninput: () => { state[key] = Number(input.value); output.textContent = input.value; show(); } });
    return h("label", { class: "field" }, h("span", {}, label, " ", output), input);
  }

  function control() {
    const layer = layers[state.layer];
    const one = planes();
    const again = (change) => { change(); Object.assign(state, { row: 0, column: 0 }); atLargest(); control(); show(); };
    controls.replaceChildren();
    add(controls,
      layers.length > 1 ? select("Layer", layers.map((x) => x.layer), (k) => again(() => Object.assign(state, { layer: k, example: first(k), channel: 0 })), state.layer) : null,
      select("Example", layer.places.map((i) => examples.nameOf(i)), (k) => again(() => { state.example = k; }), state.example),
      select("Channel", layer.channels.map((k) => `channel ${k}`), (k) => again(() => { state.channel = k; }), state.channel),
      range("Window, row", "row", one.rows), range("Window, column", "column", one.columns));
  }

  /** Begin at the window that gets the most gradient. */
  function atLargest() {
    const { arriving, columns } = planes();
    let best = 0;
    arriving.forEach((x, k) => { if (Math.abs(x) > Math.abs(arriving[best])) best = k; });
    Object.assign(state, { row: Math.floor(best / columns), column: best % columns });
  }

  function show() {
    const one = planes();
    const { layer, height, width, rows, columns } = one;
    const i = layer.places[state.example];
    const press = (r, c) => toWindow(one, r, c);
    const mark = (context, side) => marks(one, side, context);
    const num = one.routed.filter((x) => x !== 0).length;
    const outer = Array.from(one.arriving);
    maps.replaceChildren();
    add(maps,
      h("figure", { class: "map" }, h("figcaption", {}, "Input of the model"), h("div", { class: "holder" }, examples.picture(i, true)), h("p", { class: "note" }, examples.nameOf(i))),
      framed(`Activations before ${layer.layer}`, { label: `Activations of channel ${layer.channels[state.channel]}, ${height} by ${width}, with a dot on each winner; choose a window by the sliders`, values: one.input, rows: height, columns: width, mark, press }, `A dot is the largest input of its window.${one.tied.some((x) => x) ? " A ring is just as large, but did not win." : ""} The frame is the window below.`),
      framed("Gradient that arrives at each window", { label: `Gradient at the ${rows} by ${columns} windows`, values: outer, rows, columns, isSigned: true, press: (r, c) => { Object.assign(state, { row: r, column: c }); control(); show(); } }, `From ${number(Math.min(...outer))} to ${number(Math.max(...outer))}.`),
      framed("Where it goes", { label: `Gradient at the ${height} by ${width} inputs: ${num} of ${height * width} get any`, values: one.routed, rows: height, columns: width, isSigned: true, mark: (context, side) => marks({ ...one, winners: [] }, side, context), press }, `${num} of ${height * width} inputs get a gradient.`));
    const plane = height * width;
    const part = (values) => values.subarray(state.channel * plane, (state.channel + 1) * plane);
    const [chosen, reached] = [part(layer.chosen), part(layer.reached)];
    inspect(one, chosen);
    const tally = (title, label, values) => framed(title, { label, values, rows: height, columns: width, press, size: 200, mark: (context, side) => marks({ ...one, winners: [] }, side, context) }, `From ${Math.min(...values)} to ${Math.max(...values)} of ${counted(examples.size, "example")}.`);
    overBatch.replaceChildren();
    add(overBatch, h("h3", {}, "Over the whole batch"),
      h("p", {}, "Different examples have different winners, so over a batch many inputs of a window get a gradient. No example splits its own."),
      h("div", { class: "maps" }, tally("Examples where it won", "Number of examples for which an input won a window", chosen), tally("Examples that sent a gradient", "Number of examples whose gradient reached an input", reached)));
  }

  /** The window at hand: its inputs, what each gets, and how often each won over the batch. */
  function inspect(one, chosen) {
    const k = state.row * one.columns + state.column;
    const winner = one.winners[k];
    const [rows, columns] = inside(one, state.row, state.column);
    const body = rows.map((r) => h("tr", {}, h("th", { scope: "row" }, `row ${r}`), columns.map((c) => {
      const isWinner = r * one.width + c === winner;
      const isTied = one.maxima[k] > 1 && !isWinner && one.tied[r * one.width + c] === 1 && one.input[r * one.width + c] === one.input[winner];
      return h("td", { class: isWinner ? "n winner" : "n", "data-value": one.input[r * one.width + c] }, number(one.input[r * one.width + c], 3), isWinner ? h("span", { class: "tag" }, "wins") : isTied ? h("span", { class: "tag" }, "as large") : null, h("br"), h("span", { class: "note" }, `gets ${isWinner ? number(one.arriving[k]) : 0}`), h("br"), h("span", { class: "note" }, `won in ${chosen[r * one.width + c]} of ${examples.size}`));
    })));
    inspector.replaceChildren();
    add(inspector, h("h3", {}, `The window at row ${state.row}, column ${state.column}, for ${examples.nameOf(one.layer.places[state.example])}`),
      h("p", {}, "The gradient ", h("strong", { "data-value": one.arriving[k], id: "arriving" }, number(one.arriving[k])), ` goes to the largest input alone, at row ${Math.floor(winner / one.width)}, column ${winner % one.width}.${one.maxima[k] > 1 ? ` ${one.maxima[k]} of its inputs are the largest, all equal; it is one of them.` : ""}`),
      scroll("The inputs of this window", table("Its inputs: value, gradient from this window, and number of examples where it won a window", ["", ...columns.map((c) => `column ${c}`)], body)));
  }

  atLargest();
  control();
  show();
  const isCut = layers.some((layer) => layer.places.length < examples.size || layer.channels.length < layer.num_channels);
  const halves = found.layers.filter((layer) => layer.inputs.dtype === "f2").map((layer) => layer.layer);
  return [
    isCut ? h("p", { class: "note" }, `This file holds the channels that most gradient passes through and the examples with the ${examples.share ? "largest share" : "most gradient"}: ${layers.map((layer) => `${layer.channels.length} of ${layer.num_channels} channels and ${layer.places.length} of ${examples.size} examples of ${layer.layer}`).join(", ")}. Counts over the batch include all examples.`) : null,
    halves.length ? h("p", { class: "note" }, `Activations are rounded to half precision${halves.length < layers.length ? `: those of ${halves.join(", ")}` : ""}.`) : null,
    ties(), controls, maps, h("div", { class: "columns level" }, inspector, overBatch),
  ];
}
