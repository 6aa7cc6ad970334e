"""From notebooks to pages: what a reader of the site does not need is taken out, links are added.

Everything is written to a folder that Sphinx reads. Nothing is run.
"""

import base64
import html
import json
import posixpath
import re
import sys
from pathlib import Path

from nav import LIVE, ROOT, building, chain, lessons, number_of, read, tree
from reference import exported_names, label, module_pages

sys.path.insert(0, str(ROOT / "tools"))

from notebooks import settings  # noqa: E402

HERE = Path(__file__).resolve().parent


def address(path):
    "A file of the repository, on the web."
    s = settings()
    return f"{s['git_url']}/blob/{s['branch']}/{path}"


def colab(path):
    s = settings()
    return f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/{path}"


written = set()  # the files of this time


def write(path, content):
    "Write a file, unless it is so already: what has not changed is not built again."
    content = content.encode() if isinstance(content, str) else content
    written.add(path)
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# the line of ways below a title


def ways(folder, name):
    "Read, build, Colab, JupyterLab, live: a line of links, as HTML."
    links = []
    if folder == "building" or name in building():
        for place, label in (("nbs", "Read"), ("building", "Build")):
            here = ' aria-current="page"' * (place == folder)
            links.append(f'<a href="../{place}/{name}.html"{here}>{label}</a>')
    if name in LIVE:
        links.append(f'<a href="../live.html" title="{LIVE[name]}">Live</a>')
    path = f"{folder}/{name}.ipynb"
    links.append(f'<a href="{colab(path)}">Colab</a>')
    links.append(f'<a href="{address(path)}">Source</a>')
    return f'<div class="ways">{"".join(links)}{lab(path)}</div>'


def lab(path):
    "How to open a notebook in JupyterLab on one's own machine."
    s = settings()
    begin = f"git clone {s['git_url']}\ncd {s['repo']} && make install"
    run = f".venv/bin/jupyter lab {path}"
    return (
        '<details class="lab"><summary>Open in JupyterLab</summary>'
        f"<div><p>Once:</p><pre>{begin}</pre><p>Then:</p><pre>{run}</pre></div></details>"
    )


# cells


def is_dropped(source):
    "Cells that only nbdev or Colab needs."
    without = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    return "google.colab" in source or not without


def code_cell(cell):
    "A code cell: nbdev's lines go, a title becomes the label of the fold, pictures get alt text."
    source, mystnb = cell["source"], {}
    title = re.search(r"^#@title (.*?)(?: \{.*)?$", source, re.M)
    cell["source"] = re.sub(r"^#(\||@title).*\n?", "", source, flags=re.M).strip("\n")
    tags = []
    if cell["metadata"].get("jupyter", {}).get("source_hidden"):
        tags = ["hide-input"]
        label = title[1] if title else "Set-up"
        mystnb |= dict(code_prompt_show=label, code_prompt_hide=label)
    for out in cell.get("outputs", []):
        if "text" in out:  # an escape that begins no colour is a byte that the model wrote
            out["text"] = re.sub(r"\x1b(?!\[)", "␛", "".join(out["text"]))
        alt = out.get("metadata", {}).get("image/png", {}).get("alt")
        if alt:
            mystnb["image"] = dict(alt=alt)
    cell["metadata"] = dict(tags=tags, mystnb=mystnb)


def outside(text, folder):
    "Links to files of the repository that are no pages lead to the repository."

    def here(m):
        path = posixpath.normpath(f"{folder}/{m[2]}")
        is_page = re.match(r"(nbs|building)/\w+\.ipynb", path)
        is_elsewhere = re.match(r"\w+:|#|/", m[2])
        return m[0] if is_page or is_elsewhere else m[1] + address(path) + ")"

    return re.sub(r"(\]\()([^)\s]+)\)", here, text)


def prose_cell(cell, folder, name, out):
    "A markdown cell: its attached pictures become files beside it, its badge goes."
    text = re.sub(r"\n*\[!\[Open in Colab\][^\n]*", "", cell["source"])
    for file, data in cell.pop("attachments", {}).items():
        picture = f"pictures/{name}-{file}"
        write(out / folder / picture, base64.b64decode("".join(data["image/png"])))
        text = text.replace(f"attachment:{file}", picture)
    cell["source"] = outside(text, folder)


def markdown(text):
    return dict(cell_type="markdown", metadata={}, source=text)


def to_reference(names):
    "Below a cell that is exported: links to its names in the API reference."
    links = [f"{{py:obj}}`{name.split('.')[-1]} <{name}>`" for name in names]
    return [markdown("{.exported}\nIn the reference: " + ", ".join(links))] if names else []


