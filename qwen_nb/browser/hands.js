// *Turn the hands*: RoPE on one head (lesson 05_rope). `angles` is the engine's own.

"use strict";
const farthest = () => Number($("distance").max);
let turning = null; // {tokens, q, k}: of the chosen head, not yet turned
let sizes = null; // of the model

// The pairs of a vector as hands: how long, and at which angle.
function handsOf(x) {
  const half = sizes.turned / 2;
  return Array.from({ length: half }, (_, j) => {
    const [a, b] = [x[j], x[j + half]];
    return { length: Math.hypot(a, b), angle: Math.atan2(b, a) };
  });
}

// What each pair adds to the score when the query stands `distance` after the key.
function pairScores(q, k, turns) {
  return q.map((hand, j) => {
    const between = hand.angle - k[j].angle + turns[j];
    return (hand.length * k[j].length * Math.cos(between)) / Math.sqrt(sizes.dim);
  });
}

// What channels that are not turned add at any distance.
function restScore(q, k) {
  let sum = 0;
  for (let c = sizes.turned; c < sizes.dim; c++) sum += q[c] * k[c];
  return sum / Math.sqrt(sizes.dim);
}

const sumOf = (numbers) => numbers.reduce((sum, value) => sum + value, 0);

async function readHands(text) {
  const [layer, number] = $("hand-head").value.split(".").map(Number);
  turning = await thread.ask("hands", "hands", { text, layer, head: number });
  const last = turning.tokens.length - 1;
  const options = turning.tokens.map((token, i) => [i, `${i}: ${visible(token)}`]);
  fillSelect($("hand-query"), options, last);
  fillSelect($("hand-key"), options, mostLookedAt(last));
  standAsInText();
}

// Where the head looks from a token, itself not counted.
function mostLookedAt(at) {
  const q = handsOf(turning.q[at] ?? []);
  const turns = (n) => angles(at - n, sizes.turned, sizes.theta);
  const turned = (k, n) => sumOf(pairScores(q, handsOf(k), turns(n)));
  const scores = turning.k.slice(0, at).map((k, n) => turned(k, n) + restScore(turning.q[at], k));
  return Math.max(0, scores.indexOf(Math.max(...scores)));
}

// The two tokens as far from each other as they are in the text.
function standAsInText() {
  const apart = Number($("hand-query").value) - Number($("hand-key").value);
  const most = Math.max(128, turning.tokens.length);
  setSlider("distance", Math.max(0, apart), most);
  setSlider("shift", Number($("hand-key").value), most);
  drawHands();
}

function drawHands() {
  if (!turning?.tokens.length) return $("dials").replaceChildren();
  const [qAt, kAt] = ["hand-query", "hand-key"].map((id) => Number($(id).value));
  const [qWhole, kWhole] = [turning.q[qAt], turning.k[kAt]];
  const [q, k] = [handsOf(qWhole), handsOf(kWhole)];
  const [distance, shift] = [Number($("distance").value), Number($("shift").value)];
  const theta = 10 ** Number($("base").value);
  const at = (far) => pairScores(q, k, angles(far, sizes.turned, theta));
  drawDials(q, k, at(distance), theta, shift, shift + distance);
  const rest = restScore(qWhole, kWhole);
  const points = Array.from({ length: farthest() + 1 }, (_, far) => [far, sumOf(at(far)) + rest]);
  drawScores(points, distance);
  const score = points[distance][1];
  $("score-now").textContent = `At distance ${distance} the score is ${score.toFixed(2)}.`;
}

// One clock for each pair. Both hands are turned by the positions of their tokens.
function drawDials(q, k, added, theta, kPlace, qPlace) {
  const longest = Math.max(...[...q, ...k].map((hand) => hand.length));
  const [turnQ, turnK] = [qPlace, kPlace].map((place) => angles(place, sizes.turned, theta));
  const dials = q.map((_, j) => {
    const dial = svg("svg", { viewBox: "-26 -26 52 52", width: 64, "aria-hidden": "true" });
    dial.append(svg("circle", { r: 24, fill: "none", stroke: "var(--line)" }));
    const draw = (hand, turn, stroke) => {
      const far = 3 + (21 * hand.length) / longest;
      const [x2, y2] = [far * Math.cos(hand.angle + turn), -far * Math.sin(hand.angle + turn)];
      dial.append(svg("line", { x2, y2, stroke, "stroke-width": 3, "stroke-linecap": "round" }));
    };
    draw(k[j], turnK[j], "var(--theirs)");
    draw(q[j], turnQ[j], "var(--ours)");
    const figure = element("figure", "");
    figure.append(dial, element("figcaption", `${added[j] < 0 ? "" : "+"}${added[j].toFixed(2)}`));
    return figure;
  });
  $("dials").replaceChildren(...dials);
}

function drawScores(points, distance) {
  const values = points.map(([, y]) => y);
  const [low, high] = [Math.floor(Math.min(...values)), Math.ceil(Math.max(...values))];
  const step = Math.max(1, Math.ceil((high - low) / 5));
  const ticks = [];
  for (let at = low; at <= high; at += step) ticks.push({ at });
  const label = `The score at distances 0 to ${farthest()}, from ${low} to ${high}; `
    + `at distance ${distance} it is ${points[distance][1].toFixed(2)}`;
  chart($("scores"), {
    lines: [{ points, colour: "var(--ours)" }],
    x: {
      from: 0,
      to: farthest(),
      name: "distance of the two tokens",
      ticks: [0, 0.25, 0.5, 0.75, 1].map((part) => ({ at: Math.round(part * farthest()) })),
    },
    y: { from: low, to: high, name: "score, q · k / √d", ticks },
    marks: [points[distance]],
    label,
  });
}

$("hand-head").onchange = () => readHands($("text").value);
for (const id of ["hand-query", "hand-key"]) $(id).onchange = standAsInText;
onSlide("distance", drawHands);
onSlide("shift", drawHands);
onSlide("base", drawHands, (value) => Math.round(10 ** value).toLocaleString("en"));
opened.then(({ about }) => {
  sizes = about;
  const options = headNames(about);
  $("hands").hidden = !options.length;
  fillSelect($("hand-head"), options, Math.min(about.heads + 2, options.length - 1));
  setSlider("base", Math.log10(about.theta));
});
addPicture("hands", readHands);
