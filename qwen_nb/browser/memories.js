// *Two memories*: the cache of attention (lesson 09a_cache) beside the state of a hybrid's linear
// layers (15_delta, 15b_hybrid), after each token of the text.

"use strict";
let memory = null; // {tokens, cache, states}
let hybrid = null; // its sizes
let cached = null; // the sizes of the model whose cache is shown

async function readMemories(text) {
  hybrid ??= (await thread.ask("hybrid", "openHybrid", { hybrid: given.hybrid })).about;
  const isState = (layer) => !looks(hybrid, layer);
  const layerNames = (about) => [...Array(about.layers).keys()];
  const options = (layers) => layers.map((layer) => [layer, `${layer}`]);
  const withCache = layerNames(cached).filter((layer) => looks(cached, layer));
  const withState = layerNames(hybrid).filter(isState);
  fillSelect($("cache-layer"), options(withCache));
  fillSelect($("state-layer"), options(withState));
  $("state-side").hidden = !withState.length;
  const [cacheLayer, stateLayer] = ["cache-layer", "state-layer"].map((id) => Number($(id).value));
  const hasState = withState.length > 0;
  memory = await thread.ask("memories", "memories", { text, cacheLayer, stateLayer, hasState });
  const n = memory.tokens.length;
  memory.largest = largestIn(memory.cache);
  const size = hybrid.keyDim * hybrid.valueDim; // of one head's table
  const heads = [...Array(hybrid.tableSize / size || 0).keys()];
  const table = (state, h) => state.subarray(h * size, (h + 1) * size);
  memory.tables = heads.map((h) => largestIn(memory.states.map((state) => table(state, h))));
  $("cache-says").textContent = memory.says ? sayNext(memory.says) : "";
  $("state-says").textContent = memory.hybridSays ? sayNext(memory.hybridSays) : "";
  setSlider("grown", n, n);
  drawMemories();
}

function largestIn(vectors) {
  let largest = 1e-9;
  for (const vector of vectors) for (const x of vector) largest = Math.max(largest, Math.abs(x));
  return largest;
}

// Numbers as dots, `rows` of them in a column: blue above nought, orange below. The largest number
// in full colour may differ from row to row: `scaleAt`.
function drawDots(canvas, columns, rows, scaleAt) {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const [blue, orange] = isDark ? [[86, 180, 233], [230, 159, 0]] : [[0, 114, 178], [213, 94, 0]];
  Object.assign(canvas, { width: Math.max(1, columns.length), height: rows });
  canvas.style.width = `${2 * canvas.width}px`;
  const pen = canvas.getContext("2d");
  const picture = pen.createImageData(canvas.width, rows);
  columns.forEach((column, x) => {
    for (let y = 0; y < rows; y++) {
      const share = Math.min(1, Math.cbrt(Math.abs(column[y]) / scaleAt(y)));
      const colour = column[y] > 0 ? blue : orange;
      const at = 4 * (y * canvas.width + x);
      picture.data.set([...colour, Math.round(255 * share)], at);
    }
  });
  pen.putImageData(picture, 0, 0);
}

// A state of shape (heads, keys, values), head by head beneath each other: each column one value.
function stateColumns(state) {
  const values = hybrid.valueDim;
  return Array.from({ length: values }, (_, c) =>
    Float32Array.from({ length: state.length / values }, (_, row) => state[row * values + c]),
  );
}

// How many numbers a model keeps of n tokens, all layers together.
function kept(about, n) {
  const layers = [...Array(about.layers).keys()];
  const attending = layers.filter((layer) => looks(about, layer)).length;
  const perToken = 2 * about.kvHeads * about.dim;
  return attending * n * perToken + (about.layers - attending) * about.stateSize;
}

function drawMemories() {
  if (!memory) return;
  const n = Number($("grown").value);
  const cache = memory.cache.slice(0, n);
  const state = memory.states[n - 1];
  $("read-so-far").textContent = memory.tokens.slice(0, n).join("");
  const count = (value) => value.toLocaleString("en");
  const perToken = 2 * cached.kvHeads * cached.dim;
  drawDots($("cache"), cache, perToken, () => memory.largest);
  $("cache").setAttribute("aria-label", `${n} columns of ${perToken} numbers`);
  $("cache-size").textContent =
    `${n} tokens × ${perToken} numbers, keys above values: ${count(n * perToken)}.`;
  if (!$("state-side").hidden) {
    const rows = hybrid.tableSize / hybrid.valueDim;
    const columns = state ? stateColumns(state) : [];
    drawDots($("states"), columns, rows, (y) => memory.tables[Math.floor(y / hybrid.keyDim)]);
    $("states").style.minWidth = `${2 * hybrid.valueDim}px`;
    $("states").setAttribute("aria-label", `${rows} rows of ${hybrid.valueDim} numbers`);
    $("state-size").textContent = `${rows} × ${hybrid.valueDim} numbers, `
      + `its heads beneath each other, each coloured by its own largest number: `
      + `${count(hybrid.tableSize)}, however long the text.`;
  }
  drawGrowth(n);
}

function drawGrowth(n) {
  const longest = Math.max(64, 2 ** Math.ceil(Math.log2(memory.tokens.length + 1)));
  const most = kept(cached, longest);
  const line = (about) => [[0, kept(about, 0)], [longest, kept(about, longest)]];
  const lines = [{ points: line(cached), colour: "var(--theirs)" }];
  const marks = [[n, kept(cached, n)]];
  const isOther = Boolean(given.hybrid);
  if (isOther) {
    lines.push({ points: line(hybrid), colour: "var(--ours)" });
    marks.push([n, kept(hybrid, n)]);
  }
  const count = (value) => value.toLocaleString("en");
  const words = isOther ? `, the hybrid (blue) ${count(kept(hybrid, n))}` : "";
  const numbers = count(kept(cached, n));
  const label = `After ${n} tokens: the cache (orange) keeps ${numbers} numbers${words}`;
  const quarters = [0, 0.25, 0.5, 0.75, 1];
  chart($("growth"), {
    lines,
    marks,
    label,
    x: {
      from: 0,
      to: longest,
      name: "tokens read",
      ticks: quarters.map((q) => ({ at: q * longest })),
    },
    y: {
      from: 0,
      to: most,
      name: "numbers kept",
      ticks: quarters.map((q) => ({ at: q * most, name: `${Math.round((q * most) / 1000)} k` })),
    },
  });
  $("growth-says").textContent = `${label}.`;
}

for (const id of ["cache-layer", "state-layer"]) {
  $(id).onchange = () => readMemories($("text").value);
}
onSlide("grown", drawMemories);
opened.then(({ about }) => (cached = about));
addPicture("memories", readMemories);
