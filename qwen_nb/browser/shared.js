// What all pictures of the page use: the worker with the model, small helpers, a chart, and the one
// text that all of them show. A picture is drawn when it is seen.

"use strict";
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

// A button for each of the words. If the words are the same as before the buttons stay, and with
// them the keyboard's place.
function fillButtons(place, words, press) {
  const before = [...place.children].map((button) => button.textContent);
  const isSame = JSON.stringify(before) === JSON.stringify(words);
  const made = (word) => element("button", word, { type: "button" });
  if (!isSame) place.replaceChildren(...words.map(made));
  for (const button of place.children) button.onclick = () => press(button.textContent);
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

// ---- heads: "layer.head" ----------------------------------------------------------------------

// Does a layer look back, or does it have a state?
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

// ---- one text for all pictures, and each drawn when it is seen --------------------------------

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

// `page.html?only=hands`, or the wish written into the page, shows one picture alone, to stand in
// another page.
const wanted = new URLSearchParams(location.search).get("only") ?? document.body.dataset.only;
const only = [...document.querySelectorAll("main > section")].find(({ id }) => id === wanted);
if (only) {
  document.body.classList.add("only");
  only.classList.add("chosen");
  document.head.append(element("base", "", { target: "_blank" })); // a lesson opens beside it
}