def below_title(cell, folder, name):
    title, _, rest = cell["source"].partition("\n")
    cell["source"] = f"{title}\n\n{ways(folder, name)}\n\n{rest.strip()}"


def toctree(entries, caption="", hidden=True):
    "The pages below a page: (title, page) each."
    lines = ["```{toctree}"] + [":hidden:"] * hidden
    if caption:
        lines.append(f":caption: {caption}")
    return "\n".join(lines + ["", *(f"{title} <{page}>" for title, page in entries), "```"])


def page(folder, name, out, below=()):
    "One notebook as a page."
    nb, cells, seen = read(ROOT / folder / f"{name}.ipynb"), [], []
    for cell in nb["cells"]:
        cell["source"] = source = "".join(cell["source"])
        cell.pop("id", None)
        if cell["cell_type"] == "markdown":
            prose_cell(cell, folder, name, out)
            cells.append(cell)
        elif not is_dropped(source):
            code_cell(cell)
            names = [n for n in exported_names(source) if folder == "nbs" and n not in seen]
            seen += names
            anchors = [markdown(f"({label(n)})=") for n in names]
            cells += [*anchors, cell, *to_reference(names)]
    below_title(cells[0], folder, name)
    if name == "glossary":
        cells[-1]["source"] = named_terms(cells[-1]["source"])
    if below:
        cells.append(markdown(toctree(below)))
    nb |= dict(cells=cells, nbformat_minor=4)
    write(out / folder / f"{name}.ipynb", json.dumps(nb, ensure_ascii=False))


# the glossary


def slug(term):
    return "term-" + re.sub(r"\W+", "-", term.lower()).strip("-")


def named_terms(text):
    "Each term of the glossary can be linked to."
    return re.sub(r"^- \*\*(.+?)\*\*", lambda m: f"- [**{m[1]}**]{{#{slug(m[1])}}}", text, flags=re.M)


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


# the front page


def course_map():
    "The course as rows of boxes, each a link, as wide as the lesson takes to read."
    from nav import is_mistakes, value_of

    short, found, rows = value_of("SHORT"), lessons(), []
    for label, numbers in value_of("ROWS").items():
        boxes = []
        for name, title, _, minutes in found:
            if name[:2] not in numbers.split():
                continue
            kind = "short" if name in short else "mistakes" if is_mistakes(name) else ""
            kind = kind or ("training" if name[0] == "2" else "more")
            label_here = "" if kind == "mistakes" else number_of(name)
            said = html.escape(f"{number_of(name)}: {title} {minutes} minutes", quote=True)
            boxes.append(
                f'<a class="{kind}" style="flex-grow:{minutes};flex-basis:{minutes * 0.6:.0f}px" '
                f'href="nbs/{name}.html" title="{said}" aria-label="{said}">{label_here}</a>'
            )
        rows.append(f'<div class="row"><span>{label}</span><div>{"".join(boxes)}</div></div>')
    return "".join(rows)


def hours():
    "How long the three ways take to read."
    from nav import value_of

    minutes = {name: m for name, _, _, m in lessons()}
    sums = dict(
        short=sum(minutes[name] for name in value_of("SHORT")),
        training=sum(m for name, m in minutes.items() if name[0] == "2"),
        whole=sum(minutes.values()),
    )
    return {way: f"{total / 60:.0f} hours" for way, total in sums.items()}


def entry(name, titles, folder="nbs"):
    return f"{number_of(name)} · {titles[name]}", f"/{folder}/{name}"


def front(parts, titles, out):
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
    trees.append(toctree([("Glossary", "/nbs/glossary"), ("API reference", "/api/index")], "Look up"))
    write(out / "index.md", "\n\n".join([text, *trees]) + "\n")


def building_index(titles, out):
    text = (HERE / "building.md").read_text(encoding="utf-8")
    entries = [entry(name, titles, "building") for name in building()]
    text += "\n" + toctree(entries, hidden=False) + "\n"
    write(out / "building/index.md", text)


def gather(out):
    "Write all pages."
    written.clear()
    parts, below = tree()
    titles = {name: title for name, title, _, _ in lessons()}
    for name in chain():
        page("nbs", name, out, [entry(child, titles) for child in below[name]])
    for name in ("index", "glossary"):
        page("nbs", name, out)
    for name in building():
        page("building", name, out)
    front(parts, titles, out)
    building_index(titles, out)
    for name, text in module_pages().items():
        write(out / f"api/{name}.md", text)
    write(out / "order.json", json.dumps(dict(chain=chain(), terms=terms())))
    for path in out.rglob("*"):
        if path.is_file() and path not in written:
            path.unlink()
