// Drawing: numbers as text and colours, where each cell is, and a step's canvas with its lights.
// One canvas a step holds all its channels; painting it again takes about a millisecond.

const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ---- numbers and colours

const minus = (text) => text.replace("e+", "e").replace(/-/g, "−");
const full = (x) => minus(String(Number(x.toPrecision(6))));
function short(x) {
  const size = Math.abs(x);
  if ((Number.isInteger(x) && size < 1000) || !Number.isFinite(x)) return minus(String(x));
  if (size < 0.005) return x.toExponential(0).replace(/^-/, "−");
  return minus(size < 9.995 ? x.toFixed(2) : size < 99.95 ? x.toFixed(1) : x.toPrecision(3));
}
// A term of a sum; the sign stays on the line of its number.
const signed = (x) => (x < 0 ? ` −\u00a0${full(-x)}` : ` +\u00a0${full(x)}`);

let theme;
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["card", "quiet", "zero", "above", "below", "direct", "earlier", "later", "cursor"];
  theme = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  theme.rgb = Object.fromEntries(names.map((name) => {
    const hex = parseInt(theme[name].slice(1), 16);
    return [name, [hex >> 16, (hex >> 8) & 255, hex & 255]];
  }));
  for (const step of steps) {
    step.rgb = Array.from(step.values, (x) => colour(x, step.limit, step.grey));
  }
}

// From the colour of zero to that of the largest number; the image is ink on paper.
function colour(x, limit, grey) {
  if (Number.isNaN(x)) return [255, 0, 255];
  const share = x === 0 ? 0 : Math.min(1, Math.abs(x) / limit);
  const { zero, above, below, cursor: ink } = theme.rgb;
  const end = grey ? ink : x < 0 ? below : above;
  return zero.map((from, i) => Math.round(from + (end[i] - from) * share));
}
const css = (rgb) => `rgb(${rgb.join()})`;
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000" : "#fff");

const largest = (values) => values.reduce(
  (most, x) => (Number.isFinite(x) && Math.abs(x) > most ? Math.abs(x) : most), 0);
for (const step of steps) {
  step.limit = largest(step.values);
  step.grey = step.index === 0 && step.values.every((x) => x >= 0);
  if (step.rule.name === "conv") step.kernelLimit = largest(step.rule.weight);
}

// ---- grids: where each cell is drawn

// A vector is broken into rows; channels stand side by side, as many as there is room for.
function arrange(step, room) {
  const { planes } = step, vector = isVector(step);
  const columns = vector ? vectorColumns(step) : step.cols;
  const lines = vector ? Math.ceil(step.cols / columns) : step.rows;
  const single = vector ? step.cols <= 16 : step.rows * step.cols === 1;
  const target = step.index === 0 ? 168 : planes > 12 ? 72 : planes > 4 ? 84 : 156;
  const most = planes > 12 ? 18 : 24;
  const side = single ? 38 : clamp(Math.floor(target / Math.max(lines, columns)), 2, most);
  const gap = 8, pad = 3;
  const cell = Math.max(1, Math.min(side, Math.floor((room - 2 * pad) / columns)));
  const label = planes > 1 ? 13 : 0;
  const fit = Math.max(1, Math.floor((room - 2 * pad + gap) / (columns * cell + gap)));
  let across = Math.min(planes, fit);
  if (across < planes) across = 2 ** Math.floor(Math.log2(across));
  return sized({ columns, lines, cell, gap, label, pad, across, planes });
}

// The same for the strip: all of it within 46 by 40.
function arrangeSmall(step) {
  const { columns, lines } = step.place, { planes } = step, gap = planes > 64 ? 0 : 2;
  const fits = range(planes).map((i) => {
    const across = i + 1, down = Math.ceil(planes / across);
    const cell = Math.min((46 - gap * (across - 1)) / (across * columns),
      (40 - gap * (down - 1)) / (down * lines), 8);
    return { cell, across };
  });
  const { cell, across } = fits.reduce((best, other) => (other.cell > best.cell ? other : best));
  return sized({ columns, lines, cell, gap, label: 0, pad: 1, across, planes });
}

function sized(place) {
  const { columns, lines, cell, gap, label, pad, across, planes } = place;
  place.width = across * (columns * cell + gap) - gap + 2 * pad;
  place.height = Math.ceil(planes / across) * (lines * cell + gap + label) - gap + 2 * pad;
  return place;
}

const isVector = (step) => step.planes === 1 && step.rows === 1;

// Of a long vector, rows of one length; of a flattened grid, whole rows of that.
function vectorColumns({ cols: count, from: [source] }) {
  if (count <= 16) return count;
  const fair = range(Math.ceil(2.5 * Math.sqrt(count))).filter((n) => n * n >= count && count % n === 0);
  const whole = fair.find((n) => source && n % source.cols === 0);
  return whole ?? fair[0] ?? Math.ceil(1.2 * Math.sqrt(count));
}

