"""Where each page stands: parts of the course, chapters in them, lessons, their pages of mistakes.

Reads the notebooks; needs neither Sphinx nor torch.
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from course import PARTS, lessons  # noqa: E402, F401
from notebooks import settings  # noqa: E402, F401

LIVE = {  # lessons with a picture on the page with the model in it: its place there, what to try
    "00c_heads": ("off", "switch heads off, and see what it can no longer do"),
    "05_rope": ("hands", "turn the hands of a real head"),
    "05a_yarn": ("hands", "change the base, and see the score against distance"),
    "06_attention": ("inside", "see what each head looks at"),
    "06a_gqa": ("inside", "see what each head looks at"),
    "06b_heads": ("off", "switch heads off, and find the one that matters"),
    "08_model": ("inside", "see the guess after each layer"),
    "09_generate": ("inside", "move temperature, top-k, top-p and min-p"),
    "09a_cache": ("memories", "watch the cache grow"),
    "10d_talk": ("ask", "ask it, and see the truth beside its answer"),
    "10h_hunt": ("break", "choose a bug, and see where it begins"),
    "15b_hybrid": ("memories", "watch the two memories"),
    "15d_qwen3_next": ("memories", "watch the two memories"),
    "34_page": ("", "the page itself"),
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def first_cell(name):
    return "".join(read(ROOT / f"nbs/{name}.ipynb")["cells"][0]["source"])


def is_mistakes(name):
    return name.endswith("_mistakes")


def needed(name):
    "The lessons that a lesson's first cell says one needs."
    found = re.search(r"\*\*You need:\*\*(.*?)(?:\*\*Next|$)", first_cell(name), re.S)
    return re.findall(r"\]\((\w+)\.ipynb\)", found[1]) if found else []


def owner(name):
    "The lesson whose mistakes a page shows: the last one of its chapter that the page needs."
    own = [n for n in needed(name) if n[:2] == name[:2] and not is_mistakes(n)]
    return max(own) if own else None


def tree():
    """The course as {part: {page: [pages below it]}}, in order.

    A part's pages are its chapters, each under its first lesson; below a chapter stand its other
    lessons, and below any lesson its pages of mistakes: `below[name]` lists both."""
    parts, below, chapter = {}, {}, {}
    for name, *_ in lessons():
        number = name[:2]
        below[name] = []
        if number in PARTS and number not in chapter:
            part = parts[PARTS[number]] = []
        if number not in chapter:
            chapter[number] = name
            part.append(name)
        else:
            above = owner(name) if is_mistakes(name) else None
            below[above or chapter[number]].append(name)
    return parts, below


def chain():
    "The names of all lessons in the order in which the course is read."
    return [name for name, *_ in lessons()]


def building():
    "The names of the lessons that have a building edition."
    return sorted(path.stem for path in (ROOT / "building").glob("*.ipynb"))


def number_of(name):
    return name.partition("_")[0]


def value_of(name):
    "What a name stands for in the index's own code: the map's rows, the short way."
    for cell in read(ROOT / "nbs/index.ipynb")["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or f"\n{name} = " not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == name:
                is_split = isinstance(node.value, ast.Call)      # "a b c".split()
                value = ast.literal_eval(node.value.func.value if is_split else node.value)
                return value.split() if is_split else value
    raise LookupError(f"nbs/index.ipynb has no {name}: the site's map is drawn from it")
