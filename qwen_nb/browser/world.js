// The made-up world (lesson 03e_world): what is true after a story, and what may happen next.
// Functions are named as in `qwen_nb.world`, and the tests compare them with it.

"use strict";
const PEOPLE = "Max Anna Tom Lily Sam Emma Ben Nora".split(" ");
const PLACES = "kitchen garden library attic market".split(" ");
const THINGS = "ball book key lamp cup map".split(" ");
const EVENT_WEIGHTS = { go: 4, take: 3, drop: 1, give: 2 };
const SMALL_TALK = {
  "Hello!": "Hello! Tell me who is where, and ask me.",
  "Who are you?": "I am a small Qwen. I know people, places and things.",
  "Thank you!": "You are welcome.",
  "Goodbye.": "Goodbye!",
};

// What is true at one moment. `at`: a person, or a thing that lies about → place;
// `has`: a thing that is carried → person.
class World {
  constructor() {
    this.at = new Map();
    this.has = new Map();
  }
  lies(what, where) {
    this.has.delete(what);
    this.at.set(what, where);
  }
  carries(who, what) {
    this.at.delete(what);
    this.has.set(what, who);
  }
  place(name) {
    return this.at.get(this.has.get(name) ?? name);
  }
  people() {
    return [...this.at.keys()].filter((name) => PEOPLE.includes(name));
  }
  things() {
    return [...this.at.keys(), ...this.has.keys()].filter((name) => THINGS.includes(name));
  }
  knows(name) {
    return this.at.has(name) || this.has.has(name);
  }
}

// What each sentence does. A thing that is carried lies nowhere, and the other way round.
const A_PERSON = `(${PEOPLE.join("|")})`;
const A_PLACE = `(${PLACES.join("|")})`;
const A_THING = `(${THINGS.join("|")})`;
const SENTENCES = [
  [`${A_PERSON} is in the ${A_PLACE}`, (w, who, where) => w.at.set(who, where)],
  [`The ${A_THING} is in the ${A_PLACE}`, (w, what, where) => w.lies(what, where)],
  [`${A_PERSON} has the ${A_THING}`, (w, who, what) => w.carries(who, what)],
  [`${A_PERSON} went to the ${A_PLACE}`, (w, who, where) => w.at.set(who, where)],
  [`${A_PERSON} took the ${A_THING}`, (w, who, what) => w.carries(who, what)],
  [`${A_PERSON} dropped the ${A_THING}`, (w, who, what) => w.lies(what, w.at.get(who))],
  [`${A_PERSON} gave the ${A_THING} to ${A_PERSON}`, (w, _, what, to) => w.carries(to, what)],
].map(([pattern, happen]) => [new RegExp(`^${pattern}\\.$`), happen]);

function sentencesOf(text) {
  return (text.match(/[^.?!\n]+[.?!]?/g) ?? []).map((s) => s.trim()).filter(Boolean);
}

// Change the world by a sentence. False for one that tells nothing.
function hear(w, sentence) {
  for (const [pattern, happen] of SENTENCES) {
    const found = sentence.match(pattern);
    if (!found) continue;
    happen(w, ...found.slice(1));
    return true;
  }
  return false;
}

// The question at the end of a text: its kind ("who", "person" or "thing") and the name in it.
function questionIn(text) {
  const last = sentencesOf(text).at(-1) ?? "";
  const [, whose] = last.match(new RegExp(`^Who has the ${A_THING}\\?$`)) ?? [];
  if (whose) return { kind: "who", name: whose };
  const [, what] = last.match(new RegExp(`^Where is the ${A_THING}\\?$`)) ?? [];
  if (what) return { kind: "thing", name: what };
  const [, who] = last.match(new RegExp(`^Where is ${A_PERSON}\\?$`)) ?? [];
  return who ? { kind: "person", name: who } : null;
}

// The one right answer to a question about the world as it is.
function answerTo(w, { kind, name }) {
  if (!w.knows(name) || (kind !== "who" && !w.place(name))) return "I do not know.";
  if (kind === "who") return `${w.has.get(name) ?? "Nobody"}.`;
  return `In the ${w.place(name)}.`;
}

