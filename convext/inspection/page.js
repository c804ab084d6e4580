// The page: its parts, the cell shown, mouse and keyboard.

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const byId = (id) => document.getElementById(id);

// ---- the page's parts

for (const step of steps) {
  const size = step.shape.join(" × ");
  const title = step.type === step.name ? "" : step.type;
  step.section = make("section", { id: `step-${step.index}` });
  step.section.setAttribute("aria-labelledby", `name-${step.index}`);
  const heading = make("h2", { id: `name-${step.index}` }, step.name,
    make("span", {}, `${title} ${size}`));
  const grids = make("div", { className: "grids" });
  if (step.rule.name === "conv") {
    const canvas = make("canvas"), caption = make("figcaption");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${step.name}, kernels`);
    step.kernels = { canvas, caption };
    grids.append(make("figure", {}, caption, canvas));
  }
  step.canvas = make("canvas", { className: "cells", tabIndex: 0 });
  step.canvas.setAttribute("role", "application");
  step.canvas.setAttribute("aria-roledescription", "grid of cells");
  step.canvas.setAttribute("aria-label", `${step.name}, ${size} cells`);
  step.canvas.setAttribute("aria-describedby", "keys");
  const figure = make("figure", {}, make("div", { className: "scroll" }, step.canvas));
  if (step.kernels) figure.prepend(make("figcaption", {}, "activations"));
  grids.append(figure);
  step.section.append(heading, make("p", {}, step.about), grids);
  byId("layers").append(step.section);

  step.thumbnail = make("canvas");
  step.thumbnail.setAttribute("aria-hidden", "true");
  step.link = make("a", { href: `#step-${step.index}`, title: `${step.name}, ${size}` },
    make("span", { className: "picture" }, step.thumbnail),
    make("span", { className: "name" }, step.name));
  byId("strip").append(step.link);
}

// ---- what is shown

const state = { step: null, cell: 0, pinned: false };

function show(step, cell) {
  const direct = step.index ? reads(step, cell) : [];
  const back = precedents(step, cell);
  const onward = byId("onward").checked ? dependents(step, cell) : null;
  const explained = explain(step, cell);
  Object.assign(state, { step, cell, explained, back, onward });
  step.last = cell;
  state.direct = new Map(step.sources.map((source, i) => [source, new Set(direct[i])]));
  paintAll();
  byId("sum").innerHTML = describe(step, cell, explained, state.pinned);
  byId("sum").scrollTop = 0;
}

function lightsOf(step) {
  const { step: current, cell, back, onward, direct, explained } = state;
  if (!current) return null;
  if (step === current) return { cells: null, direct: new Set(), cursor: cell };
  if (step.index < current.index) {
    const part = step.index === current.sources[0] && explained.parts[0];
    const winner = part && "winner" in part ? part.cells[part.winner] : -1;
    return { cells: back[step.index], direct: direct.get(step.index) || new Set(), winner };
  }
  if (!onward) return null;
  const next = new Set();
  step.sources.forEach((source, i) => {
    if (source !== current.index) return;
    for (const { outputs, inputs } of units(step)) {
      if (inputs[i].includes(cell)) outputs.forEach((output) => next.add(output));
    }
  });
  return { cells: onward[step.index], direct: next, later: true };
}

function paintAll() {
  for (const step of steps) {
    const lights = lightsOf(step);
    if (lights || step.wasLit || !step.painted) {
      paint(step.canvas, step, step.place, lights, false);
      paint(step.thumbnail, step, step.placeSmall, lights, true);
      if (step.kernels) {
        const isShown = step === state.step;
        paintKernels(step, isShown ? plane(step, state.cell) : 0, isShown);
      }
    }
    Object.assign(step, { wasLit: lights !== null, painted: true });
    if (step === state.step) step.link.setAttribute("aria-current", "true");
    else step.link.removeAttribute("aria-current");
  }
  const { offsetLeft, offsetWidth } = state.step.link, strip = byId("strip");
  const right = offsetLeft + offsetWidth + 20 - strip.clientWidth;
  strip.scrollLeft = clamp(strip.scrollLeft, right, offsetLeft - 20);
}

function announce() {
  const { step, cell, pinned, direct } = state;
  const read = step.from.map((from) => `${direct.get(from.index).size} of ${from.name}`).join(" and ");
  byId("live").textContent = `${step.name}, ${wording(step, cell)}: ${full(step.values[cell])}. ` +
    `${read ? `Reads ${read}. ` : ""}${pinned ? "Pinned." : ""}`;
}

// ---- mouse and keyboard

