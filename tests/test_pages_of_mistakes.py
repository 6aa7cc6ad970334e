"""Pages of mistakes: what is shown of a mistake, links to where it happened, the order of cells."""

import json
import re
import textwrap
from pathlib import Path

import pytest

from qwen_nb.mine import all_pieces
from qwen_nb.pieces import edited_source, plot_seen, seen_by
from qwen_nb.reading import REPOSITORIES, changed_lines, issue_link, mistake_text, mistakes_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "nbs").glob("*_mistakes.ipynb"))
PIECES = list(all_pieces().values())
each_piece = pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)

RIGHT = textwrap.dedent("""\
    def f(x):
        h = x.float()
        if h.any():
            h = h + 1
        return h
""")


def test_a_changed_line():
    assert changed_lines(RIGHT, RIGHT.replace("x.float()", "x")) == "- h = x\n+ h = x.float()"
    assert changed_lines(RIGHT, RIGHT) == ""


def test_a_missing_line_is_shown_behind_the_one_before():
    wrong = RIGHT.replace("        h = h + 1\n", "        pass\n        h = h + 1\n")
    assert changed_lines(RIGHT, wrong) == "  if h.any():\n-     pass"
    assert changed_lines(wrong, RIGHT) == "  if h.any():\n+     pass"


def test_two_places_have_dots_between_them():
    wrong = RIGHT.replace("x.float()", "x").replace("return h", "return x")
    lines = changed_lines(RIGHT, wrong).splitlines()
    assert lines == ["- h = x", "+ h = x.float()", "  …", "- return x", "+ return h"]


def test_links():
    assert issue_link("trl#1625") == "[trl#1625](https://github.com/huggingface/trl/issues/1625)"
    owned = "[QwenLM/Qwen3#1](https://github.com/QwenLM/Qwen3/issues/1)"
    assert issue_link("QwenLM/Qwen3#1") == owned
    assert issue_link("nobody-knows#3") == "nobody-knows#3"
    names = [repository.partition("/")[2].lower() for repository in REPOSITORIES]
    assert len(set(names)) == len(names) and all("/" in one for one in REPOSITORIES)


def test_which_references_are_no_links():
    "Names that many projects have. A new one belongs into the table, if its owner is sure."
    public = [m.public for piece in PIECES for m in piece.mistakes if m.public]
    plain = {one.partition("#")[0] for one in public if not issue_link(one).startswith("[")}
    unsure = {"hipfire", "xinfer", "leo-optimizer", "openagents", "SAPT"}
    assert plain == unsure | {"transformer-from-scratch"}


@each_piece
def test_each_mistake_shows_lines_that_differ(piece):
    text = mistakes_text(piece)
    right = edited_source(piece.right)
    assert right.rstrip() in text
    for number, mistake in enumerate(piece.mistakes, 1):
        block = mistake_text(piece, mistake, number)
        assert block in text and mistake.why in block and mistake.does in block
        code = re.search(r"```diff\n(.+?)\n```", block, re.S)[1]
        assert re.search(r"^[-+] ", code, re.M), f"{mistake.name} shows nothing"
        assert "$" not in mistake.why + mistake.does, "a formula begins where a price is meant"


@each_page
def test_a_page_shows_its_mistakes_and_reads_its_pictures(path):
    "show_mistakes, the picture, a sentence on it; what only graders need is folded."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    drawn = [i for i, text in enumerate(texts) if re.search(r"^plot_seen\(", text, re.M)]
    assert drawn
    for i in drawn:
        piece = re.search(r"^plot_seen\((\w+)\)", texts[i], re.M)[1]
        assert texts[i - 1] == f"show_mistakes({piece})"
        assert cells[i + 1]["cell_type"] == "markdown" and len(texts[i + 1]) > 40
        assert "text/markdown" in cells[i - 1]["outputs"][0]["data"]
    for cell, text in zip(cells, texts):
        if cell["cell_type"] == "code" and text.startswith("#| export"):
            assert cell["metadata"] == {"jupyter": {"source_hidden": True}}, text[:80]


def test_a_picture_counts_and_leaves_out_what_every_input_shows(monkeypatch):
    from matplotlib import pyplot as plt

    piece = PIECES[0]
    seen = seen_by(piece)
    monkeypatch.setattr(plt, "show", lambda: None)
    plot_seen(piece)
    fig = plt.gcf()
    (ax,) = fig.axes
    titles = [label.get_text() for label in ax.get_xticklabels()]
    assert [t.rpartition(": ")[2] for t in titles] == [
        f"{n} of {len(seen)}" for n in seen.sum(0).tolist()
    ]
    assert len(ax.get_yticklabels()) == int((~seen.all(1)).sum())
    assert not any("`" in t for t in titles)
    plt.close(fig)
