// *Break it*: the engine with one mistake in it, beside the right one. A mistake is an edit of the
// engine's source, as in the course's pages of mistakes: each `right` stands in it exactly once.

"use strict";
// A reader that lets every token look at all keys: the first time a layer's keys are made, the
// second time they are all there.
const READ_BY_TOKEN = `
    let logits = null;
    for (const id of ids) logits = this.forward(id, context, context.length || ids.length);
    return logits;
`;
const READ_BY_LAYER = `
    let xs = ids.map((id) => this.embed(id));
    for (let i = 0; i < this.layers; i++) {
      let ys = [];
      for (const isWhole of [false, true]) {
        Object.assign(context, { isWhole, length: 0 });
        ys = [];
        for (const x of xs) {
          ys.push(this.block(i, x, context));
          context.length += 1;
        }
      }
      xs = ys;
      context.watch.layers?.push(xs.at(-1));
    }
    context.isWhole = false;
    return this.head(xs.at(-1));
`;

const BUGS = [
  {
    name: "no 1/√d in attention",
    edits: [["return dot / Math.sqrt(dim);", "return dot;"]],
    why: "The scores are too large, so each head looks at nearly one token only.",
    lesson: "06_attention",
  },
  {
    name: "RoPE with neighbours as pairs",
    edits: [
      ["[x[at + j], x[at + j + half]];", "[x[at + 2 * j], x[at + 2 * j + 1]];"],
      ["x[at + j] = a * cos", "x[at + 2 * j] = a * cos"],
      ["x[at + j + half] = b * cos", "x[at + 2 * j + 1] = b * cos"],
    ],
    why: "A fine RoPE, and not the one that these weights were trained with.",
    lesson: "05_rope",
  },
  {
    name: "RoPE with another base",
    edits: [["this.theta = rope.rope_theta", "this.theta = 1e6; rope.rope_theta"]],
    why: "The slow hands turn too slowly. Near tokens hardly notice, far ones do.",
    lesson: "05_rope",
  },
  {
    name: "RoPE on the values too",
    edits: [["kept.values.push(v);", "applyRope(v, angle, this.dim); kept.values.push(v);"]],
    why: "What is taken over from a token now depends on where it stands.",
    lesson: "05_rope",
  },
  {
    name: "the query's position off by one",
    edits: [
      [
        "applyRope(q, angle, this.dim);",
        "applyRope(q, angles(context.length + 1, this.turned, base), this.dim);",
      ],
    ],
    why: "Every token believes that all others are one place farther away.",
    lesson: "09a_cache",
  },
  {
    name: "all positions off by one",
    edits: [["angles(context.length, this.turned", "angles(context.length + 1, this.turned"]],
    why: "Only distances count, and no distance has changed: this mistake cannot be seen, except "
      + "in the rounding. “Turn the hands” shows why.",
    lesson: "05_rope",
  },
  {
    name: "no causal mask",
    edits: [
      [READ_BY_TOKEN, READ_BY_LAYER],
      ["kept.keys.push(k);", "if (!context.isWhole) kept.keys.push(k);"],
      ["kept.values.push(v);", "if (!context.isWhole) kept.values.push(v);"],
    ],
    why: "While it reads, each token also looks at those behind it. It was trained never to. (The "
      + "right engine reads token by token and could not, so more lines had to change.)",
    lesson: "06_attention",
  },
  {
    name: "wrong key heads for the query heads",
    edits: [["Math.floor(h / (heads / kvHeads)) * dim", "(h % kvHeads) * dim"]],
    why: "Heads that share keys are neighbours. Here they are dealt out like cards.",
    lesson: "06a_gqa",
  },
  {
    name: "no norm of queries and keys",
    edits: [["if (weight) normHeads(y, weight, this.eps, this.zeroCentred);", ""]],
    why: "Qwen3's own. Without it the scores have another size in every head.",
    lesson: "13_qwen3",
  },
  {
    name: "eps outside the root",
    edits: [
      ["1 / Math.sqrt(squares / x.length + eps)", "1 / (Math.sqrt(squares / x.length) + eps)"],
    ],
    why: "The text stays, and a test with a loose tolerance stays green. Look at the scale.",
    lesson: "04_rmsnorm",
  },
  {
    name: "gate and up swapped",
    edits: [
      ["const gated = linear(x, gate).map(silu);", "const gated = linear(x, up).map(silu);"],
      ["const inner = linear(x, up).map(", "const inner = linear(x, gate).map("],
    ],
    why: "Both matrices have the same shape, so nothing complains.",
    lesson: "07_swiglu",
  },
  {
    name: "attention not added to the stream",
    edits: [["x = add(x, isDelta", "x = (isDelta"]],
    why: "The stream is lost: nothing of the token itself goes on.",
    lesson: "08_model",
  },
  {
    name: "no last norm",
    edits: [["return linear(normed, this.w(this.tied", "return linear(x, this.w(this.tied"]],
    why: "All layers are right; only the logits have another size, and the channels other weights.",
    lesson: "08_model",
  },
];

