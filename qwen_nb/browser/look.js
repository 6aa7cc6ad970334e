// What the page shows of a small Qwen, and what a visitor can change. The model itself is in a
// worker; here are only the pictures. `keep` and `softmax` are the engine's.

"use strict";
const SHOWN = 10; // of the next tokens
const $ = (id) => document.getElementById(id);
const given = JSON.parse($("model").textContent);
const headsOff = new Set();
const mlpsOff = new Set();
let number = 0;
let seen = null; // what the worker last told
let looked = null; // "layer.head"
let example = 0;

const script = $("engine").textContent + "\n" + $("worker").textContent;
const worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));

function ask(kind, more = {}) {
  number += 1;
  const off = { headsOff: [...headsOff], mlpsOff: [...mlpsOff] };
  worker.postMessage({ kind, number, text: $("text").value, ...off, ...more });
}

worker.onerror = (event) => say(`Something is wrong: ${event.message}`);
worker.onmessage = ({ data }) => {
  if (data.number !== number) return;
  if (data.kind === "open") {
    drawHeads(data);
    ask("look");
  } else if (data.kind === "look") {
    seen = data;
    say(seen.tokens.length ? `${seen.tokens.length} tokens` : "Write something for it to read.");
    draw();
  } else {
    $("said").textContent = data.text;
    if (data.kind === "writeOn") say(data.text ? "It has stopped." : "It has nothing to add.");
  }
};

function say(text) {
  $("state").textContent = text;
}

function settings() {
  const value = (id) => Number($(id).value);
  return Object.fromEntries(["temperature", "topK", "topP", "minP"].map((id) => [id, value(id)]));
}

// A blank and a line break would not be seen.
function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
}

function element(tag, text, properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...properties });
}

function draw() {
  if (!seen) return;
  drawNext();
  drawTokens();
  const rows = (seen.lens ?? []).map(({ text, share }, i) => {
    const row = element("tr", "");
    row.append(element("th", `layer ${i + 1}`, { scope: "row" }));
    const guess = element("td", "");
    guess.append(element("code", visible(text)));
    row.append(guess, element("td", `${Math.round(100 * share)} %`));
    return row;
  });
  $("lens").tBodies[0].replaceChildren(...rows);
}

// The likeliest tokens; those that the settings leave out are grey.
function drawNext() {
  if (!seen.logits) return $("next").replaceChildren();
  const chosen = settings();
  const temperature = chosen.temperature || 1e-6;
  const all = softmax(Array.from(seen.logits, (value) => value / temperature));
  const kept = chosen.temperature ? keep(seen.logits, chosen) : all;
  const order = [...all.keys()].sort((a, b) => seen.logits[b] - seen.logits[a]).slice(0, SHOWN);
  const bars = order.map((id) => {
    const isCut = chosen.temperature && kept[id] === 0;
    const share = isCut ? all[id] : kept[id];
    const bar = element("div", "", { className: isCut ? "bar cut" : "bar" });
    bar.append(element("code", visible(seen.names[id])));
    const line = element("i", "");
    line.style.width = `${100 * share}%`;
    bar.append(line, element("span", isCut ? "left out" : `${(100 * share).toFixed(1)} %`));
    return bar;
  });
  $("next").replaceChildren(...bars);
}

function drawTokens() {
  const [layer, head] = (looked ?? "").split(".").map(Number);
  const of = (seen.attention ?? []).find((a) => a.layer === layer);
  const spans = seen.tokens.map((text, i) => {
    const span = element("span", text.replace(/\n/g, "⏎\n"));
    const weight = looked && of ? of.weights[head][i] : 0;
    if (weight > 0.005) {
      span.style.background = `rgb(0 114 178 / ${Math.round(60 * Math.sqrt(weight))}%)`;
      span.title = `${(100 * weight).toFixed(1)} %`;
    }
    return span;
  });
  $("tokens").replaceChildren(...spans);
}

function drawHeads({ layers, heads, kinds }) {
  const rows = Array.from({ length: layers }, (_, layer) => {
    const row = element("tr", "");
    row.append(element("th", `layer ${layer + 1}`, { scope: "row" }));
    const isState = kinds?.[layer] === "linear_attention";
    for (let head = 0; head < heads && !isState; head++) {
      const name = `layer ${layer + 1}, head ${head + 1}`;
      row.append(toggle(`${head + 1}`, name, headsOff, `${layer}.${head}`));
    }
    if (isState) row.append(element("td", "a state, no heads to look with", { colSpan: heads }));
    row.append(toggle("MLP", `layer ${layer + 1}, MLP`, mlpsOff, layer));
    return row;
  });
  $("heads").tBodies[0].replaceChildren(...rows);
}

function toggle(label, name, off, key) {
  const button = element("button", label, { type: "button", title: name });
  if (label === "MLP") button.style.width = "3rem";
  button.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-label", `switch off ${name}`);
  button.onclick = () => {
    if (!off.delete(key)) off.add(key);
    button.setAttribute("aria-pressed", String(off.has(key)));
    ask("look");
  };
  button.onfocus = button.onpointerenter = () => {
    if (off !== headsOff) return;
    document.querySelector("button.looked")?.classList.remove("looked");
    button.classList.add("looked");
    looked = key;
    if (seen) drawTokens();
  };
  const cell = element("td", "");
  cell.append(button);
  return cell;
}

let waiting = null;
$("text").oninput = () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => ask("look"), 120);
};
$("write").onclick = () => {
  say("It writes …");
  const seed = Math.floor(Math.random() * 2 ** 32);
  ask("writeOn", { settings: { ...settings(), seed, maxNewTokens: 80, stopIds: given.stopIds } });
};
$("another").onclick = () => {
  example = (example + 1) % given.examples.length;
  $("text").value = given.examples[example];
  $("said").textContent = "";
  ask("look");
};
$("all").onclick = () => {
  headsOff.clear();
  mlpsOff.clear();
  for (const button of document.querySelectorAll("#heads button")) {
    button.setAttribute("aria-pressed", "false");
  }
  ask("look");
};
for (const slider of document.querySelectorAll(".sliders input")) {
  slider.oninput = () => {
    slider.nextElementSibling.textContent = slider.value;
    if (seen) drawNext();
  };
  slider.nextElementSibling.textContent = slider.value;
}
ask("open", given);
