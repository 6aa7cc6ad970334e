// *Switch it off*: any head or MLP out of the model (lesson 00c_heads), and what it says then.

"use strict";
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

// Each head and MLP off by itself: what the answer becomes. The bluer, the more it is needed.
$("each").onclick = async () => {
  clearTried();
  const changed = [];
  const tried = ({ key, lost, says }) => {
    const button = document.querySelector(`#heads button[data-key="${key}"]`);
    button.style.setProperty("--tried", `rgb(0 114 178 / ${Math.round(55 * lost)}%)`);
    button.title = `${button.getAttribute("aria-label")}: it says ${visible(says)}`;
    $("found").textContent = `Without ${key} …`;
    changed.push({ button, says });
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
    button.style.removeProperty("--tried");
    button.classList.remove("matters");
  }
  $("found").textContent = "";
}

// Other questions about the story in the text, each a button.
function drawAsked(text) {
  const lines = sentencesOf(text).filter((sentence) => hear(new World(), sentence));
  const w = reply([lines.join("\n")]).world;
  const press = (question) => {
    const ending = question.startsWith("Where") ? " In the" : "";
    setText([...lines, question + ending].join("\n"));
    textChanged();
  };
  fillButtons($("asked"), given.isOfTheWorld ? questionsOf(w) : [], press);
}

opened.then(({ about }) => drawHeads(about));
addPicture("off", (text) => {
  clearTried();
  drawAsked(text);
});