// The engine's source with a mistake in it. An error if the mistake does not fit it.
function brokenEngine(source, edits) {
  for (const [right, wrong] of edits) {
    const parts = source.split(right);
    const times = parts.length - 1;
    if (times !== 1) throw new Error(`the engine has this ${times} times: ${right}`);
    source = parts.join(wrong);
  }
  return source;
}

// ‖wrong − right‖ / ‖right‖
function relativeError(wrong, right) {
  let [apart, size] = [0, 0];
  right.forEach((value, c) => {
    apart += (wrong[c] - value) ** 2;
    size += value ** 2;
  });
  return Math.sqrt(apart / size);
}

let broken = null; // {thread, name}

// The second worker, with the same weights.
async function breakIt(bug) {
  if (broken?.name === bug.name) return broken.thread;
  broken?.thread.worker.terminate();
  broken = { name: bug.name, thread: new Thread(brokenEngine($("engine").textContent, bug.edits)) };
  await broken.thread.ask("page", "open", { file, config, vocabulary });
  return broken.thread;
}

async function readBroken(text) {
  const bug = BUGS[$("bug").selectedIndex];
  drawBug(bug);
  const wish = { temperature: 0, maxNewTokens: 24, stopIds: given.stopIds };
  const question = { text, settings: wish };
  const rightOne = thread.ask("break", "compare", question);
  const other = await breakIt(bug);
  const wrongOne = other.ask("break", "compare", question);
  const [right, wrong] = await Promise.all([rightOne, wrongOne]);
  if (broken.thread === other) drawBroken(right, wrong);
}

function drawBug({ why, edits, lesson }) {
  const href = `https://github.com/qwen-nb/qwen_nb/blob/main/nbs/${lesson}.ipynb`;
  const link = element("a", lesson, { href });
  $("why").replaceChildren(`${why} Lesson `, link, ".");
  const lines = edits.flatMap(([right, wrong]) => [
    element("del", lined("- ", right), { className: "no" }),
    element("ins", lined("+ ", wrong), { className: "yes" }),
  ]);
  $("diff").replaceChildren(...lines);
}

function lined(sign, code) {
  return code.trim().split("\n").map((line) => `${sign}${line.trimEnd()}\n`).join("");
}

function drawBroken(right, wrong) {
  $("right").textContent = right.text;
  const same = wrong.text === right.text ? "\n(the same text)" : "";
  $("wrong").textContent = wrong.text + same;
  const errors = right.layers.map((x, i) => [i, relativeError(wrong.layers[i], x)]);
  if (right.layers.length) errors.push([errors.length, relativeError(wrong.logits, right.logits)]);
  const least = -9; // nothing in float32 is told apart below
  const points = errors.map(([i, error]) => [i, Math.max(least, Math.log10(error || 1e-99))]);
  const nameOf = (i, word = "") => (i === right.layers.length ? "logits" : `${word}${i}`);
  const named = errors.map(([i, error]) => `${nameOf(i, "layer ")}: ${error.toPrecision(2)}`);
  chart($("depth"), {
    lines: [{ points, colour: "var(--error)", dots: true }],
    x: {
      from: -0.3,
      to: right.layers.length + 0.3,
      name: "after layer",
      ticks: points.map(([at]) => ({ at, name: nameOf(at) })),
    },
    y: {
      from: least,
      to: 1,
      name: "error, as a share of the right numbers",
      ticks: [
        { at: least, name: "none" },
        { at: -6, name: "10⁻⁶" },
        { at: -3, name: "10⁻³" },
        { at: 0, name: "1" },
      ],
    },
    label: `The relative error after each layer at the last token. ${named.join("; ")}`,
  });
}

fillSelect($("bug"), BUGS.map(({ name }) => [name, name]));
$("bug").onchange = () => readBroken($("text").value);
addPicture("break", readBroken);
