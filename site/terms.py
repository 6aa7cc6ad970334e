"""The glossary's terms."""

import re

from nav import ROOT, read


def slug(term):
    return "term-" + re.sub(r"\W+", "-", term.lower()).strip("-")


def named_terms(text):
    "Each term of the glossary can be linked to."
    named = lambda m: f"- [**{m[1]}**]{{#{slug(m[1])}}}"
    return re.sub(r"^- \*\*(.+?)\*\*", named, text, flags=re.M)


def terms():
    "The glossary: {term: its sentence, without links and marks}."
    found = {}
    for cell in read(ROOT / "nbs/glossary.ipynb")["cells"]:
        for term, sentence in re.findall(
            r"^- \*\*(.+?)\*\* \(.*?\)\): (.+)$", "".join(cell["source"]), re.M
        ):
            plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", sentence)
            found[term] = re.sub(r"[`*]", "", plain)
    return found
