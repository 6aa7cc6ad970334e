"""Previous and next follow the course's own chain, through pages of mistakes where it does."""

import json
from html import escape
from pathlib import Path


def neighbours(chain, name):
    "The names before and after one in the chain, or None."
    i = chain.index(name)
    return chain[i - 1] if i else None, chain[i + 1] if i + 1 < len(chain) else None


def set_neighbours(app, pagename, templatename, context, doctree):
    folder, _, name = pagename.partition("/")
    if folder != "nbs" or name not in app.course_chain:
        return
    for key, other in zip(("prev", "next"), neighbours(app.course_chain, name)):
        context[key] = other and dict(
            link=app.builder.get_relative_uri(pagename, f"nbs/{other}"),
            title=escape(app.env.titles[f"nbs/{other}"].astext()),
        )


def setup(app):
    given = json.loads((Path(app.srcdir) / "order.json").read_text())
    app.course_chain = given["chain"]
    app.connect("html-page-context", set_neighbours, priority=900)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
