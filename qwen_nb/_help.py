"""What `help` shows: the comments beside parameters, which a docstring does not repeat."""

import dataclasses
import inspect
import re

# `name:type=default,  # what it is`, one or several a line, in a signature or among a dataclass's
# fields.
_LINE = re.compile(r"^\s*(?P<code>\*{0,2}\w+\s*(?:[:=,)][^#]*)?)#\s*(?P<what>.+)$")
_NAME = re.compile(r"(?:^|,)\s*\*{0,2}(\w+)\s*(?=[:=,)]|$)")


def _source(thing):
    "The lines in which the parameters stand."
    is_plain_class = inspect.isclass(thing) and not dataclasses.is_dataclass(thing)
    return inspect.getsource(thing.__init__ if is_plain_class else thing).splitlines()


def parameters(thing) -> dict:
    "Each parameter of a function or class with the comment beside it."
    names = list(inspect.signature(thing).parameters)
    found = {}
    for line in _source(thing):
        match = _LINE.match(line)
        if not match:
            continue
        for name in _NAME.findall(match["code"].rstrip()):
            if name in names and name not in found:
                found[name] = match["what"].strip()
    return found


def document(thing):
    "Add the parameters' comments to its docstring, for `help`."
    try:
        found = parameters(thing)
    except (OSError, TypeError, ValueError):  # no source here
        return thing
    doc = inspect.getdoc(thing) or ""
    missing = {name: what for name, what in found.items() if f"{name}:" not in doc}
    if missing:
        lines = [f"{name}: {what}" for name, what in missing.items()]
        thing.__doc__ = doc + "\n\n" + "\n".join(lines)
    return thing
