/* The run: curves, the examples that drove the run, its classes, its checkpoints. */

const { data, h, add, unpack, number, percent, cell, bar, table, scroll, why, select, chart, gallery, literal } = page;
const found = data.run;
const body = document.querySelector("#run .body");

function line(name, x, y, others = {}) {
  return { type: "scatter", mode: "lines", name, x, y, hovertemplate: "step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>", ...others };
}

/** A line where the update of this page is. */
const here = data.about.step === undefined ? [] : [{ type: "line", x0: data.about.step, x1: data.about.step, yref: "paper", y0: 0, y1: 1, line: { color: "--axis", dash: "dot", width: 1.5 } }];

function curve(title, unit, series, extra = {}) {
  const known = series.filter((one) => one.y.length > 0);
  if (Math.max(0, ...known.map((one) => one.y.length)) < 2) return h("div", { class: "card" }, h("h3", {}, title), why("fewer than two steps were recorded."));
  const last = known.map((one) => `${one.name} ends at ${number(Array.from(one.y).findLast(Number.isFinite))}`);
  return chart({
    title, summary: `${last.join("; ")}.`, traces: known, layout: { xaxis: { title: { text: page.stepAxis } }, shapes: here, yaxis: { title: { text: literal(unit) }, ...extra }, showlegend: known.length > 1 },
    numbers: () => ({ head: ["step", ...known.filter((one) => one.x === known[0].x).map((one) => one.name)], rows: Array.from(known[0].x, (x, k) => [String(x), ...known.filter((one) => one.x === known[0].x).map((one) => (Number.isNaN(one.y[k]) ? null : one.y[k]))]) }),
  });
}

function curves() {
  const of = found.curves;
  const x = Array.from(unpack(of.step));
  const values = (packed) => Array.from(unpack(packed));
  const dim = { line: { width: 1, color: "--fourth" } };
  const evaluated = (key) => {
    const rows = found.evaluations.filter((row) => Number.isFinite(row[key]));
    return [...new Set(rows.map((row) => row.split))].map((split) => {
      const some = rows.filter((row) => row.split === split);
      return line(split.replace("_", " "), some.map((row) => row.step), some.map((row) => row[key]), { mode: "lines+markers", marker: { size: 6, symbol: "diamond" }, line: { color: split === "held_out" ? "--against" : "--third" } });
    });
  };
  const average = of.averages.data_loss;
  const made = [
    curve(found.is_sum ? "Data loss per example" : "Data loss", "data loss, without penalty", [line("batch", x, values(of.data_loss), dim), average ? line("moving average", x, values(average), { line: { width: 2, color: "--accent" } }) : null, ...evaluated("data_loss")].filter(Boolean)),
    ...Object.keys(of.metrics).map((name) => curve(name[0].toUpperCase() + name.slice(1), name, [line("batch", x, values(of.metrics[name]), dim), ...evaluated(name)])),
  ];
  const parts = Object.keys(of.parts).filter((name) => of.averages[name] && values(of.averages[name]).some((x) => x > 0));
  const others = [
    parts.length > 1 ? curve("Parts of the loss, moving averages", "value", parts.map((name, k) => line(name === "data" ? "data loss" : name, x, values(of.averages[name]), { line: { color: ["--accent", "--against", "--third", "--fourth"][k % 4] } })), { type: "log", tickformat: "~g", dtick: page.logTick(parts.flatMap((name) => values(of.averages[name]))) }) : null,
    curve("Learning rate", "learning rate", [line("learning rate", x, values(of.lr), { line: { color: "--accent" } })], { rangemode: "tozero" }),
    curve("Time of a step", "seconds", [line("seconds", x, values(of.seconds), { line: { width: 1, color: "--accent" } })], { rangemode: "tozero" }),
  ].filter(Boolean);
  return [
    of.updates_a_point > 1 ? h("p", { class: "note" }, `Each point is the mean over ${of.updates_a_point} updates.`) : null,
    of.skipped.length ? h("p", { class: "note" }, `${of.skipped.length} of the updates were skipped, because their gradient was not finite.`) : null,
    h("p", { class: "note" }, `The dotted line is the step of this page.${found.is_sum ? " Sum adds up the losses of a batch. Here they are divided by the number of examples, so that a batch and the held-out data can be compared." : ""}`),
    h("div", { class: made.length > 1 ? "columns" : "" }, made),
    h("div", { class: `columns ${others.length === 3 ? "three" : ""}` }, others),
  ];
}