function tellsAbout(sentence, { kind, name }) {
  const begins = (words) => sentence.startsWith(words);
  if (kind === "person") return begins(`${name} is in`) || begins(`${name} went`);
  return begins(`The ${name} is`) || sentence.includes(`the ${name}`);
}

// The facts that answer: the last sentence about the name; for a thing also where that is.
function thought(w, told, question) {
  const { kind, name } = question;
  if (answerTo(w, question) === "I do not know.") {
    return `Nobody told me about ${kind === "person" ? name : `the ${name}`}.`;
  }
  const facts = [told.findLast((sentence) => tellsAbout(sentence, question))];
  const place = `${w.has.get(name) ?? `The ${name}`} is in the ${w.place(name)}.`;
  if (kind === "thing" && !facts.includes(place)) facts.push(place);
  return facts.join(" ");
}

// What is right to say to a user who has said all this: `{answer, thought, world}`.
function reply(texts) {
  const w = new World();
  const told = texts.flatMap(sentencesOf).filter((sentence) => hear(w, sentence));
  const last = texts.at(-1);
  const question = questionIn(last);
  if (question) {
    return { answer: answerTo(w, question), thought: thought(w, told, question), world: w };
  }
  const talk = SMALL_TALK[last.trim()];
  const isTold = sentencesOf(last).every((sentence) => hear(new World(), sentence));
  const answer = talk ?? (isTold ? "I see." : null); // null: not a thing of this world
  return { answer, thought: "No question.", world: w };
}

// Every question that can be asked about the world.
function questionsOf(w) {
  const things = w.things().flatMap((t) => [`Who has the ${t}?`, `Where is the ${t}?`]);
  return [...things, ...w.people().map((p) => `Where is ${p}?`)];
}

// Everything that may happen next: from kind to sentences.
function events(w) {
  const found = { go: [], take: [], drop: [], give: [] };
  for (const p of w.people()) {
    const elsewhere = PLACES.filter((place) => place !== w.at.get(p));
    found.go.push(...elsewhere.map((place) => `${p} went to the ${place}.`));
    for (const t of w.things()) {
      const isHere = !w.has.has(t) && w.at.get(t) === w.at.get(p);
      if (isHere) found.take.push(`${p} took the ${t}.`);
    }
  }
  for (const [t, p] of [...w.has].sort()) {
    found.drop.push(`${p} dropped the ${t}.`);
    for (const q of w.people()) {
      const canGive = q !== p && w.at.get(q) === w.at.get(p);
      if (canGive) found.give.push(`${p} gave the ${t} to ${q}.`);
    }
  }
  return Object.fromEntries(Object.entries(found).filter(([, some]) => some.length));
}

// One of the options, each as likely as its weight says. `random` gives numbers from 0 to 1.
function pickOne(random, options, weights = options.map(() => 1)) {
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  return options[Math.max(0, weights.findIndex((weight) => (left -= weight) < 0))];
}

// A story without questions: its sentences.
function story(random, nEvents = 3) {
  const w = new World();
  const told = [];
  const tell = (sentence) => hear(w, sentence) && told.push(sentence);
  const shuffled = (names) => [...names].sort(() => random() - 0.5);
  const place = () => pickOne(random, PLACES);
  for (const name of shuffled(PEOPLE).slice(0, pickOne(random, [2, 3]))) {
    tell(`${name} is in the ${place()}.`);
  }
  for (const thing of shuffled(THINGS).slice(0, pickOne(random, [1, 2]))) {
    const isCarried = random() < 0.5;
    if (isCarried) tell(`${pickOne(random, w.people())} has the ${thing}.`);
    else tell(`The ${thing} is in the ${place()}.`);
  }
  for (let n = 0; n < nEvents; n++) {
    const possible = events(w);
    const kinds = Object.keys(possible);
    const kind = pickOne(random, kinds, kinds.map((k) => EVENT_WEIGHTS[k]));
    tell(pickOne(random, possible[kind]));
  }
  return told;
}
