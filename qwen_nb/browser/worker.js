// The model in a thread of its own, so that the page never waits. It is told what to do in messages
// and answers with the same `number`. What a picture asked before its newest question is dropped.

"use strict";
const models = {}; // "own", and perhaps "hybrid"
let tokenizer = null;
let noted = null; // of the text that was looked at last
const newest = {}; // of each picture

const pause = () => new Promise((resume) => setTimeout(resume));
const isOld = ({ picture, number }) => newest[picture] !== number;

function load({ file, config }) {
  const letters = atob(file); // one for each byte
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return new Qwen(config, readSafetensors(bytes.buffer));
}

function about(model) {
  const { layers, heads, kvHeads, dim, turned, theta, config: c } = model;
  const kinds = c.layer_types ?? null;
  const sizes = { layers, heads, kvHeads, dim, turned, theta, kinds, stateSize: 0 };
  const [keyDim, valueDim] = [c.linear_key_head_dim, c.linear_value_head_dim];
  if (!valueDim) return sizes;
  const tableSize = c.linear_num_value_heads * keyDim * valueDim;
  const mixed = 2 * c.linear_num_key_heads * keyDim + c.linear_num_value_heads * valueDim;
  const recent = (c.linear_conv_kernel_dim - 1) * mixed; // inputs that the convolution still needs
  return { ...sizes, keyDim, valueDim, tableSize, stateSize: tableSize + recent };
}

function open({ file, config, vocabulary }) {
  models.own = load({ file, config });
  tokenizer = new Tokenizer(vocabulary);
  const names = pieces([...Array(models.own.config.vocab_size).keys()]);
  return { about: about(models.own), names };
}

// The second model, when the picture that needs it is seen.
function openHybrid({ hybrid }) {
  models.hybrid ??= hybrid ? load(hybrid) : models.own;
  return { about: about(models.hybrid) };
}

// The pieces of a text as they are shown: half a character is shown as its bytes.
function pieces(ids) {
  const decoder = new TextDecoder("utf-8", { fatal: true });
  return ids.map((id) => {
    const bytes = tokenizer.bytes(id);
    try {
      return decoder.decode(bytes);
    } catch {
      return [...bytes].map((b) => `‹${b.toString(16)}›`).join("");
    }
  });
}

function likeliest(logits) {
  const p = softmax(logits);
  const id = p.reduce((best, share, i) => (share > p[best] ? i : best), 0);
  return { id, text: pieces([id])[0], share: p[id] };
}

// Reads a text, letting newer questions in. Null if there was one.
async function readAll(model, ids, context, job, note = () => {}) {
  let logits = null;
  for (let i = 0; i < ids.length; i++) {
    logits = model.forward(ids[i], context, ids.length);
    note(i);
    if (i % 8 === 7) await pause();
    if (isOld(job)) return null;
  }
  return logits;
}

// Reads the text with heads and MLPs switched off, and notes what was seen at each token.
async function look(job) {
  const ids = tokenizer.encode(job.text);
  if (!ids.length) return { tokens: [] };
  const watch = { headsOff: new Set(job.headsOff), mlpsOff: new Set(job.mlpsOff) };
  Object.assign(watch, { attention: [], layers: [] });
  if (!(await readAll(models.own, ids, new Context(watch), job))) return null;
  noted = watch;
  return { tokens: pieces(ids), ...seenAt({ at: ids.length - 1 }) };
}

// What was seen at one token of the text that was looked at last.
function seenAt({ at }) {
  const model = models.own;
  const looking = noted.attention.length / (noted.layers.length / model.layers); // layers that look
  const attention = noted.attention.slice(at * looking, (at + 1) * looking);
  const layers = noted.layers.slice(at * model.layers, (at + 1) * model.layers);
  const guesses = layers.map((x) => model.head(x));
  return { at, attention, lens: guesses.map(likeliest), logits: guesses.at(-1) };
}

