// *Inside a token*: where each head looks, the next token under four settings, and the guess after
// each layer. `keep` and `softmax` are the engine's.

"use strict";
const SHOWN = 10; // of the next tokens
const headsOff = new Set(); // "layer.head"
const mlpsOff = new Set();
let names = []; // of all tokens
let seen = null; // what the worker last told

const off = () => ({ headsOff: [...headsOff], mlpsOff: [...mlpsOff] });

async function look(text) {
  seen = await thread.ask("inside", "look", { text, ...off() });
  say(seen.tokens.length ? `${seen.tokens.length} tokens` : "Write something for it to read.");
  const last = Math.max(0, seen.tokens.length - 1);
  setSlider("at", last, last);
  draw();
}

async function lookFrom() {
  if (!seen?.tokens.length) return;
  Object.assign(seen, await thread.ask("token", "seenAt", { at: Number($("at").value) }));
  draw();
}

function draw() {
  drawNext();
  drawTokens();
  const rows = (seen.lens ?? []).map(({ text, share }, i) => {
    const row = element("tr", "");
    row.append(element("th", `layer ${i}`, { scope: "row" }));
    const guess = element("td", "");
    guess.append(element("code", visible(text)));
    row.append(guess, element("td", `${Math.round(100 * share)} %`));
    return row;
  });
  $("lens").tBodies[0].replaceChildren(...rows);
  if (seen.at === seen.tokens.length - 1) $("says").textContent = sayNext(seen.lens.at(-1));
}

const sayNext = ({ text, share }) => `${visible(text)}  ${Math.round(100 * share)} %`;

function settings() {
  const value = (id) => Number($(id).value);
  return Object.fromEntries(["temperature", "topK", "topP", "minP"].map((id) => [id, value(id)]));
}

// What each setting cuts, in the order in which they cut (lesson 09_generate).
function stages(logits, chosen) {
  const { temperature, topK, topP } = chosen;
  return [
    ["top-k", keep(logits, { temperature, topK })],
    ["top-p", keep(logits, { temperature, topK, topP })],
    ["min-p", keep(logits, chosen)],
  ];
}

// The likeliest tokens; those that the settings leave out are grey, with what cut them.
function drawNext() {
  $("left").textContent = "";
  if (!seen?.logits) return $("next").replaceChildren();
  const chosen = settings();
  const all = softmax(seen.logits.map((value) => value / (chosen.temperature || 1e-6)));
  const cuts = chosen.temperature ? stages(seen.logits, chosen) : [["", all]];
  const kept = cuts.at(-1)[1];
  const order = [...all.keys()].sort((a, b) => seen.logits[b] - seen.logits[a]).slice(0, SHOWN);
  const bars = order.map((id) => {
    const isCut = chosen.temperature && kept[id] === 0;
    const bar = element("div", "", { className: isCut ? "bar cut" : "bar" });
    bar.append(element("code", visible(names[id])));
    const line = element("i", "");
    const share = isCut ? all[id] : kept[id];
    line.style.width = `${100 * share}%`;
    const by = isCut ? cuts.find(([, p]) => p[id] === 0)[0] : "";
    bar.append(line, element("span", isCut ? `by ${by}` : `${(100 * share).toFixed(1)} %`));
    return bar;
  });
  $("next").replaceChildren(...bars);
  const stay = chosen.temperature ? kept.filter((p) => p > 0).length : 1;
  $("left").textContent = `It draws from ${stay} of ${kept.length} tokens.`;
}

function drawTokens() {
  const [layer, head] = $("head").value.split(".").map(Number);
  const of = (seen.attention ?? []).find((a) => a.layer === layer);
  const spans = seen.tokens.map((text, i) => {
    const place = i === seen.at ? "at" : i > seen.at ? "after" : "";
    const span = element("span", text.replace(/\n/g, "⏎\n"), { className: place });
    const weight = of?.weights[head][i] ?? 0;
    if (weight > 0.005) {
      span.style.background = `rgb(0 114 178 / ${Math.round(60 * Math.sqrt(weight))}%)`;
      span.title = `${(100 * weight).toFixed(1)} %`;
    }
    span.onclick = () => {
      setSlider("at", i);
      lookFrom();
    };
    return span;
  });
  $("tokens").replaceChildren(...spans);
}

$("head").onchange = () => seen && drawTokens();
$("write").onclick = async () => {
  say("It writes …");
  const seed = Math.floor(Math.random() * 2 ** 32);
  const wish = { ...settings(), seed, maxNewTokens: 80, stopIds: given.stopIds };
  const show = ({ text }) => ($("said").textContent = text);
  const question = { text: $("text").value, ...off(), settings: wish };
  const written = await thread.ask("writing", "writeOn", question, show);
  show(written);
  say(written.text ? "It has stopped." : "It has nothing to add.");
};
let example = 0;
$("another").onclick = () => {
  example += 1;
  const own = given.examples[example % given.examples.length];
  setText(given.isOfTheWorld ? storyWithQuestion() : own);
  $("said").textContent = "";
  textChanged();
};
for (const id of ["temperature", "topK", "topP", "minP"]) onSlide(id, drawNext);
onSlide("at", lookFrom);

function storyWithQuestion() {
  const told = story(Math.random);
  const w = reply([told.join("\n")]).world;
  const [thing] = w.things();
  return [...told, `Where is the ${thing}? In the`].join("\n");
}

// All other pictures wait for this one.
const firstLook = opened.then(({ about, names: all }) => {
  names = all;
  fillSelect($("head"), headNames(about));
  return look($("text").value);
});
firstLook.then(() => {
  const section = $(location.hash.slice(1)); // the text above it has grown
  section?.scrollIntoView();
});