// The top left corner of a channel's grid.
function corner(place, p) {
  const { columns, lines, cell, gap, label, pad, across } = place;
  const down = Math.floor(p / across);
  return [(p % across) * (columns * cell + gap) + pad, down * (lines * cell + gap + label) + label + pad];
}

function position(step, place, cell) {
  const per = step.rows * step.cols;
  const p = Math.floor(cell / per), within = cell % per;
  const [x, y] = corner(place, p);
  return [x + (within % place.columns) * place.cell, y + Math.floor(within / place.columns) * place.cell];
}

// The cell at a point of the canvas, or -1.
function hit(step, place, left, top) {
  const x = left - place.pad, y = top - place.pad;
  const across = place.columns * place.cell + place.gap;
  const down = place.lines * place.cell + place.gap + place.label;
  const i = Math.floor(x / across), j = Math.floor(y / down);
  const col = Math.floor((x - i * across) / place.cell);
  const line = Math.floor((y - j * down - place.label) / place.cell);
  const p = j * place.across + i, within = line * place.columns + col;
  const inside = i >= 0 && i < place.across && col >= 0 && col < place.columns && line >= 0 &&
    line < place.lines && p < step.planes && within < step.rows * step.cols;
  return inside ? p * step.rows * step.cols + within : -1;
}

// ---- painting

