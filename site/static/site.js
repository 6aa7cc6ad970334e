// Terms of the glossary: what a term means, beside it, while it is pointed at or has the focus.
"use strict";

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
    term.addEventListener("pointerenter", show);
    term.addEventListener("focus", show);
    term.addEventListener("pointerleave", hide);
    term.addEventListener("blur", hide);
    // A finger has no hover: the first tap shows, the second follows the link.
    term.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "touch" || !card.hidden) return;
      term.addEventListener("click", (tap) => tap.preventDefault(), { once: true });
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
}

document.addEventListener("DOMContentLoaded", termCards);
