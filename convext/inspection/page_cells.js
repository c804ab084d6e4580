// What the network computed, and which cells each operation joins. No drawing here.
//
// A cell is a number: its place in its step's flat array of values. A unit is a set of outputs
// that read the same cells: one place of a convolution's grid in all channels of a group, one
// window of a pool, one row of a linear layer.

const ARRAYS = { f4: Float32Array, f8: Float64Array, i4: Int32Array };

function decode(key, value) {
  const type = value && typeof value === "object" && Object.keys(value)[0];
  if (!(type in ARRAYS)) return value;
  const bytes = Uint8Array.from(atob(value[type]), (c) => c.charCodeAt(0));
  return new ARRAYS[type](bytes.buffer);
}

const steps = JSON.parse(document.getElementById("data").textContent, decode);
steps.forEach((step, index) => {
  const { shape } = step;
  step.index = index;
  step.rows = shape.length > 1 ? shape[shape.length - 2] : 1;
  step.cols = shape[shape.length - 1];
  step.planes = step.values.length / (step.rows * step.cols);
  step.from = step.sources.map((source) => steps[source]);
});

const product = (sizes) => sizes.reduce((a, b) => a * b, 1);
const range = (count) => Array.from({ length: count }, (_, i) => i);
const plane = (step, cell) => Math.floor(cell / (step.rows * step.cols));
const row = (step, cell) => Math.floor(cell / step.cols) % step.rows;
const col = (step, cell) => cell % step.cols;
const cellAt = (step, p, y, x) => (p * step.rows + y) * step.cols + x;

// The window of a convolution or pool that gives one place of the output: rows and columns of
// the input in the kernel's order, those in the padding with inside: false.
function windowAt({ rule, from: [input] }, y, x) {
  const { kernel, stride, padding, dilation } = rule;
  return range(product(kernel)).map((tap) => {
    const row = y * stride[0] - padding[0] + Math.floor(tap / kernel[1]) * dilation[0];
    const col = x * stride[1] - padding[1] + (tap % kernel[1]) * dilation[1];
    const inside = row >= 0 && row < input.rows && col >= 0 && col < input.cols;
    return { tap, row, col, inside };
  });
}

function convUnits(step) {
  const { rule: { groups, weightShape: [filters, channels] }, from: [input] } = step;
  return range(groups).flatMap((group) =>
    range(step.rows * step.cols).map((place) => {
      const y = Math.floor(place / step.cols), x = place % step.cols;
      const taps = windowAt(step, y, x).filter((tap) => tap.inside);
      const first = (group * filters) / groups;
      return {
        outputs: range(filters / groups).map((k) => cellAt(step, first + k, y, x)),
        inputs: [range(channels).flatMap((c) =>
          taps.map((tap) => cellAt(input, group * channels + c, tap.row, tap.col)))],
      };
    }));
}

function poolUnits(step) {
  const [input] = step.from;
  return range(step.values.length).map((cell) => ({
    outputs: [cell],
    inputs: [windowAt(step, row(step, cell), col(step, cell))
      .filter((tap) => tap.inside)
      .map((tap) => cellAt(input, plane(step, cell), tap.row, tap.col))],
  }));
}

const UNITS = {
  input: (step) => range(step.values.length).map((cell) => ({ outputs: [cell], inputs: [] })),
  same: (step) => range(step.values.length).map((cell) => (
    { outputs: [cell], inputs: step.from.map(() => [cell]) })),
  moved: (step) => range(step.values.length).map((cell) => (
    { outputs: [cell], inputs: step.joins.from.map((to) => (to[cell] < 0 ? [] : [to[cell]])) })),
  units: (step) => step.joins.units.map(([outputs, ...inputs]) => ({ outputs, inputs })),
  conv: convUnits,
  pool: poolUnits,
};

// The units of a step, worked out once, when first asked for.
function units(step) {
  if (!step.units) {
    step.units = UNITS[step.joins.how](step);
    step.unitOf = new Int32Array(step.values.length);
    step.units.forEach((unit, i) => unit.outputs.forEach((cell) => { step.unitOf[cell] = i; }));
  }
  return step.units;
}

// The cells that one cell reads, by source.
const reads = (step, cell) => units(step)[step.unitOf[cell]].inputs;

// Every cell of each earlier step that a cell depends on: a Uint8Array a step.
function precedents(step, cell) {
  const reached = steps.slice(0, step.index + 1).map((s) => new Uint8Array(s.values.length));
  reached[step.index][cell] = 1;
  for (let index = step.index; index > 0; index--) {
    if (!reached[index].includes(1)) continue;
    const current = steps[index];
    for (const unit of units(current)) {
      if (!unit.outputs.some((output) => reached[index][output])) continue;
      unit.inputs.forEach((cells, i) => {
        for (const input of cells) reached[current.sources[i]][input] = 1;
      });
    }
  }
  return reached;
}

// Every cell of each later step that depends on a cell; indexed as `steps` is.
function dependents(step, cell) {
  const reached = steps.map((s) => new Uint8Array(s.values.length));
  reached[step.index][cell] = 1;
  for (const current of steps.slice(step.index + 1)) {
    if (!current.sources.some((source) => reached[source].includes(1))) continue;
    for (const unit of units(current)) {
      const hit = unit.inputs.some((cells, i) =>
        cells.some((input) => reached[current.sources[i]][input]));
      if (hit) for (const output of unit.outputs) reached[current.index][output] = 1;
    }
  }
  return reached;
}

