// The model in a thread of its own, so that the page never waits. It is told what to do in messages
// and answers with the same `number`; what was asked before a newer question is not answered.

"use strict";
let model = null;
let tokenizer = null;
let newest = 0;

const pause = () => new Promise((resume) => setTimeout(resume));

function open({ file, config, vocabulary }) {
  const bytes = Uint8Array.from(atob(file), (c) => c.charCodeAt(0));
  model = new Qwen(config, readSafetensors(bytes.buffer));
  tokenizer = new Tokenizer(vocabulary);
  return { layers: model.layers, heads: model.heads, kinds: config.layer_types ?? null };
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

function best(logits, n) {
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]).slice(0, n);
  return { ids: order, texts: pieces(order) };
}

// Reads the text with heads and MLPs switched off, and tells what was seen at its last token.
async function look({ text, headsOff, mlpsOff, number }) {
  const ids = tokenizer.encode(text);
  if (!ids.length) return { tokens: [] };
  const watch = { headsOff: new Set(headsOff), mlpsOff: new Set(mlpsOff) };
  const context = new Context(watch);
  let logits = null;
  for (let i = 0; i < ids.length; i++) {
    if (i === ids.length - 1) Object.assign(watch, { attention: [], layers: [] });
    logits = model.forward(ids[i], context, ids.length);
    if (i % 8 === 7) await pause();
    if (number !== newest) return null;
  }
  const lens = watch.layers.map((x) => {
    const p = softmax(model.head(x));
    const first = best(p, 1);
    return { text: first.texts[0], share: p[first.ids[0]] };
  });
  const attention = watch.attention.map(({ layer, weights }) => ({ layer, weights }));
  return { tokens: pieces(ids), logits, lens, attention, names: pieces([...logits.keys()]) };
}

// Writes on, a token at a time, until a stop id, an empty line or the number of tokens.
async function writeOn({ text, headsOff, mlpsOff, settings, number }) {
  const context = new Context({ headsOff: new Set(headsOff), mlpsOff: new Set(mlpsOff) });
  const said = [];
  for (const id of write(model, tokenizer.encode(text), { ...settings, context })) {
    if (settings.stopIds.includes(id)) break;
    said.push(id);
    postMessage({ number, kind: "piece", text: tokenizer.decode(said).replace(/\ufffd$/, "") });
    await pause();
    if (number !== newest) return null;
  }
  return { text: tokenizer.decode(said) };
}

onmessage = async ({ data }) => {
  newest = data.number;
  const answer = await { open, look, writeOn }[data.kind](data);
  if (answer) postMessage({ number: data.number, kind: data.kind, ...answer });
};
