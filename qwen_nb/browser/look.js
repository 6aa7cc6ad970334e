// What all pictures use, and the first two that look into the model: *Inside a token* and
// *Switch it off*. The model is in a worker; here are only the pictures. `keep` and `softmax` are
// the engine's.

"use strict";
const SHOWN = 10; // of the next tokens
const $ = (id) => document.getElementById(id);
const given = JSON.parse($("model").textContent);

// ---- a worker with a model in it --------------------------------------------------------------

class Thread {
  constructor(engine) {
    const script = `${engine}\n${$("worker").textContent}`;
    const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    this.worker = new Worker(address);
    this.number = 0;
    this.waiting = new Map(); // from picture to its newest question
    this.worker.onerror = (event) => say(`Something is wrong: ${event.message}`);
    this.worker.onmessage = ({ data }) => this.hear(data);
  }

  // A promise of the answer. It stays open if the same picture asks again before it comes.
  ask(picture, kind, more = {}, onPiece = () => {}) {
    const number = (this.number += 1);
    this.worker.postMessage({ picture, kind, number, ...more });
    return new Promise((resolve) => this.waiting.set(picture, { number, resolve, onPiece }));
  }

  hear(data) {
    const question = this.waiting.get(data.picture);
    if (question?.number !== data.number) return;
    if (data.kind === "piece") question.onPiece(data);
    else if (data.kind === "failed") say(`Something is wrong: ${data.text}`);
    else question.resolve(data);
  }
}

const thread = new Thread($("engine").textContent);
const { file, config, vocabulary } = given;
const opened = thread.ask("page", "open", { file, config, vocabulary });

// ---- small helpers ----------------------------------------------------------------------------

function say(text) {
  $("state").textContent = text;
}

// A blank and a line break would not be seen.
function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
}

function element(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...properties });
}

function svg(tag, attributes, text = "") {
  const made = document.createElementNS($("scores").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// Fills a <select>; the option that was chosen stays, if it is still there.
function fillSelect(select, options, first = 0) {
  const before = select.selectedOptions[0]?.textContent;
  select.replaceChildren(...options.map(([value, text]) => element("option", text, { value })));
  const again = options.findIndex(([, text]) => text === before);
  select.selectedIndex = again < 0 ? first : again;
}

// Lines over the same axes. Each line: {points: [[x, y], …], colour, name, dots}.
function chart(place, { lines, x, y, label, marks = [] }) {
  const [width, height, left, bottom] = [420, 230, 58, 40];
  const across = (value) => left + ((value - x.from) / (x.to - x.from)) * (width - left - 12);
  const high = height - bottom - 28;
  const up = (value) => height - bottom - ((value - y.from) / (y.to - y.from)) * high;
  const parts = [];
  const text = (px, py, words, more = {}) =>
    parts.push(svg("text", { x: px, y: py, ...more }, words));
  for (const { at, name = String(at) } of y.ticks) {
    const line = { x1: left, x2: width - 12, y1: up(at), y2: up(at), stroke: "var(--line)" };
    parts.push(svg("line", line));
    text(left - 6, up(at) + 4, name, { "text-anchor": "end" });
  }
  for (const { at, name = String(at) } of x.ticks) {
    text(across(at), height - bottom + 16, name, { "text-anchor": "middle" });
  }
  for (const { points, colour, dots } of lines) {
    const path = points.map(([px, py]) => `${across(px).toFixed(1)},${up(py).toFixed(1)}`);
    const look = { fill: "none", stroke: colour, "stroke-width": 2 };
    parts.push(svg("polyline", { points: path.join(" "), ...look }));
    if (!dots) continue;
    for (const point of points) {
      parts.push(svg("circle", { cx: across(point[0]), cy: up(point[1]), r: 4, fill: colour }));
    }
  }
  for (const [mx, my] of marks) {
    const look = { r: 6, fill: "none", stroke: "var(--error)", "stroke-width": 2 };
    parts.push(svg("circle", { cx: across(mx), cy: up(my), ...look }));
  }
  text((left + width) / 2, height - 6, x.name, { "text-anchor": "middle" });
  text(2, 11, y.name);
  place.setAttribute("viewBox", `0 0 ${width} ${height}`);
  place.setAttribute("aria-label", label);
  place.replaceChildren(...parts);
}

// Each slider shows its number, and calls `draw` when it moves.
function onSlide(id, draw, shown = (value) => value) {
  const slider = $(id);
  slider.show = () => (slider.nextElementSibling.textContent = shown(Number(slider.value)));
  slider.addEventListener("input", () => {
    slider.show();
    draw();
  });
  slider.show();
}

function setSlider(id, value, max = $(id).max) {
  Object.assign($(id), { max, value });
  $(id).show();
}

// ---- one text for all pictures, and each drawn when it is seen ---------------------------------

const pictures = []; // {place, read, isOld}

const seeing = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const picture = pictures.find(({ place }) => place === target);
    picture.isSeen = isIntersecting;
    if (isIntersecting && picture.isOld) readAgain(picture);
  }
});

// `read` asks the model about the text, and draws what it says.
function addPicture(id, read) {
  const picture = { place: $(id), read, isOld: true, isSeen: false };
  pictures.push(picture);
  firstLook.then(() => seeing.observe(picture.place));
}

function readAgain(picture) {
  picture.isOld = false;
  return picture.read($("text").value);
}

