/* Examples to look at, and maps of numbers as pixels. */

const { h, unpack, cell, table, scroll, opening, colour } = page;

/** A function from the place of an example to its picture: an image, or its text. */
function gallery(pictures, name) {
  if (!pictures) return () => null;
  if (pictures.kind === "texts") {
    return (i, large = false) => h("span", { class: large ? "text large" : "text", title: large ? null : pictures.texts[i] }, pictures.texts[i]);
  }
  const pixels = unpack(pictures.pixels);
  const [, height, width, channels] = pixels.shape;
  return (i, large = false) => {
    const canvas = h("canvas", { class: large ? "image large" : "image", width, height, role: "img", "aria-label": `Image of ${name(i)}` });
    const context = canvas.getContext("2d");
    const shown = context.createImageData(width, height);
    const first = i * height * width * channels;
    for (let p = 0; p < height * width; p += 1) {
      for (let c = 0; c < 3; c += 1) shown.data[4 * p + c] = pixels[first + p * channels + (channels === 3 ? c : 0)];
      shown.data[4 * p + 3] = 255;
    }
    context.putImageData(shown, 0, 0);
    return canvas;
  };
}

function rgb(name) {
  const found = colour(name).match(/[0-9a-f]{2}/gi);
  return found.map((one) => parseInt(one, 16));
}

function mixed(from, to, share) {
  return `rgb(${from.map((x, i) => Math.round(x + (to[i] - x) * share)).join(" ")})`;
}

/** A function from a number to a colour: from the surface to the accent, or to both sides of 0. */
function scale(values, isSigned) {
  const finite = Array.from(values).filter(Number.isFinite);
  const low = Math.min(...finite);
  const high = Math.max(...finite);
  const [surface, accent, against] = [rgb("map"), rgb("accent"), rgb("against")];
  const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return (x) => {
    if (!Number.isFinite(x)) return "transparent";
    if (isSigned) return mixed(surface, x < 0 ? against : accent, Math.abs(x) / most);
    return mixed(surface, accent, high > low ? (x - low) / (high - low) : 0);
  };
}

/**
 * A matrix as squares; `mark(context, side)` draws over it, `press(row, column)` gets clicks.
 * It is an image: what it shows is said by its label, and its numbers stand in a table.
 */
function map({ label, values, rows, columns, isSigned = false, mark = null, press = null, size = 240 }) {
  const side = Math.max(3, Math.floor(size / Math.max(rows, columns)));
  const canvas = h("canvas", { class: "map", width: columns * side, height: rows * side, role: "img", "aria-label": label });
  const paint = () => {
    const context = canvas.getContext("2d");
    const of = scale(values, isSigned);
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (let r = 0; r < rows; r += 1) {
      for (let c = 0; c < columns; c += 1) {
        context.fillStyle = of(values[r * columns + c]);
        context.fillRect(c * side, r * side, side, side);
      }
    }
    if (mark) mark(context, side);
  };
  paint();
  canvas.paint = paint;
  if (press) {
    canvas.classList.add("pressable");
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      press(Math.floor(((event.clientY - box.top) / box.height) * rows), Math.floor(((event.clientX - box.left) / box.width) * columns));
    });
  }
  return canvas;
}

/** A map in a figure, with a table of its numbers. */
function framed(title, given, note) {
  const { label, values, rows, columns } = given;
  const upTo = (size, made) => Array.from({ length: size }, (_, k) => made(k));
  const line = (r) => h("tr", {}, h("th", { scope: "row" }, `row ${r}`), upTo(columns, (c) => cell(values[r * columns + c])));
  const numbers = () => scroll(label, table(title, ["", ...upTo(columns, (c) => `column ${c}`)], upTo(rows, line)), "low");
  return h("figure", { class: "map" }, h("figcaption", {}, title), map(given), h("p", { class: "note" }, note), opening("Table of this map", numbers));
}

page.on("theme", () => document.querySelectorAll("canvas.map").forEach((one) => one.paint?.()));
Object.assign(page, { gallery, framed });
