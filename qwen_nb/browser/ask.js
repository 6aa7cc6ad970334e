// *Ask it*: a conversation about the made-up world, and what is true in it. `reply` is world.js's.

"use strict";
let messages = []; // {role, content}
let rightSoFar = 0;
let askedSoFar = 0;

// A verdict in words and in colour.
function verdict(said, truth, what) {
  const line = (words, className) => element("p", words, { className: `verdict ${className}` });
  if (truth === null) return line("not of this world: nobody can tell", "");
  const isRight = said === truth;
  const words = isRight ? `✓ ${what} is right` : `✗ ${what} is wrong. Right: ${truth}`;
  return line(words, isRight ? "good" : "bad");
}

// What it wrote, as its thought and its answer.
function partsOf(text) {
  const [, thinks, rest] = text.match(/^<think>\n?([^]*?)(?:\n?<\/think>\s*([^]*))?$/) ?? [];
  return thinks === undefined ? { thinks: "", answer: text } : { thinks, answer: rest ?? "" };
}

function users() {
  return messages.filter(({ role }) => role === "user").map(({ content }) => content);
}

// One message after the other: who asks while it speaks is answered then.
let spoken = Promise.resolve();

function sendMessage(text) {
  const talk = messages;
  if (text.trim()) spoken = spoken.then(() => speak(text, talk));
}

async function speak(text, talk) {
  if (talk !== messages) return; // a new story has begun
  messages.push({ role: "user", content: text });
  drawTruth();
  const thinks = $("thinks").checked;
  const thoughtLine = element("p", "", { className: "thought" });
  const said = element("div", "…", { className: "said" });
  const box = element("div", "");
  box.append(element("p", text, { className: "user" }), thoughtLine, said);
  $("log").append(box);
  const show = (written) => {
    const { thinks: why, answer } = partsOf(written.text);
    thoughtLine.textContent = why && `It thinks: ${why}`;
    said.textContent = answer || "…";
    $("log").scrollTop = $("log").scrollHeight;
  };
  const wish = { temperature: 0, maxNewTokens: 80, stopIds: given.stopIds };
  $("log").setAttribute("aria-busy", "true"); // read aloud when it is whole
  const written = await thread.ask("chat", "writeOn", { messages, thinks, settings: wish }, show);
  $("log").setAttribute("aria-busy", "false");
  if (talk !== messages) return;
  show(written);
  judge(box, said, partsOf(written.text));
  if (written.read > given.config.max_position_embeddings - 100) {
    box.append(element("p", "The talk is nearly as long as it can read: take a new story."));
  }
  messages.push({ role: "assistant", content: said.textContent });
}

function judge(box, said, { thinks, answer }) {
  const truth = reply(users());
  if (truth.answer !== null) {
    askedSoFar += 1;
    rightSoFar += answer === truth.answer;
    if (answer !== truth.answer) said.classList.add("wrong");
  }
  box.append(verdict(answer, truth.answer, "the answer"));
  if (thinks && truth.answer !== null) box.append(verdict(thinks, truth.thought, "the thought"));
  $("score").textContent = `${rightSoFar} of ${askedSoFar} answers were right.`;
  $("log").scrollTop = $("log").scrollHeight;
}

// Where everybody and everything is, by a simulator that reads the same sentences.
function drawTruth(heard = users()) {
  const { world } = reply(heard.length ? heard : [""]);
  const row = (name, words) => {
    const made = element("tr", "");
    made.append(element("th", name, { scope: "row" }), element("td", words));
    return made;
  };
  const of = (name) => (world.place(name) ? `in the ${world.place(name)}` : "nobody said where");
  const people = world.people().map((name) => row(name, of(name)));
  const things = world.things().map((name) => {
    const holder = world.has.get(name);
    return row(`the ${name}`, holder ? `with ${holder}, ${of(name)}` : of(name));
  });
  $("truth").tBodies[0].replaceChildren(...people, ...things);
  fillButtons($("questions"), questionsOf(world), sendMessage);
}

function newTale(told) {
  messages = [];
  [rightSoFar, askedSoFar] = [0, 0];
  $("log").replaceChildren();
  $("score").textContent = "";
  $("words").value = "";
  const world = reply([told]).world;
  const thing = world.things()[0];
  sendMessage(`${told} Where is the ${thing}?`);
}

$("say").onsubmit = (event) => {
  event.preventDefault();
  sendMessage($("words").value.trim());
  $("words").value = "";
};
$("words").onkeydown = (event) => {
  const isSent = event.key === "Enter" && !event.shiftKey;
  if (!isSent) return;
  event.preventDefault();
  $("say").requestSubmit();
};
$("tale").onclick = () => newTale(story(Math.random).join(" "));

if (given.isOfTheWorld) {
  const first = sentencesOf($("text").value).filter((sentence) => hear(new World(), sentence));
  drawTruth([first.join(" ")]);
  firstLook.then(() => newTale(first.join(" ")));
} else {
  $("ask").hidden = true;
  document.querySelector('a[href="#ask"]').hidden = true;
}