// How a cell's number comes about: the parts to show and the total that they give, in float64.
// `size` is what the total's rounding errors are in proportion to.
const EXPLAIN = {
  conv(step, cell) {
    const { rule: { weight, bias, groups, weightShape }, from: [input] } = step;
    const [filters, channels, height, width] = weightShape;
    const filter = plane(step, cell);
    const group = Math.floor(filter / (filters / groups));
    const taps = windowAt(step, row(step, cell), col(step, cell));
    const parts = range(channels).map((c) => {
      const channel = group * channels + c;
      const cells = taps.map((t) => (t.inside ? cellAt(input, channel, t.row, t.col) : -1));
      const values = cells.map((from) => (from < 0 ? 0 : input.values[from]));
      const start = (filter * channels + c) * height * width;
      const weights = Array.from(weight.subarray(start, start + height * width));
      return { channel, cells, values, weights, width, sum: dot(values, weights) };
    });
    return withBias(parts, bias && bias[filter]);
  },
  linear(step, cell) {
    const { rule: { weight, bias, weightShape: [inputs, outputs] }, from: [input] } = step;
    const out = cell % outputs, start = Math.floor(cell / outputs) * inputs;
    const cells = range(inputs).map((i) => start + i);
    const values = cells.map((from) => input.values[from]);
    const weights = range(inputs).map((i) => weight[i * outputs + out]);
    return withBias([{ cells, values, weights, sum: dot(values, weights) }], bias && bias[out]);
  },
  max(step, cell) {
    const part = poolPart(step, cell);
    const total = Math.max(...part.values.filter((_, i) => part.cells[i] >= 0));
    part.winner = part.values.findIndex((value, i) => value === total && part.cells[i] >= 0);
    return { parts: [part], total, size: 0 };
  },
  mean(step, cell) {
    const { rule: { kernel, stride, padding, countPadding, divisor }, from: [input] } = step;
    const part = poolPart(step, cell);
    const sum = part.values.reduce((a, b) => a + b, 0);
    // A window that goes beyond the padding, as ceil_mode's last may, counts what is not beyond.
    const counted = [[row(step, cell), input.rows], [col(step, cell), input.cols]].map(
      ([at, size], axis) => {
        const start = at * stride[axis] - padding[axis];
        return Math.min(start + kernel[axis], size + padding[axis]) - start;
      });
    const inside = part.cells.filter((from) => from >= 0).length;
    const count = divisor || (countPadding ? product(counted) : inside);
    return { parts: [part], sum, count, total: sum / count, size: part.size / count };
  },
  average(step, cell) {
    const values = readValues(step, cell);
    const sum = values.reduce((a, b) => a + b, 0);
    const size = values.reduce((a, b) => a + Math.abs(b), 0) / values.length;
    return { parts: [], sum, count: values.length, total: sum / values.length, size };
  },
  relu(step, cell) {
    const x = step.from[0].values[cell];
    return { parts: [], x, total: Math.max(0, x), size: 0 };
  },
  norm(step, cell) {
    const { mean, var: variance, gamma, beta, eps } = step.rule;
    const channel = Math.floor(cell / (step.values.length / mean.length));
    const x = step.from[0].values[cell];
    const terms = { x, mean: mean[channel], variance: variance[channel], eps };
    terms.gamma = gamma ? gamma[channel] : null;
    terms.beta = beta ? beta[channel] : null;
    const scale = (gamma ? gamma[channel] : 1) / Math.sqrt(variance[channel] + eps);
    const shift = beta ? beta[channel] : 0;
    const size = Math.abs(x * scale) + Math.abs(mean[channel] * scale) + Math.abs(shift);
    return { parts: [], ...terms, total: (x - mean[channel]) * scale + shift, size };
  },
  add(step, cell) {
    const values = readValues(step, cell);
    return { parts: [], values, total: values[0] + values[1], size: Math.abs(values[0]) };
  },
  softmax(step, cell) {
    return softmax(step, cell, (x, sum) => Math.exp(x) / sum);
  },
  logSoftmax(step, cell) {
    return softmax(step, cell, (x, sum) => x - Math.log(sum));
  },
  copy: () => ({ parts: [], total: null }),
  other: () => ({ parts: [], total: null }),
  input: () => ({ parts: [], total: null }),
};

const dot = (values, weights) => values.reduce((sum, value, i) => sum + value * weights[i], 0);

const readValues = (step, cell) => reads(step, cell).flatMap((cells, i) =>
  Array.from(cells, (from) => step.from[i].values[from]));

function withBias(parts, bias) {
  const total = parts.reduce((sum, part) => sum + part.sum, bias ?? 0);
  const size = parts.reduce((sum, part) => part.values.reduce(
    (s, value, i) => s + Math.abs(value * part.weights[i]), sum), Math.abs(bias ?? 0));
  return { parts, bias, total, size };
}

function poolPart(step, cell) {
  const channel = plane(step, cell), [input] = step.from;
  const taps = windowAt(step, row(step, cell), col(step, cell));
  const cells = taps.map((t) => (t.inside ? cellAt(input, channel, t.row, t.col) : -1));
  const values = cells.map((from) => (from < 0 ? 0 : input.values[from]));
  const size = values.reduce((sum, value) => sum + Math.abs(value), 0);
  return { channel, cells, values, width: step.rule.kernel[1], size };
}

function softmax(step, cell, share) {
  const values = readValues(step, cell);
  const largest = Math.max(...values), x = step.from[0].values[cell];
  const sum = values.reduce((total, value) => total + Math.exp(value - largest), 0);
  const total = share(x - largest, sum);
  return { parts: [], x, largest, sum, count: values.length, total, size: 1 + Math.abs(x) };
}

const explain = (step, cell) => EXPLAIN[step.rule.name](step, cell);

// Whether a total is the layer's own number, up to the rounding of its type.
function agrees(step, cell, { total, size }) {
  const value = step.values[cell];
  return Math.abs(total - value) <= step.eps * (32 * size + Math.abs(value)) || total === value;
}
