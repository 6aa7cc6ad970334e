"""The wheel in an environment that has the run-time requirements of settings.ini and nothing else:
no transformers, no Jupyter."""

import os
import subprocess
import sys
import venv
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(requirements):
    "All distributions that these requirements bring along."
    found, todo = (
        {},
        [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate()],
    )
    while todo:
        req = todo.pop()
        name = canonicalize_name(req.name)
        seen, extras = found.get(name, (None, set()))
        if seen and req.extras <= extras:
            continue
        dist = seen or distribution(req.name)
        extras = extras | req.extras
        found[name] = dist, extras
        needs = [Requirement(r) for r in dist.requires or []]
        todo += [
            r
            for r in needs
            if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras | {""})
        ]
    return {name: dist for name, (dist, _) in found.items()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory, settings, wheel):
    """A virtual environment with links to the run-time requirements' files, and the wheel installed
    into it."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    for dist in closure(settings["requirements"].split()).values():
        for top in {f.parts[0] for f in dist.files if f.parts[0] not in ("..", "__pycache__")}:
            link = os.path.join(site, top)
            if os.path.lexists(link):
                continue
            try:
                os.symlink(dist.locate_file(top), link)
            except OSError:
                pytest.skip("no symbolic links here")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            wheel,
        ],
        check=True,
    )
    return python


def run(python, *args):
    "What it prints, with no network, no model named and no paths from outside."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QWEN_NB"))}
    done = subprocess.run(
        [python, "-I", *args],
        cwd=python.parent,
        env=env | dict(HF_HUB_OFFLINE="1", MPLBACKEND="agg"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_requirements_are_complete(bare):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", bare, "check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_it_is_bare(bare):
    names = (
        "transformers",
        "nbdev",
        "execnb",
        "fastcore",
        "jupyterlab",
        "notebook",
        "pytest",
        "ipykernel",
    )
    code = f"from importlib.util import find_spec; print([n for n in {names} if find_spec(n)])"
    assert run(bare, "-c", code).strip() == "[]"


def test_every_module_imports(bare):
    code = """
import importlib, pkgutil, qwen_nb, sys
names = [m.name for m in pkgutil.iter_modules(qwen_nb.__path__) if not m.name.startswith("_")]
for name in names: importlib.import_module(f"qwen_nb.{name}")
assert "venv" in qwen_nb.__file__, qwen_nb.__file__
print(len(names), qwen_nb.__version__)"""
    count, _ = run(bare, "-c", code).split()
    assert int(count) >= 10


def test_the_packaged_model_runs(bare):
    code = """
import sys, torch
from tokenizers import Tokenizer
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
tokenizer = Tokenizer.from_file(f"{packaged_model()}/tokenizer.json")
ids = torch.tensor([tokenizer.encode("Max has the ball.\\nWho has the ball?").ids])
with torch.no_grad(): logits = Qwen.from_pretrained()(ids)
assert logits.shape[:2] == ids.shape and logits.isfinite().all()
assert "transformers" not in sys.modules
print(tokenizer.decode([logits[0, -1].argmax().item()]))"""
    assert run(bare, "-c", code).strip() == "Max"


def test_only_comparisons_need_the_reference(bare):
    code = """
from qwen_nb.inspect import load_reference
try: load_reference()
except ImportError as error: print(error)"""
    assert "transformers" in run(bare, "-c", code)


def test_the_command_runs(bare, settings):
    for script in settings["console_scripts"].split():
        module, function = script.split("=")[1].split(":")
        code = (
            f"import sys; sys.argv[1:] = ['--help']; from {module} import {function}; {function}()"
        )
        assert "usage" in run(bare, "-c", code).lower()
        assert (bare.parent / script.split("=")[0]).exists() or (
            bare.parent / f"{script.split('=')[0]}.exe"
        ).exists()