async function textChanged() {
  for (const picture of pictures) picture.isOld = true;
  await look($("text").value);
  for (const picture of pictures) if (picture.isSeen && picture.isOld) readAgain(picture);
}

function setText(text, typedIn = null) {
  for (const box of document.querySelectorAll(".shared")) if (box !== typedIn) box.value = text;
}

let typing = null;
for (const box of document.querySelectorAll(".shared")) {
  box.oninput = () => {
    setText(box.value, box);
    clearTimeout(typing);
    typing = setTimeout(textChanged, 120);
  };
}
setText($("text").value);

// `page.html?only=hands` shows one picture alone, to stand in another page.
const wanted = new URLSearchParams(location.search).get("only");
const only = [...document.querySelectorAll("main > section")].find(({ id }) => id === wanted);
if (only) {
  document.body.classList.add("only");
  only.classList.add("chosen");
}

// ---- Inside a token ---------------------------------------------------------------------------

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

// ---- Switch it off ----------------------------------------------------------------------------

const looks = (about, layer) => about.kinds?.[layer] !== "linear_attention";

// All heads, by "layer.head".
function headNames({ layers, heads, ...about }) {
  const found = [];
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < heads && looks(about, layer); head++) {
      found.push([`${layer}.${head}`, `layer ${layer}, head ${head}`]);
    }
  }
  return found;
}

function drawHeads(about) {
  const rows = Array.from({ length: about.layers }, (_, layer) => {
    const row = element("tr", "");
    row.append(element("th", `layer ${layer}`, { scope: "row" }));
    for (let head = 0; head < about.heads && looks(about, layer); head++) {
      row.append(toggle(`${head}`, `layer ${layer}, head ${head}`, headsOff, `${layer}.${head}`));
    }
    const words = "a state, no heads to look with";
    if (!looks(about, layer)) row.append(element("td", words, { colSpan: about.heads }));
    row.append(toggle("MLP", `layer ${layer}, MLP`, mlpsOff, layer));
    return row;
  });
  $("heads").tBodies[0].replaceChildren(...rows);
}

function toggle(label, name, set, key) {
  const button = element("button", label, { type: "button", title: name });
  if (label === "MLP") button.style.width = "3rem";
  button.dataset.key = key;
  button.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-label", `switch off ${name}`);
  button.onclick = () => {
    if (!set.delete(key)) set.add(key);
    button.setAttribute("aria-pressed", String(set.has(key)));
    look($("text").value);
  };
  button.onfocus = button.onpointerenter = () => {
    if (set !== headsOff) return;
    document.querySelector("button.looked")?.classList.remove("looked");
    button.classList.add("looked");
    $("head").value = key;
    if (seen) drawTokens();
  };
  const cell = element("td", "");
  cell.append(button);
  return cell;
}

$("all").onclick = () => {
  headsOff.clear();
  mlpsOff.clear();
  for (const button of document.querySelectorAll("#heads button")) {
    button.setAttribute("aria-pressed", "false");
  }
  look($("text").value);
};

// Each head and MLP off by itself: what the answer becomes.
$("each").onclick = async () => {
  clearTried();
  const changed = [];
  const tried = ({ key, share, says }) => {
    const button = document.querySelector(`#heads button[data-key="${key}"]`);
    button.style.background = `rgb(0 114 178 / ${Math.round(55 * share)}%)`;
    button.title = `${button.getAttribute("aria-label")}: it says ${visible(says)}`;
    $("found").textContent = `Without ${key} …`;
    changed.push({ button, says, share });
  };
  const { right } = await thread.ask("each", "eachOff", { text: $("text").value }, tried);
  const lost = changed.filter(({ says }) => says !== right.text);
  for (const { button } of lost) button.classList.add("matters");
  const name = ({ button }) => button.getAttribute("aria-label").replace("switch off ", "");
  const words = lost.map((one) => `without ${name(one)}: ${visible(one.says)}`);
  const all = `The whole model says ${visible(right.text)}`;
  $("found").textContent = lost.length
    ? `${all}; ${words.join("; ")}. Without any other one the answer stays.`
    : `${all}, and no head and no MLP alone is needed for it.`;
};

function clearTried() {
  thread.ask("each", "stop");
  for (const button of document.querySelectorAll("#heads button")) {
    button.style.background = "";
    button.classList.remove("matters");
  }
  $("found").textContent = "";
}

// Other questions about the story in the text, each a button.
function drawAsked(text) {
  const lines = sentencesOf(text).filter((sentence) => hear(new World(), sentence));
  const w = reply([lines.join("\n")]).world;
  const buttons = questionsOf(w).map((question) => {
    const button = element("button", question, { type: "button" });
    const ending = question.startsWith("Where") ? " In the" : "";
    button.onclick = () => {
      setText([...lines, question + ending].join("\n"));
      textChanged();
    };
    return button;
  });
  $("asked").replaceChildren(...(given.isOfTheWorld ? buttons : []));
}

// All other pictures wait for this one.
const firstLook = opened.then(({ about, names: all }) => {
  names = all;
  drawHeads(about);
  fillSelect($("head"), headNames(about));
  return look($("text").value);
});
firstLook.then(() => {
  const section = $(location.hash.slice(1)); // the text above it has grown
  section?.scrollIntoView();
});
addPicture("off", (text) => {
  clearTried();
  drawAsked(text);
});