// Writes on, a token at a time, until a stop id or the number of tokens.
async function writeOn(job) {
  const watch = { headsOff: new Set(job.headsOff), mlpsOff: new Set(job.mlpsOff) };
  const context = new Context(watch);
  const { text, messages, thinks, settings } = job;
  const ids = messages ? encodeChat(tokenizer, messages, thinks) : tokenizer.encode(text);
  const said = [];
  for (const id of write(models.own, ids, { ...settings, context })) {
    if (settings.stopIds.includes(id)) break;
    said.push(id);
    const { picture, number } = job;
    const soFar = tokenizer.decode(said).replace(/\ufffd$/, "");
    postMessage({ picture, number, kind: "piece", text: soFar });
    await pause();
    if (isOld(job)) return null;
  }
  return { text: tokenizer.decode(said), read: ids.length };
}

// What becomes of the likeliest next token when one head, or one MLP, is off: one after the other.
async function eachOff(job) {
  const model = models.own;
  const ids = tokenizer.encode(job.text);
  const whole = await readAll(model, ids, new Context(), job);
  if (!whole) return null;
  const right = likeliest(whole);
  for (let layer = 0; layer < model.layers; layer++) {
    const isState = model.config.layer_types?.[layer] === "linear_attention";
    for (let head = isState ? model.heads : 0; head <= model.heads; head++) {
      const isMlp = head === model.heads;
      const key = isMlp ? `${layer}` : `${layer}.${head}`;
      const off = isMlp ? { mlpsOff: new Set([layer]) } : { headsOff: new Set([key]) };
      const logits = await readAll(model, ids, new Context(off), job);
      if (!logits) return null;
      const { picture, number } = job;
      const lost = Math.max(0, 1 - softmax(logits)[right.id] / right.share);
      postMessage({ picture, number, kind: "piece", key, lost, says: likeliest(logits).text });
    }
  }
  return { right };
}

// The queries and keys of one head at every token, before they are turned.
async function hands(job) {
  const model = models.own;
  const ids = tokenizer.encode(job.text);
  const watch = { hands: [] };
  if (ids.length && !(await readAll(model, ids, new Context(watch), job))) return null;
  const { layer, head } = job;
  const of = watch.hands.filter((found) => found.layer === layer);
  const from = Math.floor(head / (model.heads / model.kvHeads));
  const part = (x, n) => x.slice(n * model.dim, (n + 1) * model.dim);
  const tokens = pieces(ids);
  return { tokens, q: of.map(({ q }) => part(q, head)), k: of.map(({ k }) => part(k, from)) };
}

// The cache of one layer of the model, and the state of one layer of the hybrid, after each token.
async function memories(job) {
  const ids = tokenizer.encode(job.text);
  if (!ids.length) return { tokens: [], cache: [], states: [] };
  const context = new Context();
  const logits = await readAll(models.own, ids, context, job);
  if (!logits) return null;
  const { keys, values } = context.layers[job.cacheLayer];
  const cache = keys.map((k, n) => Float32Array.from([...k, ...values[n]]));
  const states = [];
  const other = new Context();
  const keep = () => {
    const kept = other.layers[job.stateLayer].states;
    const state = new Float32Array(kept.length * kept[0].length);
    kept.forEach((head, h) => state.set(head, h * head.length));
    states.push(state);
  };
  const found = { tokens: pieces(ids), cache, says: likeliest(logits) };
  if (!job.hasState) return { ...found, states };
  const others = await readAll(models.hybrid, ids, other, job, keep);
  return others && { ...found, states, hybridSays: likeliest(others) };
}

// For a model with a mistake: what stands in the stream after each layer, and what it writes.
function compare({ text, settings }) {
  const ids = tokenizer.encode(text);
  if (!ids.length) return { layers: [], logits: [], text: "" };
  const watch = { layers: [] };
  const logits = models.own.read(ids, new Context(watch));
  const layers = watch.layers.slice(-models.own.layers);
  const said = [...write(models.own, ids, settings)];
  const isStop = settings.stopIds.includes(said.at(-1));
  return { layers, logits, text: tokenizer.decode(isStop ? said.slice(0, -1) : said) };
}

// A new question to drop an old one.
const stop = () => null;

const KINDS = { stop, open, openHybrid, look, seenAt, writeOn, eachOff, hands, memories, compare };

onmessage = async ({ data }) => {
  const { picture, number, kind } = data;
  newest[picture] = number;
  try {
    const answer = await KINDS[kind](data);
    if (answer) postMessage({ picture, number, kind, ...answer });
  } catch (error) {
    postMessage({ picture, number, kind: "failed", text: error.message });
  }
};
