"""The front page: the map of the course, the three ways, and the navigation of the whole site."""

import html
from pathlib import Path

from nav import building, is_mistakes, lessons, number_of, settings, value_of

HERE = Path(__file__).resolve().parent


def toctree(entries, caption="", hidden=True):
    "The pages below a page: (title, page) each."
    lines = ["```{toctree}"] + [":hidden:"] * hidden
    if caption:
        lines.append(f":caption: {caption}")
    return "\n".join(lines + ["", *(f"{title} <{page}>" for title, page in entries), "```"])


def course_map():
    "The course as rows of boxes, each a link, as wide as the lesson takes to read."
    short, found, rows = value_of("SHORT"), lessons(), []
    for part, numbers in value_of("ROWS").items():
        boxes = []
        for name, title, _, minutes in found:
            if name[:2] not in numbers.split():
                continue
            kind = "short" if name in short else "mistakes" if is_mistakes(name) else ""
            kind = kind or ("training" if name[0] == "2" else "more")
            shown = "" if kind == "mistakes" else number_of(name)
            said = html.escape(f"{number_of(name)}: {title} {minutes} minutes", quote=True)
            boxes.append(
                f'<a class="{kind}" style="flex-grow:{minutes};flex-basis:{minutes * 0.6:.0f}px" '
                f'href="nbs/{name}.html" title="{said}" aria-label="{said}">{shown}</a>'
            )
        rows.append(f'<div class="row"><span>{part}</span><div>{"".join(boxes)}</div></div>')
    return "".join(rows)


def hours():
    "How long the three ways take to read."
    minutes = {name: m for name, _, _, m in lessons()}
    sums = dict(
        short=sum(minutes[name] for name in value_of("SHORT")),
        training=sum(m for name, m in minutes.items() if name[0] == "2"),
        whole=sum(minutes.values()),
    )
    return {way: f"{total / 60:.0f} hours" for way, total in sums.items()}


def entry(name, titles, folder="nbs"):
    return f"{number_of(name)} · {titles[name]}", f"/{folder}/{name}"


def front(parts, titles):
    "The page that a visitor sees first, with the navigation of the whole site."
    text = (HERE / "front.md").read_text(encoding="utf-8")
    facts = hours() | dict(
        map=course_map(), git=settings()["git_url"], repo=settings()["repo"],
        lessons=str(len(titles)),
    )
    for name, value in facts.items():
        text = text.replace("{{" + name + "}}", value)
    begin = [("About the course", "/nbs/index")]
    trees = [toctree(begin, "Begin")]
    for part, chapters in parts.items():
        entries = [entry(name, titles) for name in chapters]
        if part == "Build it yourself":
            entries.append(("The building edition", "/building/index"))
        trees.append(toctree(entries, part))
    look_up = [("Glossary", "/nbs/glossary"), ("API reference", "/api/index")]
    trees.append(toctree(look_up, "Look up"))
    return "\n\n".join([text, *trees]) + "\n"


def building_index(titles):
    text = (HERE / "building.md").read_text(encoding="utf-8")
    entries = [entry(name, titles, "building") for name in building()]
    return text + "\n" + toctree(entries, hidden=False) + "\n"
