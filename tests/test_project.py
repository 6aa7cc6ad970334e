"""The project as a whole: one source of metadata, notebooks in order and in shape, a wheel with the
model in it."""

import ast
import json
import re
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from siblings import SIBLINGS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith("_"))
LESSONS = [p for p in NOTEBOOKS if p.stem not in ("index", "glossary")]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)


def cells(path, kind=None):
    "Source and outputs of the notebook's cells."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        ("".join(c["source"]), c.get("outputs", []))
        for c in found
        if kind in (None, c["cell_type"])
    ]


def module_of(path):
    "The module that a notebook exports."
    names = [
        m[1]
        for source, _ in cells(path, "code")
        if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M))
    ]
    assert len(names) == 1, f"{path.name} should name one module, not {names}"
    return names[0]


# settings.ini


def test_version(settings):
    init = (ROOT / "qwen_nb/__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{settings["version"]}"' in init, (
        "settings.ini has the version: write it into qwen_nb/__init__.py too"
    )


def test_nbdev_3_reads_the_same_paths(settings):
    nbdev = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    for name in ("lib_path", "nbs_path", "tst_flags"):
        assert nbdev[name] == settings[name]


def test_one_owner(settings):
    "Links to this repository name the owner that settings.ini names, and nothing else does."
    user, repo = settings["user"], settings["repo"]
    link = re.compile(rf"github(?:\.com)?/([\w.-]+)/{repo}\b|([\w-]+)\.github\.io/{repo}\b")
    for path in [*NOTEBOOKS, ROOT / "README.md"]:
        owners = {a or b for a, b in link.findall(path.read_text(encoding="utf-8"))}
        assert owners <= {user}, (
            f"{path.name} links to {owners}: run python tools/notebooks.py --badges and "
            "tools/readme.py"
        )
    others = [
        ROOT / "CONTRIBUTING.md",
        ROOT / "pyproject.toml",
        ROOT / "setup.py",
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / "qwen_nb").glob("[!_]*.py"),
        *(ROOT / ".github").rglob("*.yml"),
    ]
    for path in others:
        assert not link.search(path.read_text(encoding="utf-8")), (
            f"{path.name} names the repository's owner"
        )


# notebooks


@each_notebook
def test_badge_and_install_cell(path, settings):
    repository = f"{settings['user']}/{settings['repo']}/blob/{settings['branch']}"
    badge = f"colab.research.google.com/github/{repository}/nbs/{path.name}"
    (first, _), (second, _), *_ = cells(path)
    assert first.startswith("# ") and badge in first
    assert (
        'if "google.colab" in sys.modules:' in second
        and "%pip install" in second
        and settings["git_url"] in second
    )


@each_notebook
def test_size_and_outputs(path):
    assert path.stat().st_size <= 400_000, f"{path.name} is {path.stat().st_size:,} bytes"
    outputs = [out for _, outs in cells(path, "code") for out in outs]
    assert not [out for out in outputs if out["output_type"] == "error"], (
        f"{path.name} stores an error"
    )
    assert not any(
        "application/vnd.jupyter.widget-view+json" in out.get("data", {}) for out in outputs
    )


@each_lesson
def test_stored_pictures(path):
    outputs = [out for _, outs in cells(path, "code") for out in outs]
    assert outputs, f"{path.name} was never run: python tools/notebooks.py {path.relative_to(ROOT)}"
    if path.name < "9":
        assert any("image/png" in out.get("data", {}) for out in outputs), (
            f"{path.name} has no picture"
        )


@each_lesson
def test_cells_are_short(path):
    lines = lambda source: [
        line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#|")
    ]
    long = [source for source, _ in cells(path, "code") if len(lines(source)) > 40]
    assert not long, f"{path.name} has a cell of over 40 lines:\n{long[0]}"


def test_the_index_names_every_notebook():
    index = "".join(source for source, _ in cells(ROOT / "nbs/index.ipynb", "markdown"))
    assert [p.name for p in LESSONS if f"({p.name})" not in index] == []


def test_the_stated_time_is_about_right(monkeypatch):
    "As it is estimated by words and cells, within a factor of 1.5 either way."
    monkeypatch.syspath_prepend(ROOT / "tools")
    import course

    assert not course.far_off(), "name → (stated, estimated), from tools/course.py --times"


