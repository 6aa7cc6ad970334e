"use strict";

// Terms of the glossary: what a term means, beside it, while it is pointed at or has the focus.

function place(card, term) {
  const box = term.getBoundingClientRect(), edge = 16;
  card.hidden = false;
  const widest = document.documentElement.clientWidth - card.offsetWidth - edge;
  const below = box.bottom + card.offsetHeight + edge < window.innerHeight;
  const top = below ? box.bottom + 6 : box.top - card.offsetHeight - 6;
  card.style.left = window.scrollX + Math.max(edge, Math.min(box.left, widest)) + "px";
  card.style.top = window.scrollY + top + "px";
}

function termCards() {
  const card = document.createElement("div");
  card.id = "said";
  card.role = "tooltip";
  card.hidden = true;
  document.body.append(card);
  const hide = () => { card.hidden = true; };

  for (const term of document.querySelectorAll("a.term")) {
    const sentence = term.title;
    term.removeAttribute("title");     // or the browser would show it a second time
    const show = () => {
      card.textContent = sentence;
      term.setAttribute("aria-describedby", card.id);
      place(card, term);
    };
    // A finger has no hover: its first tap shows (by the focus), the second follows the link.
    let follows = true;
    const byMouse = (then) => (event) => { if (event.pointerType !== "touch") then(); };
    term.addEventListener("pointerenter", byMouse(show));
    term.addEventListener("pointerleave", byMouse(hide));
    term.addEventListener("focus", show);
    term.addEventListener("blur", hide);
    term.addEventListener("pointerdown", (event) => {
      const isShown = !card.hidden && card.textContent === sentence;
      follows = event.pointerType !== "touch" || isShown;
    });
    term.addEventListener("click", (event) => {
      if (!follows) { event.preventDefault(); show(); }
      follows = true;
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
}

// The theme's arrows that open a chapter have no name for those who hear the page.
function nameArrows() {
  for (const arrow of document.querySelectorAll(".bd-sidenav summary")) {
    arrow.setAttribute("aria-label", "the pages of this chapter");
  }
}

document.addEventListener("DOMContentLoaded", () => { termCards(); nameArrows(); });