const NAMES = { norm: "gradient norm", loss: "data loss", share: "share of the update", forgetting: "times forgotten" };
const RATES = new Set(["share", "accuracy"]); // shown in per cent

function drivers() {
  const of = found.drivers;
  const holder = h("div");
  const keys = Object.keys(of.lists);
  const name = (k) => `example ${of.ids[k]}${of.labels ? `, class ${of.labels[k]}` : ""}`;
  const picture = gallery(of.pictures, name);
  const show = (at) => {
    const rows = of.lists[keys[at]];
    if (rows.why) {
      holder.replaceChildren(why(rows.why));
      return;
    }
    const names = Object.keys(rows[0]).filter((key) => key !== "example");
    holder.replaceChildren(scroll("Examples that drove the run", table(`The ${rows.length} with the largest ${NAMES[keys[at]] ?? keys[at]}. Numbers are means over all visits of an example, in all epochs`, [of.pictures?.kind === "texts" ? "input" : "picture", "example", of.labels ? "class" : null, ...names.map((one) => NAMES[one] ?? one)].filter(Boolean), rows.map((row) => {
      const k = of.ids.indexOf(row.example);
      return h("tr", {}, h("td", { class: "picture" }, picture(k)), h("th", { scope: "row" }, String(row.example)), of.labels ? h("td", {}, of.labels[k]) : null, names.map((key) => cell(row[key], RATES.has(key) ? percent : number)));
    })), "tall"));
  };
  show(0);
  return [select("Ordered by", keys.map((key) => NAMES[key] ?? key), show), holder];
}

function classes() {
  const of = found.classes;
  const over = of.over_training ? unpack(of.over_training.accuracy) : null;
  const num = of.names.length;
  const last = over ? Math.max(0, found.classes.over_training.epochs.indexOf(data.about.epoch)) : 0;
  const sample = of.held_out < of.of ? `${number(of.held_out)} of the ${number(of.of)} held-out examples` : `the ${number(of.of)} held-out examples`;
  const rows = of.names.map((name, k) => h("tr", {}, h("th", { scope: "row" }, name), cell(of.count[k]), h("td", { class: "n wide", "data-value": of.accuracy[k] ?? "" }, percent(of.accuracy[k]), bar(of.accuracy[k] ?? 0, "share")), cell(of.loss[k]), over ? cell(over[last * num + k], percent) : null));
  return [h("p", { class: "note" }, `Accuracy and data loss on ${sample}, by the weights before this update (epoch ${data.about.epoch + 1}).`), scroll("Classes", table("How each class fared", ["class", "examples", "accuracy", "data loss", over ? `accuracy in training, epoch ${of.over_training.epochs[last] + 1}` : null].filter(Boolean), rows))];
}

function kept() {
  const rows = found.checkpoints.map((one) => h("tr", {}, h("th", { scope: "row" }, one.checkpoint), h("td", {}, one.ok ? "every byte verifies" : `damaged: ${one.error}`), h("td", { class: "digest" }, one.digest ?? "–")));
  return rows.length ? scroll("Checkpoints", table("Checkpoints and their digests", ["checkpoint", "state", "digest"], rows, { class: "whole" })) : h("p", {}, "There is no checkpoint yet.");
}

const card = (title, content) => h("div", { class: "card" }, h("h3", {}, title), content);
add(body,
  found.curves ? curves() : why("no update has been recorded yet."),
  found.stopped ? h("p", { class: "note" }, `Stopped early: ${found.stopped}`) : null,
  h("div", { class: found.classes.why || found.drivers.why ? "stack" : "columns unequal" }, card("Examples that drove the run", found.drivers.why ? why(found.drivers.why) : drivers()), found.classes.why ? null : card("How each class fared", classes())),
  card("Checkpoints", kept()));
