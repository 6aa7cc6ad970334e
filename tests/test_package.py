"""The package as its users meet it: names at the top, light imports, a source distribution."""

import inspect
import shutil
import subprocess
import sys
import tarfile
from importlib import import_module
from pathlib import Path

import pytest

import qwen_nb

ROOT = Path(__file__).resolve().parent.parent
PROMISED = (
    "Qwen QwenConfig Tokenizer Chat generate stream render_chat render_folder max_positions "
    "packaged_model save_pretrained load_lora speculate"
).split()


def python(code, cwd=ROOT):
    "Run it in a fresh Python and return what it prints."
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_promised_names():
    assert sorted(PROMISED) == sorted(qwen_nb.__all__) == sorted(qwen_nb._HOME)
    assert set(PROMISED) <= set(dir(qwen_nb))


@pytest.mark.parametrize("name", PROMISED)
def test_a_name_at_the_top_is_the_modules_own(name):
    found = getattr(qwen_nb, name)
    assert found is getattr(import_module(f"qwen_nb.{qwen_nb._HOME[name]}"), name)
    assert callable(found) and inspect.getdoc(found)


@pytest.mark.parametrize("name", PROMISED)
def test_a_name_at_the_top_in_a_fresh_python(name):
    "Whichever name is asked for first, and whatever modules are called."
    code = f"from qwen_nb import {name}; import inspect; print(inspect.ismodule({name}))"
    assert python(code) == "False"


def test_no_module_has_the_name_of_a_function_at_the_top():
    modules = {path.stem for path in (ROOT / "qwen_nb").glob("*.py")}
    assert not modules & set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_help_tells_what_each_parameter_is(name):
    thing = getattr(qwen_nb, name)
    doc = inspect.getdoc(thing)
    for parameter in inspect.signature(thing).parameters:
        assert f"{parameter}:" in doc, f"help({name}) does not say what {parameter} is"


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'Qwenn'"):
        qwen_nb.Qwenn
    with pytest.raises(ImportError):
        from qwen_nb import Qwenn  # noqa: F401


@pytest.mark.parametrize("module", ["qwen_nb", "qwen_nb.tokenizer"])
def test_light_imports(module):
    code = (
        f"import sys, {module}\n"
        "print([n for n in ('torch', 'matplotlib', 'transformers') if n in sys.modules])"
    )
    assert python(code) == "[]"


def test_every_module_says_what_it_is():
    for path in (ROOT / "qwen_nb").glob("*.py"):
        if path.name != "_modidx.py":
            text = path.read_text(encoding="utf-8")
            assert text.startswith('"""'), f"{path.name} has no docstring: `> …` below the title"


def test_editors_know_the_types():
    assert (ROOT / "qwen_nb/py.typed").exists()


# Without a type on purpose: functions, whose type says less than the comment beside them …
FUNCTIONS = (
    "ask call clock encode fn function grader learn mix note on_log on_resume progress reward say "
    "talk tell_story"
).split()
# … and objects of which any kind will do that has what is asked of it.
DUCKS = "ax cache commands config f file ids model page parser rows shards tokenizer".split()


def public_functions(module):
    "`(name, function)` of a module's functions, and of its classes' `__init__` and methods."
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            yield name, thing
        for method, function in vars(thing).items() if inspect.isclass(thing) else ():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and (method == "__init__" or not method.startswith("_")):
                yield f"{name}.{method}", function


def untyped(module):
    "Parameters without a type, `*args` and `**kwargs` aside."
    found = []
    for name, function in public_functions(module):
        parameters = list(inspect.signature(function).parameters.values())
        if parameters and parameters[0].name in ("self", "cls"):
            del parameters[0]
        for p in parameters:
            several = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            if p.annotation is p.empty and not several:
                found.append((f"{module.__name__}.{name}", p.name))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "qwen_nb").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_public_parameter_has_a_type(path):
    found = untyped(import_module(f"qwen_nb.{path.stem}"))
    missing = [f"{name}: {p}" for name, p in found if p not in FUNCTIONS + DUCKS]
    assert not missing, f"no type on {', '.join(missing)}"


def test_untyped_ducks_stay_few():
    modules = [import_module(f"qwen_nb.{p.stem}") for p in (ROOT / "qwen_nb").glob("[!_]*.py")]
    ducks = {(name, p) for module in modules for name, p in untyped(module) if p in DUCKS}
    assert len(ducks) <= 75, sorted(ducks)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    "The source distribution, built from a copy of what git tracks, with nothing fetched."
    tmp = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", ".pytest_cache", "shots"
    )
    shutil.copytree(ROOT, tmp / "source", ignore=ignored)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp]
    done = subprocess.run(command, cwd=tmp / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp.glob("*.tar.gz")
    return built


def test_the_source_distribution_installs(sdist, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--target", tmp_path / "site", sdist]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import sys; sys.path.insert(0, 'site'); import qwen_nb; print(qwen_nb.__file__)"
    assert str(tmp_path / "site") in python(code, cwd=tmp_path)
    assert (tmp_path / "site/qwen_nb/pretrained/model.safetensors").exists()


def test_the_source_distribution_holds_what_its_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {"/".join(n.split("/")[1:]) for n in archive.getnames()}
    for folder, pattern in (("nbs", "*.ipynb"), ("tests", "*.py"), ("tools", "*.py")):
        there = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob(pattern)}
        there = {n for n in there if ".ipynb_checkpoints" not in n}
        assert there <= names, f"not in the source distribution: {sorted(there - names)}"
    for name in ("settings.ini", "constraints.txt", "Makefile", ".github/workflows/test.yml"):
        assert name in names
