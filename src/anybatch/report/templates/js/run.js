/* Section 6: curves, the examples that drove the run, its classes, its checkpoints. */

const { data, h, add, unpack, number, percent, cell, bar, table, scroll, why, select, chart, gallery, literal } = page;
const found = data.run;
const body = document.querySelector("#run .body");

function line(name, x, y, others = {}) {
  return { type: "scatter", mode: "lines", name, x, y, hovertemplate: "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>", ...others };
}

function curve(title, unit, series, extra = {}) {
  const known = series.filter((one) => one.y.length);
  const last = known.map((one) => `${one.name} ends at ${number(Array.from(one.y).findLast(Number.isFinite))}`);
  return chart({
    title, summary: `${last.join("; ")}.`, traces: known, layout: { xaxis: { title: { text: "step" } }, yaxis: { title: { text: literal(unit) }, ...extra }, showlegend: known.length > 1 },
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
      return line(`${key}, ${split.replace("_", " ")}`, some.map((row) => row.step), some.map((row) => row[key]), { mode: "lines+markers", marker: { size: 6, symbol: "diamond" }, line: { color: split === "held_out" ? "--against" : "--third" } });
    });
  };
  const names = Object.keys(of.parts);
  const made = [
    curve("Loss", "loss", [line("loss", x, values(of.loss), dim), of.averages.loss ? line("moving average", x, values(of.averages.loss), { line: { width: 2, color: "--accent" } }) : null, ...evaluated("loss")].filter(Boolean)),
    ...Object.keys(of.metrics).map((name) => curve(name[0].toUpperCase() + name.slice(1), name, [line(`${name}, batch`, x, values(of.metrics[name]), dim), ...evaluated(name)])),
  ];
  const others = [
    names.length > 1 ? curve("Parts of the loss, moving averages", "loss", names.filter((name) => of.averages[name]).map((name, k) => line(name, x, values(of.averages[name]), { line: { color: ["--accent", "--against", "--third", "--fourth"][k % 4] } })), { type: "log" }) : null,
    curve("Learning rate", "rate", [line("learning rate", x, values(of.lr), { line: { color: "--accent" } })], { rangemode: "tozero" }),
    curve("Time of a step", "seconds", [line("seconds", x, values(of.seconds), { line: { width: 1, color: "--accent" } })], { rangemode: "tozero" }),
  ];
  return [
    of.updates_a_point > 1 ? h("p", { class: "note" }, `Each point is the mean over ${of.updates_a_point} updates.`) : null,
    of.skipped.length ? h("p", { class: "note" }, `${of.skipped.length} updates were skipped, since their gradient was not finite.`) : null,
    h("div", { class: made.length > 1 ? "columns" : "" }, made),
    h("div", { class: "columns three" }, others.filter(Boolean)),
  ];
}

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
    holder.replaceChildren(scroll("Examples that drove the run", table(`The ${rows.length} with the largest ${keys[at]}, means over their visits`, ["picture", "example", of.labels ? "class" : null, ...names].filter(Boolean), rows.map((row) => {
      const k = of.ids.indexOf(row.example);
      return h("tr", {}, h("td", { class: "picture" }, picture(k)), h("th", { scope: "row" }, String(row.example)), of.labels ? h("td", {}, of.labels[k]) : null, names.map((key) => cell(row[key])));
    }))));
  };
  show(0);
  return [select("By", keys, show), holder];
}

function classes() {
  const of = found.classes;
  const over = of.over_training ? unpack(of.over_training.accuracy) : null;
  const num = of.names.length;
  const last = over ? over.length / num - 1 : 0;
  const sample = of.held_out < of.of ? `${number(of.held_out)} of the ${number(of.of)} held-out examples` : `the ${number(of.of)} held-out examples`;
  const rows = of.names.map((name, k) => h("tr", {}, h("th", { scope: "row" }, name), cell(of.count[k]), h("td", { class: "n wide", "data-value": of.accuracy[k] ?? "" }, percent(of.accuracy[k]), bar(of.accuracy[k] ?? 0, "share")), cell(of.loss[k]), over ? cell(over[last * num + k], percent) : null));
  return [h("p", { class: "note" }, `On ${sample}, by the weights before this update.`), scroll("Classes", table("How each class fared", ["class", "examples", "accuracy", "loss", over ? `training, epoch ${of.over_training.epochs[last] + 1}` : null].filter(Boolean), rows))];
}

function kept() {
  const rows = found.checkpoints.map((one) => h("tr", {}, h("th", { scope: "row" }, one.checkpoint), h("td", {}, one.ok ? "every byte verifies" : `damaged: ${one.error}`), h("td", { class: "digest" }, one.digest ?? "–")));
  return rows.length ? scroll("Checkpoints", table("Checkpoints and their digests", ["checkpoint", "state", "digest"], rows)) : why("There is no checkpoint yet.");
}

if (found.why) {
  add(body, why(found.why));
} else {
  const card = (title, content) => h("div", { class: "card" }, h("h3", {}, title), content);
  add(body,
    found.curves ? curves() : why("No update has been recorded yet."),
    found.stopped ? h("p", { class: "note" }, `Stopped early: ${found.stopped}`) : null,
    h("div", { class: "columns unequal" }, card("Examples that drove it", found.drivers.why ? why(found.drivers.why) : drivers()), card("How each class fared", found.classes.why ? why(found.classes.why) : classes())),
    card("What is kept", kept()));
}
