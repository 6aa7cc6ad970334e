"""How the course reads: widths, lengths, alt text, links, one name for one thing."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
AGAIN = "__getattr__", "_"  # names that may stand in several modules
WITHOUT_MODULE = "index", "glossary"
LESSONS = [path for path in NOTEBOOKS if path.stem not in WITHOUT_MODULE]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def cells(path, kind=None):
    "The notebook's cells of one kind, each with its source as `text`."
    found = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if kind in (None, cell["cell_type"]):
            found.append(cell | dict(text="".join(cell["source"]), number=number))
    return found


def parse(text):
    "A cell's code without its magics."
    return ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", text, flags=re.M))


def dense(tree):
    "What is too dense to be read aloud: a list of (line, what)."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inner = [n for n in ast.walk(node) if n is not node]
            if any(isinstance(n, COMPREHENSIONS) for n in inner):
                found.append((node.lineno, "a comprehension inside a comprehension"))
            if any(isinstance(n, ast.NamedExpr) for n in inner):
                found.append((node.lineno, "a walrus inside a comprehension"))
        if isinstance(node, ast.Lambda):
            if any(isinstance(n, ast.Starred) for n in ast.walk(node.body)):
                found.append((node.lineno, "a lambda that unpacks"))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp):
            if any(isinstance(t, (ast.Tuple, ast.List)) for t in node.targets):
                found.append((node.lineno, "a conditional expression that unpacks"))
    return found


@each_notebook
def test_no_cell_is_empty(path):
    empty = [cell["number"] for cell in cells(path) if not cell["text"].strip()]
    assert not empty, f"{path.name}: nothing stands in the cells {empty}"


def test_dense_code_is_found():
    nested = "[[i for i in range(n)] for n in x]"
    walrus = "[y for x in z if (y := x)]"
    starred = "f = lambda x: g(*x)"
    unpacked = "a, b = (1, 2) if c else (3, 4)"
    for code in (nested, walrus, starred, unpacked):
        assert len(dense(ast.parse(code))) == 1, code
    assert not dense(ast.parse("a = [i for i in range(3)]\nb = 1 if a else 2"))


@each_notebook
def test_code_can_be_read_aloud(path):
    found = []
    for cell in cells(path, "code"):
        for line, what in dense(parse(cell["text"])):
            found.append(f"cell {cell['number']}, line {line}: {what}")
    assert not found, "\n".join(found)


@each_notebook
def test_one_sitting(path):
    code = [c["text"] for c in cells(path, "code") if c["text"].strip()]
    code = [text for text in code if "google.colab" not in text]  # made by tools/notebooks.py
    lines = 0
    for text in code:
        lines += sum(bool(line.strip()) and not line.startswith("#|") for line in text.splitlines())
    assert len(code) <= 60, f"{len(code)} code cells: split the lesson where its story has a seam"
    assert lines <= 450, f"{lines} lines of code: split the lesson where its story has a seam"


def test_one_room_a_module():
    for path in (ROOT / "qwen_nb").glob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if path.name != "_modidx.py":
            assert lines <= 300, f"{path.name} has {lines} lines"


@each_notebook
def test_every_assert_has_a_sentence(path):
    found = []
    for cell in cells(path, "code"):
        for node in ast.walk(parse(cell["text"])):
            if isinstance(node, ast.Assert) and node.msg is None:
                found.append(f"cell {cell['number']}: {ast.unparse(node)}")
    assert not found, "no message:\n" + "\n".join(found)


@each_notebook
def test_every_picture_has_alt_text(path):
    for cell in cells(path, "code"):
        for out in cell["outputs"]:
            if "image/png" in out.get("data", {}):
                alt = out.get("metadata", {}).get("image/png", {}).get("alt", "")
                assert len(alt) >= 30, f"cell {cell['number']} needs a line `#| fig-alt: …`"


@each_notebook
def test_no_cell_ends_in_a_bare_truth(path):
    "`try_answer(…)` prints how it went; without a semicolon a False stands below that."
    for cell in cells(path, "code"):
        for out in cell["outputs"]:
            shown = "".join(out.get("data", {}).get("text/plain", "")).strip()
            bare = out["output_type"] == "execute_result" and shown in ("True", "False", "None")
            last = cell["text"].rstrip().splitlines()[-1]
            assert not bare, f"cell {cell['number']} shows {shown}: end it with `{last};`"


@each_notebook
def test_one_cell_installs(path):
    found = [c["number"] for c in cells(path, "code") if "google.colab" in c["text"]]
    assert found == [1], f"{path.name} installs in the cells {found}; expected the second alone"


@each_lesson
def test_first_screen(path):
    "Title, question and picture; what is needed to run comes after, folded."
    first, *rest = cells(path)
    assert "attachment:opening.png" in first["text"], "no picture in the first cell"
    assert first.get("attachments"), "no cell of this notebook has a line `#| opens`"
    for word in ("**Time:**", "**You need:**", "**Next:**"):
        assert word in first["text"], f"the first cell does not say {word}"
    for cell in rest:
        is_setup = re.search(r"#\| default_exp|google\.colab|^set_style\(\)", cell["text"], re.M)
        if cell["cell_type"] == "code" and is_setup:
            folded = cell["metadata"].get("jupyter", {}).get("source_hidden")
            assert folded, f"cell {cell['number']} is set-up and not folded"


# Lessons that may lead on elsewhere than to the file after them: name → where, and why here.
LEADS_ELSEWHERE = {}


@pytest.mark.parametrize("path, following", [*zip(LESSONS, LESSONS[1:])], ids=lambda p: p.stem)
def test_the_way_leads_through_every_lesson(path, following):
    "What `Next` links to first is the next file. (The last lesson leads out of the course.)"
    first_link = r"\*\*Next:\*\* \[(\w+)\]\(\1\.ipynb\)"
    found = re.search(first_link, cells(path)[0]["text"])
    assert found, f"{path.stem}: after **Next:** comes no link to a lesson"
    expected = LEADS_ELSEWHERE.get(path.stem, following.stem)
    assert found[1] == expected, f"{path.stem} leads on to {found[1]}, the next is {expected}"


@each_lesson
def test_other_notebooks_are_links(path):
    names = [p.stem for p in NOTEBOOKS if p != path]
    for cell in cells(path, "markdown"):
        text = re.sub(r"\[[^\]]*\]\([^)]*\)|```.*?```", "", cell["text"], flags=re.S)
        for name in names:
            if name != "index" and name != "glossary":
                assert not re.search(rf"\b{name}\b", text), f"{name} is no link: {cell['text']}"
        plain = re.search(r"(?<![\w/])[\w.-]+(?:/[\w.-]+)?#\d{2,6}\b|(?<=\s)#\d{3,6}\b", text)
        assert not plain, f"an issue that is no link: {plain and plain[0]!r}"


def test_links_between_notebooks_lead_somewhere():
    for path in NOTEBOOKS:
        for cell in cells(path, "markdown"):
            for target in re.findall(r"\]\((?!https?:|attachment:|#)([^)#\s]+)", cell["text"]):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_one_name_one_meaning():
    where = {}
    for path in (ROOT / "qwen_nb").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in AGAIN:
                where.setdefault(node.name, []).append(path.stem)
    twice = {name: modules for name, modules in where.items() if len(modules) > 1}
    assert not twice, f"one name, two meanings: {twice}"


def test_cell_ids_are_unique():
    for path in NOTEBOOKS:
        ids = Counter(cell["id"] for cell in cells(path))
        assert ids.most_common(1)[0][1] == 1, f"{path.name}: {ids.most_common(1)}"


# the glossary


def plain_prose(path):
    "What a lesson says, without its code, formulas, links and first-screen facts."
    text = "\n".join(cell["text"] for cell in cells(path, "markdown"))
    text = re.sub(r"\*\*(Time|You need|Next):\*\*[^\n]*", "", text)
    code, formulas = r"```.*?```|`[^`]*`", r"\$\$.*?\$\$|\$[^$]*\$"
    links = r"\]\([^)]*\)|!\[[^\]]*\]"
    return re.sub(f"{code}|{formulas}|{links}", "", text, flags=re.S)


def uses(term, prose):
    "Whether the term, or one of several separated by commas, stands in the prose."
    for word in term.split(", "):
        flags = re.I if word.islower() else 0
        if re.search(rf"\b{re.escape(word)}(?:s|es)?\b", prose, flags):
            return True
    return False


def glossary():
    "Each term with the lesson that explains it."
    cell = cells(ROOT / "nbs/glossary.ipynb", "markdown")[0]
    entry = r"^- \*\*(.+?)\*\* \(\[(\w+)\]\(\2\.ipynb\)\): .{10,}"
    return re.findall(entry, cell["text"], re.M)


def test_no_term_is_used_before_it_is_explained():
    """The first lesson that uses a term explains it, or links to the glossary beside it."""
    terms = glossary()
    assert len(terms) >= 50
    prose = {path.stem: plain_prose(path) for path in LESSONS}
    text = {path.stem: "".join(c["text"] for c in cells(path, "markdown")) for path in LESSONS}
    found = []
    for term, home in terms:
        first = next((name for name in prose if uses(term, prose[name])), None)
        if first is None:
            found.append(f"{term} is used nowhere")
        elif first != home and "](glossary.ipynb)" not in text[first]:
            found.append(f"{term} is used in {first} and explained in {home}")
    assert not found, "\n".join(found)


@each_lesson
def test_a_grader_is_tried_on_fixed_answers(path):
    """`must_refuse(f_exercise, f, …)` would fail as soon as a reader has solved the exercise: it is
    tried on an answer of its own, such as `...` for the empty stub."""
    for cell in cells(path, "code"):
        for call in ast.walk(parse(cell["text"])):
            named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            if not named or call.func.id not in ("must_accept", "must_refuse"):
                continue
            grader, answer = (ast.unparse(argument) for argument in call.args[:2])
            theirs = re.sub(r"^grade_|_exercise$", "", grader)
            assert answer != theirs, f"{path.name} tries {grader} on the reader's own {answer}"
