// The panel: how the number of the cell shown comes about, written out as HTML.

const bracket = (x, text = full) => (x < 0 ? `(${text(x)})` : text(x));
const unbroken = (text) => text.replace(/ /g, "\u00a0");

const wording = (step, cell) => {
  if (isVector(step)) return `cell ${cell}`;
  const channel = step.planes > 1 ? `channel ${plane(step, cell)}, ` : "";
  return `${channel}row ${row(step, cell)}, column ${col(step, cell)}`;
};

function describe(step, cell, explained, pinned) {
  const badge = pinned ? '<span class="pinned">pinned</span>' : "";
  return `<h2>${escaped(step.name)}${badge}</h2>
    <p class="place">${wording(step, cell)}</p>
    <p class="result"><b id="value">${full(step.values[cell])}</b>${check(step, cell, explained)}</p>
    <p class="equation">${equation(step, cell, explained)}</p>
    ${explained.parts.map((part) => describePart(step, part)).join("")}`;
}

// Whether the sum worked out here is what the layer computed.
function check(step, cell, explained) {
  const { total } = explained;
  if (total === null || ["max", "relu"].includes(step.rule.name)) return "";
  const same = full(total) === full(step.values[cell]);
  if (!same && !agrees(step, cell, explained)) return `<small>the sum below gives ${full(total)}</small>`;
  const rounded = same ? "" : ", up to rounding";
  return `<small class="good">✓ the sum below gives the layer’s own number${rounded}</small>`;
}

// Of each rule: in words or symbols, then with this cell's numbers.
const EQUATIONS = {
  conv(e) {
    const sums = e.parts.map((part) => part.sum);
    const over = sums.length > 1 ? " over the channels" : "";
    let written = sums.map((sum, i) => (i ? signed(sum) : full(sum))).join("");
    if (sums.length > 8) {
      written = `${full(sums.reduce((a, b) => a + b))} <small>(${sums.length} channels)</small>`;
    } else if (sums.length === 1 && !hasBias(e)) {
      written = `sum of ${e.parts[0].values.length} products`;
    }
    const plus = hasBias(e) ? ", plus the bias" : "";
    return [`cells read × kernel, added up${over}${plus}`, written + bias(e)];
  },
  linear(e) {
    const [{ values, sum }] = e.parts;
    const written = hasBias(e) ? full(sum) + bias(e) : `sum of ${values.length} products`;
    return [`cells × weights, added up${hasBias(e) ? ", plus the bias" : ""}`, written];
  },
  max(e) {
    const [{ values, cells }] = e.parts;
    const inside = values.filter((_, i) => cells[i] >= 0);
    return ["the largest of the window", `max(${inside.map(full).join(", ")})`];
  },
  mean: (e) => ["sum ÷ count", `${full(e.sum)} ÷ ${e.count}`],
  average: (e) => ["sum ÷ count", `${full(e.sum)} ÷ ${e.count}`],
  relu: (e) => ["max(0, x)", `max(0, ${full(e.x)})`],
  norm(e) {
    const scale = e.gamma === null ? ["", ""] : [" × gamma", ` × ${bracket(e.gamma)}`];
    const shift = e.beta === null ? ["", ""] : [" + beta", signed(e.beta)];
    const normal = `(${full(e.x)} − ${bracket(e.mean)}) ÷ √(${full(e.variance)} + ${full(e.eps)})`;
    return [`(x − mean) ÷ √(variance + eps)${scale[0]}${shift[0]}`, normal + scale[1] + shift[1]];
  },
  add: (e) => ["both inputs added", full(e.values[0]) + signed(e.values[1])],
  softmax: (e) => [`exp(x − largest) ÷ sum of that over ${e.count} cells`,
    `exp(${full(e.x)}${signed(-e.largest)}) ÷ ${full(e.sum)}`],
  logSoftmax: (e) => [`x − largest − log of the sum of exp over ${e.count} cells`,
    `${full(e.x)}${signed(-e.largest)} − log ${full(e.sum)}`],
};

const hasBias = (e) => e.bias !== null && e.bias !== undefined;
const bias = (e) => (hasBias(e) ? `${signed(e.bias)} <small>(bias)</small>` : "");

function equation(step, cell, e) {
  const rule = step.rule.name;
  if (rule in EQUATIONS) {
    const [words, written] = EQUATIONS[rule](e);
    return `<em>${words}</em>${written} = <b id="total">${full(e.total)}</b>`;
  }
  if (rule === "input") return "A number of the input.";
  const read = reads(step, cell).flatMap((cells, i) => Array.from(cells, (from) => [step.from[i], from]));
  if (read.length === 0) return "A constant: it reads no cell.";
  const [source, from] = read[0];
  if (rule === "copy") return `The number of ${escaped(source.name)}, ${wording(source, from)}.`;
  const of = read.length === 1 ? full(source.values[from]) : `${read.length} cells`;
  return `${escaped(step.kind)} of ${of}`;
}

// The cells of one channel that are read, the weights that they meet, and what that adds up to.
function describePart(step, part) {
  const { cells, values, weights, sum } = part;
  const [input] = step.from;
  if (step.rule.name === "linear") return describeRow(input, part);
  const channel = input.planes > 1 ? `, channel ${part.channel}` : "";
  const heading = `<h3>${escaped(input.name)}${channel}</h3>`;
  const read = grid(part, values, (x) => colour(x, input.limit, input.grey), true);
  if (!weights) return `<div class="part">${heading}<div class="product">${read}</div></div>`;
  const kernel = grid(part, weights, (x) => colour(x, step.kernelLimit), false);
  const terms = range(values.length).filter((i) => cells[i] >= 0).map((i) => {
    return unbroken(`${bracket(values[i], short)} × ${bracket(weights[i], short)}`);
  });
  return `<div class="part">${heading}
    <div class="product">${read} × ${kernel} <span>= <b>${full(sum)}</b></span></div>
    <p class="terms">${terms.join(" + ")}</p></div>`;
}

function grid({ cells, width, winner }, numbers, colourOf, read) {
  const side = width === 4 || width === 5 ? 32 : 38; // so that a kernel stands beside its window
  const style = `--columns:${width};--side:${side}px;--size:${side < 38 ? 10 : 12}px`;
  const spans = Array.from(numbers, (x, i) => {
    if (read && cells[i] < 0) return '<span class="padding" title="padding">0</span>';
    const rgb = colourOf(x);
    const name = read && i === winner ? ' class="winner"' : "";
    return `<span${name} style="background:${css(rgb)};color:${inkOn(rgb)}">${short(x)}</span>`;
  });
  return `<div class="window${read ? " read" : ""}" style="${style}">${spans.join("")}</div>`;
}

// A linear layer's products, a line each; of many, those that are not 0.
function describeRow(input, { cells, values, weights }) {
  const kept = range(cells.length).filter((i) => cells.length <= 32 || values[i] !== 0);
  const left = cells.length - kept.length;
  const lines = kept.map((i) => {
    const numbers = [values[i], weights[i], values[i] * weights[i]];
    return `<tr><td>${cells[i]}</td>${numbers.map((x) => `<td>${full(x)}</td>`).join("")}</tr>`;
  });
  return `<div class="part">
    <h3>${escaped(input.name)} × weights${left ? `, ${left} cells that are 0 left out` : ""}</h3>
    <table><tr><th>cell</th><th>value</th><th>weight</th><th>product</th></tr>${lines.join("")}</table>
    </div>`;
}
