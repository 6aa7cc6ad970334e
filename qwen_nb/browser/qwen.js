// A small Qwen in the browser: the course once more, in another language.
//
// Every function has the name of its Python sibling and the link of the lesson that builds it.
// One token at a time goes through the model; what it leaves for the tokens after it is kept.
// Numbers are float32 in typed arrays, sums are taken in float64.
//
// https://github.com/qwen-nb/qwen_nb

"use strict";
// ---- files ------------------------------------------------------------------------------------

// 02_weights: eight bytes of length, a header in JSON, then the numbers.
function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const weights = {};
  for (const [name, about] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [begin, end] = about.data_offsets;
    const bytes = buffer.slice(8 + length + begin, 8 + length + end);
    weights[name] = { shape: about.shape, data: toFloat32(bytes, about.dtype, name) };
  }
  return weights;
}

// 02a_bfloat16: a bfloat16 is the upper half of a float32.
function toFloat32(bytes, dtype, name) {
  if (dtype === "F32") return new Float32Array(bytes);
  if (dtype !== "BF16") throw new Error(`${name} is ${dtype}; expected BF16 or F32`);
  const halves = new Uint16Array(bytes);
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i++) bits[i] = halves[i] << 16;
  return new Float32Array(bits.buffer);
}

// 11_qwen1: the names of 2023, and queries, keys and values in one matrix.
const OF_QWEN1 = [
  [/^transformer\.wte\./, "model.embed_tokens."],
  [/^transformer\.ln_f\./, "model.norm."],
  [/^transformer\.h\./, "model.layers."],
  [/\.ln_1\./, ".input_layernorm."],
  [/\.ln_2\./, ".post_attention_layernorm."],
  [/\.attn\.c_proj\./, ".self_attn.o_proj."],
  [/\.mlp\.w1\./, ".mlp.up_proj."],
  [/\.mlp\.w2\./, ".mlp.gate_proj."],
  [/\.mlp\.c_proj\./, ".mlp.down_proj."],
];

function ourNames(stored) {
  const found = {};
  for (const [name, tensor] of Object.entries(stored)) {
    let ours = name;
    for (const [theirs, replacement] of OF_QWEN1) ours = ours.replace(theirs, replacement);
    if (!ours.includes(".attn.c_attn.")) {
      found[ours] = tensor;
      continue;
    }
    const third = tensor.data.length / 3;
    ["q", "k", "v"].forEach((letter, i) => {
      const shape = [tensor.shape[0] / 3, ...tensor.shape.slice(1)];
      const data = tensor.data.subarray(i * third, (i + 1) * third);
      found[ours.replace(".attn.c_attn.", `.self_attn.${letter}_proj.`)] = { shape, data };
    });
  }
  return found;
}

// 15h_qwen3_5_moe: all experts of a layer in one tensor, gate above up; here one matrix each.
function unfuse(stored) {
  const found = {};
  for (const [name, { shape, data }] of Object.entries(stored)) {
    const [, where, kind] = name.match(/^(.*\.experts\.)(gate_up_proj|down_proj)$/) ?? [];
    if (!where) {
      found[name] = { shape, data };
      continue;
    }
    const parts = kind === "down_proj" ? ["down_proj"] : ["gate_proj", "up_proj"];
    const [rows, columns] = [shape[1] / parts.length, shape[2]];
    for (let n = 0; n < shape[0] * parts.length; n++) {
      const [expert, part] = [Math.floor(n / parts.length), parts[n % parts.length]];
      const numbers = data.subarray(n * rows * columns, (n + 1) * rows * columns);
      found[`${where}${expert}.${part}.weight`] = { shape: [rows, columns], data: numbers };
    }
  }
  return found;
}

// ---- text -------------------------------------------------------------------------------------

// 03_tokenizer: 256 printable characters stand for the 256 bytes.
function standIns() {
  const charOf = new Array(256);
  let next = 256;
  for (let b = 0; b < 256; b++) {
    const printable = (b >= 0x21 && b < 0x7f) || (b >= 0xa1 && b < 0xad) || b >= 0xae;
    charOf[b] = String.fromCharCode(printable ? b : next++);
  }
  return charOf;
}