// What the mouse is at; shown at the next frame, however many events there are until then.
let pointed = null;
function point(step, event) {
  const box = step.canvas.getBoundingClientRect();
  const cell = hit(step, step.place, event.clientX - box.left, event.clientY - box.top);
  const already = !pointed && step === state.step && cell === state.cell;
  if (cell < 0 || state.pinned || already) return cell;
  if (!pointed) {
    requestAnimationFrame(() => {
      const { step: at, cell: i } = pointed;
      pointed = null;
      if (!state.pinned) show(at, i);
    });
  }
  pointed = { step, cell };
  return cell;
}

function pin(step, cell) {
  state.pinned = !(state.pinned && step === state.step && cell === state.cell);
  show(step, cell);
  announce();
}

// Where the keyboard comes to a step: at the cell shown last, or in the middle.
const start = (step) => step.last ?? cellAt(step, 0, step.rows >> 1, step.cols >> 1);

function move(step, key) {
  const cell = start(step);
  const at = { p: plane(step, cell), y: row(step, cell), x: col(step, cell) };
  const vector = isVector(step);
  const across = vector ? step.place.columns : 1;
  const go = { ArrowLeft: ["x", -1], ArrowRight: ["x", 1], "[": ["p", -1], "]": ["p", 1],
    ArrowUp: vector ? ["x", -across] : ["y", -1], ArrowDown: vector ? ["x", across] : ["y", 1] }[key];
  const size = { p: step.planes, y: step.rows, x: step.cols };
  const to = at[go[0]] + go[1];
  if (to >= 0 && to < size[go[0]]) at[go[0]] = to;
  return cellAt(step, at.p, at.y, at.x);
}

for (const step of steps) {
  step.canvas.addEventListener("pointermove", (event) => point(step, event));
  step.canvas.addEventListener("click", (event) => {
    const cell = point(step, event);
    if (cell >= 0) pin(step, cell);
  });
  step.canvas.addEventListener("focus", () => {
    if (state.pinned || state.step === step || !step.canvas.matches(":focus-visible")) return;
    show(step, start(step));
    announce();
  });
  step.canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") {
      pin(step, start(step));
    } else if (event.key.startsWith("Arrow") || event.key === "[" || event.key === "]") {
      step.last = move(step, event.key);
      show(step, step.last);
      announce();
    } else return;
    event.preventDefault();
  });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Escape" && state.pinned) {
    state.pinned = false;
    show(state.step, state.cell);
    announce();
  } else if (event.key.toLowerCase() === "d") {
    byId("onward").checked = !byId("onward").checked;
    show(state.step, state.cell);
  }
});
byId("onward").addEventListener("change", () => show(state.step, state.cell));

function fit() {
  const layers = byId("layers"), { paddingLeft } = getComputedStyle(layers);
  const room = layers.clientWidth - 2 * parseFloat(paddingLeft) - 26; // a section's padding, border
  for (const step of steps) {
    let left = room;
    if (step.kernels) {
      const place = arrangeKernels(step, room);
      step.kernels.place = place;
      if (place.all && room - place.width > 260) left = room - place.width - 16;
    }
    step.place = arrange(step, left);
    step.placeSmall = arrangeSmall(step);
  }
  for (const step of steps) step.painted = false;
  if (state.step) paintAll();
}
window.addEventListener("resize", fit);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readTheme();
  fit();
  show(state.step, state.cell);
});

// At first: the largest number of the second convolution, where there is one.
readTheme();
fit();
const convolutions = steps.filter((step) => step.rule.name === "conv");
const first = convolutions[1] || convolutions[0] || steps[steps.length - 1];
show(first, first.values.reduce((best, value, cell) => (value > first.values[best] ? cell : best), 0));

// For tests and the console: shows a cell as pointing at it does; what is lit, by step; and where
// a cell is on the screen.
window.convext = {
  show(layer, cell) {
    show(steps.find(({ name }) => name === layer), cell);
  },
  lit() {
    const places = (cells) => range(cells.length).filter((cell) => cells[cell]);
    const byName = (reached) => Object.fromEntries(
      reached.map((cells, index) => [steps[index].name, places(cells)]));
    const direct = state.step.from.map(({ name, index }) =>
      [name, [...state.direct.get(index)].sort((a, b) => a - b)]);
    return {
      layer: state.step.name,
      cell: state.cell,
      pinned: state.pinned,
      direct: Object.fromEntries(direct),
      precedents: byName(state.back),
      dependents: state.onward && byName(state.onward),
    };
  },
  where(layer, cell) {
    const step = steps.find(({ name }) => name === layer);
    step.canvas.scrollIntoView({ block: "center", behavior: "instant" });
    const box = step.canvas.getBoundingClientRect(), [x, y] = position(step, step.place, cell);
    return { x: box.left + x + step.place.cell / 2, y: box.top + y + step.place.cell / 2 };
  },
};
