"""Terms of the glossary as hover text: where a term first appears on a page, it becomes a link.

The link leads to the glossary and carries the sentence; static/site.js shows it on hover and focus.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from terms import slug

# no links in these
CLOSED = nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.caption, nodes.raw


def is_open(text):
    "May a part of this text become a link?"
    node = text.parent
    while node is not None:
        if isinstance(node, CLOSED) or "exported" in node.get("classes", ()):
            return False
        node = node.parent
    return True


def pattern(terms):
    "Finds any of the terms as whole words; a longer one goes before a shorter one."
    words = "|".join(re.escape(term) for term in sorted(terms, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])")


def linked(term, sentence, glossary):
    link = nodes.reference("", term, refuri=f"{glossary}#{slug(term)}", internal=True)
    link["classes"] += ["term"]
    link["reftitle"] = sentence
    return link


def mark(doctree, terms, glossary):
    "Each term becomes a link where it first appears."
    left = dict(terms)
    find = pattern(left)
    for text in list(doctree.findall(nodes.Text)):
        parts, rest = [], str(text)
        while left and is_open(text) and (match := find.search(rest)):
            term = match[0]
            parts += [nodes.Text(rest[: match.start()])]
            parts += [linked(term, left.pop(term), glossary)]
            rest = rest[match.end() :]
            find = pattern(left)
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(rest)])


def add_links(app, doctree, docname):
    if docname.startswith(("nbs/", "building/")) and docname != "nbs/glossary":
        glossary = app.builder.get_relative_uri(docname, "nbs/glossary")
        mark(doctree, app.course_terms, glossary)


def setup(app):
    app.course_terms = json.loads((Path(app.srcdir) / "order.json").read_text())["terms"]
    app.connect("doctree-resolved", add_links)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