const CHAR_OF = standIns();
const BYTE_OF = Object.fromEntries(CHAR_OF.map((c, b) => [c, b]));

// 03_tokenizer: the pieces that no token crosses. JavaScript's own \s has other members.
const BLANK = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const SPLIT = new RegExp(
  "'(?:[sSſ]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])" +
    "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" +
    `| ?[^${BLANK}\\p{L}\\p{N}]+[\\r\\n]*|[${BLANK}]*[\\r\\n]+` +
    `|[${BLANK}]+(?![^${BLANK}])|[${BLANK}]+`,
  "gu",
);

// 03_tokenizer … 03c_special: text to ids and back.
class Tokenizer {
  constructor(file) {
    this.vocab = new Map(Object.entries(file.model.vocab));
    this.added = new Map(file.added_tokens.map((token) => [token.content, token.id]));
    this.ranks = new Map();
    file.model.merges.forEach((pair, rank) => {
      const [left, right] = Array.isArray(pair) ? pair : pair.split(" ");
      this.ranks.set(`${left} ${right}`, rank);
    });
    this.names = new Map();
    for (const [token, id] of this.vocab) this.names.set(id, token);
    for (const [token, id] of this.added) this.names.set(id, token);
    const escaped = [...this.added.keys()].map((s) => s.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.atAdded = new RegExp(`(${escaped.join("|")})`);
  }

  // Text of a user: names of added tokens are plain text, unless they are allowed.
  encode(text, allowSpecial = false) {
    const parts = allowSpecial ? text.split(this.atAdded) : [text];
    const ids = [];
    for (const part of parts) {
      const pieces = part.normalize("NFC").match(SPLIT) || [];
      if (allowSpecial && this.added.has(part)) ids.push(this.added.get(part));
      else for (const piece of pieces) ids.push(...this.merge(piece));
    }
    return ids;
  }

  // 03a_encode: the pair with the lowest rank joins first, until no pair may.
  merge(piece) {
    const bytes = new TextEncoder().encode(piece);
    const tokens = Array.from(bytes, (b) => CHAR_OF[b]);
    while (tokens.length > 1) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < tokens.length; i++) {
        const rank = this.ranks.get(`${tokens[i]} ${tokens[i + 1]}`);
        if (rank !== undefined && rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      tokens.splice(at, 2, tokens[at] + tokens[at + 1]);
    }
    return tokens.map((token) => this.vocab.get(token));
  }

  bytes(id) {
    const name = this.names.get(id) ?? "";
    if (this.added.has(name)) return new TextEncoder().encode(name);
    return Uint8Array.from(name, (c) => BYTE_OF[c]);
  }

  decode(ids) {
    const all = ids.flatMap((id) => [...this.bytes(id)]);
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(all));
  }
}

// 10b_prompt: the ids of a conversation. Control tokens come from here, never from what was said.
function encodeChat(tokenizer, messages, thinks = true) {
  const control = (name) => tokenizer.added.get(name);
  const [start, end] = [control("<|im_start|>"), control("<|im_end|>")];
  const lineEnd = tokenizer.encode("\n");
  const ids = [];
  for (const { role, content } of messages) {
    ids.push(start, ...tokenizer.encode(`${role}\n${content}`), end, ...lineEnd);
  }
  ids.push(start, ...tokenizer.encode("assistant\n"));
  if (thinks) return ids;
  const blank = tokenizer.encode("\n\n"); // a thought without a word
  return [...ids, control("<think>"), ...blank, control("</think>"), ...blank];
}

// ---- the parts --------------------------------------------------------------------------------

// One row times a matrix of shape (rows, columns), as torch keeps it.
function linear(x, weight, bias) {
  const [rows, columns] = weight.shape;
  const w = weight.data;
  const y = new Float32Array(rows);
  for (let r = 0, at = 0; r < rows; r++) {
    let sum = bias ? bias.data[r] : 0;
    for (let c = 0; c < columns; c++) sum += w[at++] * x[c];
    y[r] = sum;
  }
  return y;
}