// A canvas of a size on the screen, empty.
function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const size = [Math.ceil(width * ratio), Math.ceil(height * ratio)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) {
    [canvas.width, canvas.height] = size;
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// A picture of a pixel a cell, channels one below the other: cells that are not lit are faint, and
// with a tint those lit are in its colour.
function pixels(step, { columns, lines }, { cells = null, direct } = {}, tint = null) {
  const image = new ImageData(columns, lines * step.planes);
  for (let i = 0; i < step.values.length; i++) {
    const lit = !cells || cells[i];
    const share = tint && cells && lit ? (direct.has(i) ? 0.75 : 0.45) : 0;
    for (let c = 0; c < 3; c++) {
      image.data[4 * i + c] = step.rgb[i][c] * (1 - share) + (share ? tint[c] * share : 0);
    }
    image.data[4 * i + 3] = lit ? 255 : 72;
  }
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// `lights` has for a step: cells (not 0 where lit, null for no dimming), direct (the set of those
// that are read), later (true for dependents), winner and cursor (a cell).
function paint(canvas, step, place, lights, small) {
  const context = prepare(canvas, place.width, place.height);
  const { columns, lines, cell } = place, { cells = null, direct, later } = lights ?? {};
  const light = later ? "later" : "direct";
  const picture = pixels(step, place, lights ?? {}, small ? theme.rgb[light] : null);
  context.imageSmoothingEnabled = false;
  for (let p = 0; p < step.planes; p++) {
    const [x, y] = corner(place, p);
    context.drawImage(picture, 0, p * lines, columns, lines, x, y, columns * cell, lines * cell);
    frame(context, place, p, small);
  }
  if (!small && cell >= 30) numbers(context, step, place);
  if (!small && cells) {
    edges(context, step, place, (i) => cells[i], later ? theme.later : theme.earlier, 1.5, 0.25);
    edges(context, step, place, (i) => direct.has(i), "#000", 4, 1);
    edges(context, step, place, (i) => direct.has(i), theme[light], 2, 1);
  }
  if (!small && lights?.winner >= 0) spot(context, step, place, lights.winner);
  if (lights?.cursor >= 0) mark(context, step, place, lights.cursor, small);
}

function numbers(context, step, place) {
  Object.assign(context, { font: "11px system-ui, sans-serif", textAlign: "center" });
  step.values.forEach((value, i) => {
    const [x, y] = position(step, place, i);
    context.fillStyle = inkOn(step.rgb[i]);
    context.fillText(short(value), x + place.cell / 2, y + place.cell / 2 + 4);
  });
}

function frame(context, place, p, small) {
  const [x, y] = corner(place, p);
  context.strokeStyle = theme.quiet;
  context.globalAlpha = 0.45;
  context.lineWidth = small ? 0.5 : 1;
  context.strokeRect(x + 0.5, y + 0.5, place.columns * place.cell - 1, place.lines * place.cell - 1);
  context.globalAlpha = 1;
  if (place.label) {
    context.fillStyle = theme.quiet;
    context.font = "10px system-ui, sans-serif";
    context.textAlign = "left";
    context.fillText(p, x, y - 3);
  }
}

// The outline of a set of cells, `out` pixels around it.
function edges(context, step, place, within, style, width, out) {
  const { cell, columns } = place, per = step.rows * step.cols;
  context.beginPath();
  const line = (x1, y1, x2, y2) => { context.moveTo(x1, y1); context.lineTo(x2, y2); };
  for (let i = 0; i < step.values.length; i++) {
    if (!within(i)) continue;
    const at = i % per, column = at % columns;
    const left = column === 0 || !within(i - 1);
    const right = column === columns - 1 || at === per - 1 || !within(i + 1);
    const top = at < columns || !within(i - columns);
    const bottom = at + columns >= per || !within(i + columns);
    if (!(left || right || top || bottom)) continue;
    const [x, y] = position(step, place, i);
    const x1 = x - out, x2 = x + cell + out, y1 = y - out, y2 = y + cell + out;
    if (left) line(x1, top ? y1 : y, x1, bottom ? y2 : y + cell);
    if (right) line(x2, top ? y1 : y, x2, bottom ? y2 : y + cell);
    if (top) line(left ? x1 : x, y1, right ? x2 : x + cell, y1);
    if (bottom) line(left ? x1 : x, y2, right ? x2 : x + cell, y2);
  }
  Object.assign(context, { strokeStyle: style, lineWidth: width, lineCap: "square" });
  context.stroke();
}

function mark(context, step, place, i, small) {
  const [x, y] = position(step, place, i), side = place.cell;
  const width = small ? 1 : 2;
  for (const [style, lineWidth] of [[theme.card, width + 2], [theme.cursor, width]]) {
    Object.assign(context, { strokeStyle: style, lineWidth });
    context.strokeRect(x - 0.5, y - 0.5, side + 1, side + 1);
  }
}

function spot(context, step, place, i) {
  const [x, y] = position(step, place, i), { cell } = place;
  context.beginPath();
  context.arc(x + cell / 2, y + cell / 2, Math.max(1.5, 0.22 * cell), 0, 7);
  Object.assign(context, { fillStyle: theme.direct, strokeStyle: "#000", lineWidth: 1 });
  context.fill();
  context.stroke();
}

// Kernels, one for each channel read: all of them, by channel of the output, where they are few;
// of many, those of the channel shown.
function arrangeKernels({ rule: { weightShape: [filters, channels, height, width] } }, room) {
  const all = filters * channels <= 32;
  const cell = all ? clamp(Math.floor(38 / Math.max(width, height)), 4, 12) : 6;
  const gap = all ? 9 : 6, pitch = [width * cell + gap, height * cell + gap];
  const label = all ? 13 : 0;
  const perRow = Math.min(channels, Math.max(1, Math.floor((room - 4) / pitch[0])));
  const group = [perRow * pitch[0] + 4, Math.ceil(channels / perRow) * pitch[1] + label];
  const count = all ? filters : 1;
  const across = clamp(Math.floor((room * 0.4) / group[0]), 1, Math.ceil(count / 2));
  return { all, cell, pitch, label, perRow, group, across,
    width: across * group[0], height: Math.ceil(count / across) * group[1] + 2 };
}

function paintKernels(step, filter, isShown) {
  const { kernels: { canvas, caption, place }, rule: { weight, weightShape } } = step;
  const [filters, channels, height, width] = weightShape;
  const { all, cell, pitch, label, perRow, group, across } = place;
  const context = prepare(canvas, place.width, place.height);
  (all ? range(filters) : [filter]).forEach((k, i) => {
    const left = (i % across) * group[0] + 3, top = Math.floor(i / across) * group[1] + label + 3;
    const current = k === filter && all && isShown;
    range(channels).forEach((c) => {
      const x = left + (c % perRow) * pitch[0], y = top + Math.floor(c / perRow) * pitch[1];
      range(height * width).forEach((tap) => {
        const at = (k * channels + c) * height * width + tap;
        context.fillStyle = css(colour(weight[at], step.kernelLimit));
        context.fillRect(x + (tap % width) * cell, y + Math.floor(tap / width) * cell, cell, cell);
      });
      const out = current ? 1 : 0;
      for (const [style, line] of current ? [["#000", 4], [theme.direct, 2]] : [[theme.quiet, 0.5]]) {
        Object.assign(context, { strokeStyle: style, lineWidth: line });
        context.strokeRect(x - out, y - out, width * cell + 2 * out, height * cell + 2 * out);
      }
    });
    Object.assign(context, { fillStyle: theme.quiet, font: "10px system-ui, sans-serif" });
    if (all) context.fillText(k, left, top - 5);
  });
  caption.textContent = all ? "kernels" : `kernels of channel ${filter}, one for each channel it reads`;
}

