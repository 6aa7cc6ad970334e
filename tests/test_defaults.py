"""Every default of every public function, against a table written down in tests/defaults.json.

A default that changes unseen changes what everybody gets who does not ask. To change one on
purpose: python tests/test_defaults.py, and read the difference.
"""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("defaults.json")


def shown(value):
    "A default as text that is the same on every machine."
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__name__
    if isinstance(value, dict) and type(value) is not dict:  # a table that fills as it is read
        return f"{type(value).__name__}()"
    text = repr(value)
    return text if " at 0x" not in text else type(value).__name__


def defaults_of(thing):
    "The defaults of a function's parameters, or of a class's fields or `__init__`."
    if dataclasses.is_dataclass(thing):
        fields = dataclasses.fields(thing)
        return {f.name: shown(f.default) for f in fields if f.default is not dataclasses.MISSING}
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: shown(p.default) for p in parameters if p.default is not p.empty}


def methods(name, thing):
    "A class, and its own public methods."
    yield name, thing
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function


def table():
    "All defaults of the package: a dict by module and name."
    found = {}
    for path in sorted((ROOT / "qwen_nb").glob("[!_]*.py")):
        module = importlib.import_module(f"qwen_nb.{path.stem}")
        for public in module.__all__:
            thing = getattr(module, public)
            if not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            for name, callable_ in methods(public, thing):
                defaults = defaults_of(callable_)
                if defaults:
                    found[f"{path.stem}.{name}"] = defaults
    return found


def test_every_default_is_as_written_down():
    written, found = json.loads(TABLE.read_text(encoding="utf-8")), table()
    changed = [n for n in sorted(written.keys() | found) if written.get(n) != found.get(n)]
    lines = [f"{n}: written {written.get(n)}, found {found.get(n)}" for n in changed]
    assert not changed, "\n".join(lines)


if __name__ == "__main__":
    text = json.dumps(table(), indent=1, sort_keys=True, ensure_ascii=False)
    TABLE.write_text(text + "\n", encoding="utf-8")