function add(x, y) {
  return x.map((value, i) => value + y[i]);
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const silu = (x) => x * sigmoid(x);
const softplus = (x) => (x > 20 ? x : Math.log1p(Math.exp(x)));

function softmax(scores) {
  let largest = -Infinity;
  for (const s of scores) if (s > largest) largest = s;
  const weights = Float64Array.from(scores, (s) => Math.exp(s - largest));
  const total = weights.reduce((sum, w) => sum + w, 0);
  return weights.map((w) => w / total);
}

// 04_rmsnorm. Zero-centred (15b_hybrid): times 1 + weight.
function rmsNorm(x, weight, eps, zeroCentred = false) {
  let squares = 0;
  for (const value of x) squares += value * value;
  const scale = 1 / Math.sqrt(squares / x.length + eps);
  return x.map((value, i) => value * scale * (zeroCentred ? 1 + weight.data[i] : weight.data[i]));
}

function normHeads(x, weight, eps, zeroCentred) {
  const dim = weight.data.length;
  for (let at = 0; at < x.length; at += dim) {
    x.set(rmsNorm(x.subarray(at, at + dim), weight, eps, zeroCentred), at);
  }
}

// 05_rope: the angle of each pair at a position. torch computes it in float32, and so do we.
function angles(position, turned, theta) {
  const found = new Float32Array(turned / 2);
  for (let j = 0; j < found.length; j++) {
    const slower = Math.fround(theta ** Math.fround((2 * j) / turned));
    found[j] = position * Math.fround(1 / slower);
  }
  return found;
}

// 05_rope: channel j and channel j + turned/2 of each head are a pair; the others stay.
function applyRope(x, angle, dim) {
  const half = angle.length;
  for (let at = 0; at < x.length; at += dim) {
    for (let j = 0; j < half; j++) {
      const [a, b] = [x[at + j], x[at + j + half]];
      const [cos, sin] = [Math.cos(angle[j]), Math.sin(angle[j])];
      x[at + j] = a * cos - b * sin;
      x[at + j + half] = b * cos + a * sin;
    }
  }
}

// 06_attention, 06a_gqa: one query of each head looks back at all keys. Gives the mix and weights.
function attend(q, keys, values, heads, kvHeads, scale = 1) {
  const dim = q.length / heads;
  const mix = new Float32Array(q.length);
  const weights = [];
  for (let h = 0; h < heads; h++) {
    const from = Math.floor(h / (heads / kvHeads)) * dim; // which key/value head serves this one
    const scores = keys.map((k) => {
      let dot = 0;
      for (let c = 0; c < dim; c++) dot += q[h * dim + c] * scale * k[from + c];
      return dot / Math.sqrt(dim);
    });
    weights.push(softmax(scores));
    for (let c = 0; c < dim; c++) {
      let sum = 0;
      for (let n = 0; n < values.length; n++) sum += weights[h][n] * values[n][from + c];
      mix[h * dim + c] = sum;
    }
  }
  return { mix, weights };
}

// 07_swiglu
function swiglu(x, gate, up, down) {
  const gated = linear(x, gate).map(silu);
  const inner = linear(x, up).map((value, i) => value * gated[i]);
  return linear(inner, down);
}

// 14_moe: the k likeliest experts, and their weights.
function route(logits, k, normed) {
  const probabilities = softmax(logits);
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const chosen = order.slice(0, k);
  const total = normed ? chosen.reduce((sum, e) => sum + probabilities[e], 0) : 1;
  return chosen.map((e) => [e, probabilities[e] / total]);
}

// 15a_deltanet: each channel by itself, a weighted sum of this input and those before it.
function causalConv(x, weight, recent) {
  const kernel = weight.shape[2];
  recent.push(x);
  if (recent.length > kernel) recent.shift();
  const missing = kernel - recent.length;
  return x.map((_, c) => {
    let sum = 0;
    recent.forEach((input, n) => (sum += weight.data[c * kernel + missing + n] * input[c]));
    return sum;
  });
}

// 15_delta
function l2Norm(x, at, dim) {
  let squares = 0;
  for (let c = 0; c < dim; c++) squares += x[at + c] * x[at + c];
  const scale = 1 / Math.sqrt(squares + 1e-6);
  return x.subarray(at, at + dim).map((value) => value * scale);
}

// 15_delta: forget a little, look up what stands under the key, write the change, read.
function deltaRule(state, q, k, v, decay, beta) {
  const read = new Float32Array(v.length);
  for (let c = 0; c < v.length; c++) {
    let known = 0;
    for (let r = 0; r < k.length; r++) {
      state[r * v.length + c] *= decay;
      known += k[r] * state[r * v.length + c];
    }
    const change = beta * (v[c] - known);
    for (let r = 0; r < k.length; r++) {
      state[r * v.length + c] += k[r] * change;
      read[c] += q[r] * state[r * v.length + c];
    }
  }
  return read;
}

// ---- the model --------------------------------------------------------------------------------

// 11a_long: how many times slower the slowest pair turns in a long text (Qwen1).
function ntkAlpha(n, seqLength) {
  return Math.max(2 ** Math.ceil(Math.log2(n / seqLength) + 1) - 1, 1);
}

// What a text has left: keys and values, or a state (09a_cache, 15b_hybrid). `watch` says what is
// noted, in lists {attention, layers, hands}, and what is switched off, in sets {headsOff,
// mlpsOff}: a head is "layer.head", an MLP the number of its layer.
class Context {
  constructor(watch = {}) {
    this.length = 0;
    this.layers = [];
    this.alpha = 1;
    this.watch = watch;
  }
}

// 08_model: ids in, logits out, for the dense ones, the mixtures and the hybrids.
class Qwen {
  constructor(raw, stored) {
    const c = { ...raw, ...raw.text_config };
    this.kind = (raw.model_type || "qwen3").replace("_text", "");
    this.weights = unfuse(ourNames(stored));
    this.layers = c.num_hidden_layers;
    this.heads = c.num_attention_heads;
    this.kvHeads = c.num_key_value_heads ?? c.num_attention_heads;
    this.dim = c.head_dim ?? c.kv_channels ?? c.hidden_size / c.num_attention_heads;
    this.eps = c.rms_norm_eps ?? c.layer_norm_epsilon;
    const rope = c.rope_parameters ?? {};
    this.theta = rope.rope_theta ?? c.rope_theta ?? c.rotary_emb_base;
    this.turned = this.dim * (rope.partial_rotary_factor ?? 1);
    this.zeroCentred = this.kind.startsWith("qwen3_5");
    this.tied = c.tie_word_embeddings ?? false;
    this.config = c;
    this.w = (name) => this.weights[name];
  }

  // 08_model. One id more of a text; its logits, float32. `total`: tokens of the prompt, for Qwen1.
  forward(id, context, total = context.length + 1) {
    let x = this.embed(id);
    if (this.config.use_dynamic_ntk && total > context.length + 1 && !context.length) {
      context.alpha = ntkAlpha(total, this.config.seq_length);
    }
    for (let i = 0; i < this.layers; i++) {
      x = this.block(i, x, context);
      if (context.watch.layers) context.watch.layers.push(x);
    }
    context.length += 1;
    return this.head(x);
  }

  // The row of the table that belongs to an id.
  embed(id) {
    if (!(id >= 0 && id < this.config.vocab_size)) throw new Error(`there is no token ${id}`);
    const table = this.w("model.embed_tokens.weight");
    const hidden = table.shape[1];
    return table.data.slice(id * hidden, (id + 1) * hidden);
  }

  // The last norm and the head: also for the layers in between (the "logit lens").
  head(x) {
    const normed = rmsNorm(x, this.w("model.norm.weight"), this.eps, this.zeroCentred);
    return linear(normed, this.w(this.tied ? "model.embed_tokens.weight" : "lm_head.weight"));
  }

  // 08_model: norm, attention, add; norm, MLP, add.
  block(i, x, context) {
    const at = `model.layers.${i}.`;
    const norm = (name, y) => rmsNorm(y, this.w(at + name), this.eps, this.zeroCentred);
    const normed = norm("input_layernorm.weight", x);
    const isDelta = this.config.layer_types?.[i] === "linear_attention";
    x = add(x, isDelta ? this.deltaNet(i, normed, context) : this.attention(i, normed, context));
    if (context.watch.mlpsOff?.has(i)) return x;
    return add(x, this.mlp(at + "mlp.", norm("post_attention_layernorm.weight", x)));
  }

  // 06a_gqa; 11a_long for log-n; 15b_hybrid for the gate.
  attention(i, x, context) {
    const at = `model.layers.${i}.self_attn.`;
    const project = (name, y) =>
      linear(y, this.w(`${at}${name}.weight`), this.w(`${at}${name}.bias`));
    let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map((name) => project(name, x));
    let gate = null;
    if (this.kind.startsWith("qwen3_5")) [q, gate] = this.splitGate(q);
    for (const [y, name] of [[q, "q_norm"], [k, "k_norm"]]) {
      const weight = this.w(`${at}${name}.weight`);
      if (weight) normHeads(y, weight, this.eps, this.zeroCentred);
    }
    const base = this.theta * context.alpha ** (this.dim / (this.dim - 2));
    const angle = angles(context.length, this.turned, base);
    context.watch.hands?.push({ layer: i, q: q.slice(), k: k.slice() }); // not yet turned
    applyRope(q, angle, this.dim);
    applyRope(k, angle, this.dim);

    const kept = (context.layers[i] ??= { keys: [], values: [] });
    kept.keys.push(k);
    kept.values.push(v);
    const seen = kept.keys.length;
    const longer = this.config.use_logn_attn && seen > this.config.seq_length;
    const scale = longer ? Math.log(seen) / Math.log(this.config.seq_length) : 1;
    const { mix, weights } = attend(q, kept.keys, kept.values, this.heads, this.kvHeads, scale);
    if (context.watch.attention) context.watch.attention.push({ layer: i, weights });
    for (let h = 0; h < this.heads; h++) {
      if (context.watch.headsOff?.has(`${i}.${h}`)) mix.fill(0, h * this.dim, (h + 1) * this.dim);
    }
    const gated = gate ? mix.map((value, c) => value * sigmoid(gate[c])) : mix;
    return project("o_proj", gated);
  }

  // 15b_hybrid: `q_proj` gives each head its query and its gate, side by side.
  splitGate(both) {
    const [q, gate] = [new Float32Array(both.length / 2), new Float32Array(both.length / 2)];
    for (let h = 0; h < this.heads; h++) {
      const from = 2 * h * this.dim;
      q.set(both.subarray(from, from + this.dim), h * this.dim);
      gate.set(both.subarray(from + this.dim, from + 2 * this.dim), h * this.dim);
    }
    return [q, gate];
  }

  // 07_swiglu, or 14_moe where there is a router.
  mlp(at, x) {
    const expert = (where) => {
      const of = (matrix) => this.w(`${where}${matrix}_proj.weight`);
      return swiglu(x, of("gate"), of("up"), of("down"));
    };
    const router = this.w(at + "gate.weight");
    if (!router) return expert(at);
    const normed = this.config.norm_topk_prob ?? this.kind === "qwen3_5_moe";
    let y = new Float32Array(x.length);
    for (const [e, share] of route(linear(x, router), this.config.num_experts_per_tok, normed)) {
      y = add(y, expert(`${at}experts.${e}.`).map((value) => share * value));
    }
    const sharedGate = this.w(at + "shared_expert_gate.weight");
    if (!sharedGate) return y;
    const open = sigmoid(linear(x, sharedGate)[0]);
    return add(y, expert(at + "shared_expert.").map((value) => open * value));
  }

  // 15a_deltanet: a memory of fixed size.
  deltaNet(i, x, context) {
    const at = `model.layers.${i}.linear_attn.`;
    const project = (name) => linear(x, this.w(`${at}in_proj_${name}.weight`));
    const c = this.config;
    const [kDim, vDim] = [c.linear_key_head_dim, c.linear_value_head_dim];
    const [kHeads, vHeads] = [c.linear_num_key_heads, c.linear_num_value_heads];
    const kept = (context.layers[i] ??= {
      recent: [],
      states: Array.from({ length: vHeads }, () => new Float32Array(kDim * vDim)),
    });
    const conv = this.w(at + "conv1d.weight");
    const mixed = causalConv(project("qkv"), conv, kept.recent).map(silu);
    const [z, b, a] = ["z", "b", "a"].map(project);
    const out = new Float32Array(vHeads * vDim);
    for (let h = 0; h < vHeads; h++) {
      const from = Math.floor(h / (vHeads / kHeads)) * kDim; // which key head serves this one
      const q = l2Norm(mixed, from, kDim).map((value) => value / Math.sqrt(kDim));
      const k = l2Norm(mixed, kHeads * kDim + from, kDim);
      const v = mixed.subarray(2 * kHeads * kDim + h * vDim, 2 * kHeads * kDim + (h + 1) * vDim);
      const step = softplus(a[h] + this.w(at + "dt_bias").data[h]);
      const decay = Math.exp(-Math.exp(this.w(at + "A_log").data[h]) * step);
      const read = deltaRule(kept.states[h], q, k, v, decay, sigmoid(b[h]));
      const normed = rmsNorm(read, this.w(at + "norm.weight"), this.eps);
      normed.forEach((value, n) => (out[h * vDim + n] = value * silu(z[h * vDim + n])));
    }
    return linear(out, this.w(at + "out_proj.weight"));
  }

  // 09a_cache: read a text; the logits of its last token.
  read(ids, context) {
    let logits = null;
    for (const id of ids) logits = this.forward(id, context, context.length || ids.length);
    return logits;
  }
}

// ---- writing ----------------------------------------------------------------------------------

// Equally likely numbers from 0 to 1, the same for the same seed.
function generatorFor(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// 09_generate: what is left of the distribution, in the reference's order.
function keep(logits, { temperature = 0, topK = 0, topP = 1, minP = 0 }) {
  let kept = Float64Array.from(logits, (value) => value / (temperature || 1));
  if (topK) {
    const least = [...kept].sort((a, b) => b - a)[Math.min(topK, kept.length) - 1];
    kept = kept.map((value) => (value < least ? -Infinity : value));
  }
  if (topP < 1) {
    const p = softmax(kept);
    const rising = [...p.keys()].sort((a, b) => p[a] - p[b]);
    let sum = 0;
    for (const id of rising.slice(0, -1)) if ((sum += p[id]) <= 1 - topP) kept[id] = -Infinity;
  }
  if (minP) {
    const p = softmax(kept);
    const least = minP * Math.max(...p);
    kept = kept.map((value, id) => (p[id] < least ? -Infinity : value));
  }
  return softmax(kept);
}

// 09_generate: the likeliest, or a draw.
function choose(logits, settings, random) {
  if (!settings.temperature) return logits.indexOf(Math.max(...logits));
  let left = random();
  const p = keep(logits, settings);
  for (let id = 0; id < p.length; id++) if ((left -= p[id]) < 0) return id;
  return p.indexOf(Math.max(...p));
}

// 09b_batch: the loop that writes. Yields ids; the last one may be a stop id.
function* write(model, ids, settings = {}) {
  const { maxNewTokens = 64, stopIds = [], seed = 0, context = new Context() } = settings;
  const random = generatorFor(seed);
  let logits = model.read(ids, context);
  for (let n = 0; n < maxNewTokens; n++) {
    const id = choose(logits, settings, random);
    yield id;
    if (stopIds.includes(id) || n + 1 === maxNewTokens) return;
    logits = model.forward(id, context);
  }
}