# modules


def imported(tree):
    "Modules of this package that a piece of code imports, at the top or inside functions."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (n.name.split(".")[1] for n in node.names if n.name.startswith("qwen_nb."))
        if isinstance(node, ast.ImportFrom):
            module = (
                "qwen_nb" + (f".{node.module}" if node.module else "")
                if node.level == 1
                else node.module or ""
            )
            if module == "qwen_nb":
                yield from (n.name for n in node.names)
            elif module.startswith("qwen_nb."):
                yield module.split(".")[1]


def python(source):
    "A cell without its magics, parsed."
    return ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M))


@each_lesson
def test_uses_only_earlier_notebooks(path):
    order = [module_of(p) for p in LESSONS]
    earlier = set(order[: LESSONS.index(path)])
    module = ROOT / f"qwen_nb/{module_of(path)}.py"
    assert f"../nbs/{path.name}" in module.read_text(encoding="utf-8"), (
        f"{module.name} does not come from {path.name}: run nbdev-export"
    )
    used = set(imported(ast.parse(module.read_text(encoding="utf-8"))))
    assert used & set(order) <= earlier, (
        f"{module.name} imports {sorted(used & set(order) - earlier)}, which come later"
    )
    for source, _ in cells(path, "code"):
        used = set(imported(python(source))) & set(order)
        assert used <= earlier | {module.stem}, (
            f"{path.name} imports {sorted(used - earlier)}, which come later:\n{source}"
        )


def test_every_module_has_a_notebook():
    modules = {p.stem for p in (ROOT / "qwen_nb").glob("*.py") if not p.stem.startswith("_")}
    assert modules == {module_of(p) for p in LESSONS}


def test_transformers_is_never_imported_at_the_top():
    for path in (ROOT / "qwen_nb").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = (
                [n.name for n in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not [n for n in names if n.split(".")[0] == "transformers"], (
                f"{path.name} imports transformers when it is imported"
            )


# the wheel


def test_wheel(wheel, settings):
    names = zipfile.ZipFile(wheel).namelist()
    pretrained = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "qwen_nb/pretrained").rglob("*")
        if p.is_file()
    }
    assert {n for n in names if n.startswith("qwen_nb/pretrained/")} == pretrained
    for sibling in ("", *(f"{name}/" for name in (*SIBLINGS, "qwen3_embed"))):
        assert {
            f"qwen_nb/pretrained/{sibling}{name}"
            for name in ("config.json", "model.safetensors", "tokenizer_config.json")
        } <= pretrained
    assert {n.split("/")[0] for n in names} == {
        "qwen_nb",
        f"qwen_nb-{settings['version']}.dist-info",
    }
    assert {n for n in names if n.endswith(".py")} == {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "qwen_nb").rglob("*.py")
    }
    assert wheel.stat().st_size < 20_000_000
    meta = message_from_string(
        zipfile.ZipFile(wheel).read(f"qwen_nb-{settings['version']}.dist-info/METADATA").decode()
    )
    assert (
        meta["Name"] == settings["lib_name"]
        and meta["Version"] == settings["version"]
        and meta["License-Expression"] == "Apache-2.0"
    )
    assert meta["Requires-Python"] == f">={settings['min_python']}"
    needed = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(re.match(r"[\w.-]+", r)[0] for r in needed) == sorted(
        re.match(r"[\w-]+", r)[0] for r in settings["requirements"].split()
    )


def test_every_requirement_is_pinned(settings):
    """constraints.txt has an exact version of all that settings.ini asks for, on the oldest Python
    and on newer ones."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(p.specifier)) for p in pins)
    asked = [r for key in settings if key.endswith("requirements") for r in settings[key].split()]
    for python in (settings["min_python"], "3.11", "3.14"):

        def here(r):
            return r.marker is None or r.marker.evaluate(dict(python_version=python))

        pinned = {canonicalize_name(p.name): p.specifier for p in pins if here(p)}
        for req in filter(here, map(Requirement, asked)):
            pin = str(pinned[canonicalize_name(req.name)]).lstrip("=")
            assert req.specifier.contains(pin), (
                f"{req} in settings.ini, {pin} in constraints.txt for Python {python}"
            )
