"""From notebooks to pages: what a reader of the site does not need is taken out, links are added.

Everything is written to a folder that Sphinx reads. Nothing is run.
"""

import base64
import html
import json
import posixpath
import re

from front import building_index, entry, front, toctree
from nav import LIVE, ROOT, building, chain, lessons, read, settings, tree
from reference import exported_names, label, module_of, module_pages
from terms import named_terms, terms
from write import write, written

from qwen_nb.ablation import LIVE_HEIGHTS


def address(path):
    "A file of the repository, on the web."
    s = settings()
    return f"{s['git_url']}/blob/{s['branch']}/{path}"


def colab(path):
    s = settings()
    repository = f"{s['user']}/{s['repo']}/blob/{s['branch']}"
    return f"https://colab.research.google.com/github/{repository}/{path}"


# the line of ways below a title


def ways(folder, name):
    "Read, build, Colab, JupyterLab, live: a line of links, as HTML."
    links = []
    if folder == "building" or name in building():
        for place, label in (("nbs", "Read"), ("building", "Build")):
            here = ' aria-current="page"' * (place == folder)
            links.append(f'<a href="../{place}/{name}.html"{here}>{label}</a>')
    if name in LIVE:
        place, said = LIVE[name]
        links.append(f'<a href="../live.html#{place}" title="{said}">Live</a>')
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


def drawn_words(out):
    "The words in a drawing: what it shows, for those who hear the page."
    svg = "".join(out.get("data", {}).get("image/svg+xml", ""))
    words = re.findall(r"<text[^>]*>([^<]+)<", svg)
    return "A drawing with the words: " + html.unescape(" ".join(words)) if words else ""


def live_output(picture):
    "In place of the line that a notebook prints where nobody can play: the picture, in a frame."
    style = f"width: 100%; height: {LIVE_HEIGHTS[picture]}px; border: 0"
    frame = f'<iframe src="../live.html?only={picture}" title="{picture}, live" loading="lazy"'
    html = {"text/html": f'{frame} style="{style}"></iframe>'}
    return dict(output_type="display_data", metadata={}, data=html)


def code_cell(cell):
    "A code cell: nbdev's lines go, a title becomes the label of the fold, pictures get alt text."
    source, mystnb = cell["source"], {}
    title = re.search(r"^#@title (.*?)(?: \{.*)?$", source, re.M)
    cell["source"] = re.sub(r"^#(\||@title).*\n?", "", source, flags=re.M).strip("\n")
    tags = []
    if cell["metadata"].get("jupyter", {}).get("source_hidden"):
        tags = ["hide-input"]
        imports = "What the module imports" if "#| export" in source else "Set-up"
        label = title[1] if title else imports
        mystnb |= dict(code_prompt_show=label, code_prompt_hide=label)
    if live := re.fullmatch(r'show_live\("(\w+)"\)', cell["source"]):
        cell["outputs"] = [live_output(live[1])]
    for out in cell.get("outputs", []):
        if "text" in out:  # an escape that begins no colour is a byte that the model wrote
            out["text"] = re.sub(r"\x1b(?!\[)", "␛", "".join(out["text"]))
        if "text/markdown" in out.get("data", {}):  # Sphinx does not follow links in an output
            shown = "".join(out["data"]["text/markdown"])
            out["data"]["text/markdown"] = re.sub(r"(\]\(\w+)\.ipynb", r"\1.html", shown)
        alt = out.get("metadata", {}).get("image/png", {}).get("alt") or drawn_words(out)
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
    text = outside(text, folder)
    for file, data in cell.pop("attachments", {}).items():
        picture = f"pictures/{name}-{file}"
        write(out / folder / picture, base64.b64decode("".join(data["image/png"])))
        text = text.replace(f"attachment:{file}", picture)
    cell["source"] = text


def markdown(text):
    return dict(cell_type="markdown", metadata={}, source=text)


def to_reference(names):
    "Below a cell that is exported: links to its names in the API reference."
    links = [f"{{py:obj}}`{name.split('.')[-1]} <{name}>`" for name in names]
    return [markdown("{.exported}\nIn the reference: " + ", ".join(links))] if names else []


def below_title(cell, folder, name):
    title, _, rest = cell["source"].partition("\n")
    cell["source"] = f"{title}\n\n{ways(folder, name)}\n\n{rest.strip()}"


def page(folder, name, out, below=()):
    "One notebook as a page."
    nb, cells, seen = read(ROOT / folder / f"{name}.ipynb"), [], []
    module = module_of(name) if folder == "nbs" else None
    for cell in nb["cells"]:
        cell["source"] = source = "".join(cell["source"])
        cell.pop("id", None)
        if cell["cell_type"] == "markdown":
            prose_cell(cell, folder, name, out)
            cells.append(cell)
        elif not is_dropped(source):
            code_cell(cell)
            names = []
            if module:
                names = [n for n in exported_names(source, module) if n not in seen]
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
    write(out / "index.md", front(parts, titles))
    write(out / "building/index.md", building_index(titles))
    for name, text in module_pages().items():
        write(out / f"api/{name}.md", text)
    write(out / "order.json", json.dumps(dict(chain=chain(), terms=terms())))
    for path in out.rglob("*"):
        if path.is_file() and path not in written:
            path.unlink()
