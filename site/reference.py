"""The API reference: one page a module, from docstrings and from the comments beside parameters.

It reads the source and imports nothing, so that it needs neither torch nor Sphinx.
"""

import ast
import re
from functools import cache

from nav import ROOT, lessons, number_of

PACKAGE = ROOT / "qwen_nb"
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef


@cache
def public(module):
    "What a module exports."
    return exported(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))


def exported(tree):
    "What a module lists in `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    return []


def names_of(node):
    "The names that a statement defines."
    if isinstance(node, (*FUNCTION, ast.ClassDef)):
        return [node.name]
    targets, found = [], []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        found += [part.id for part in parts if isinstance(part, ast.Name)]
    return found


def exported_names(source, module):
    "The names, with their module, that a notebook's cell exports."
    if not re.search(r"^#\|\s*exports?\b", source, re.M):
        return []
    defined = [name for node in ast.parse(source).body for name in names_of(node)]
    return [f"qwen_nb.{module}.{name}" for name in dict.fromkeys(defined) if name in public(module)]


def label(name):
    "The label of the place where a lesson builds a name. Labels know no capitals: `A` is `a_`."
    spelled = re.sub("[A-Z]", lambda m: m[0].lower() + "_", name)
    return "build-" + spelled.replace(".", "-")


# a docstring as markdown


def escaped(text):
    "A line in which only `code` keeps its meaning."
    parts = re.split(r"(`+[^`]*`+)", text)
    parts[::2] = [re.sub(r"([\\*_<>\[\]$|#~{}^])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def prose(docstring):
    "A docstring as markdown: paragraphs as they are, indented ones as code."
    blocks = []
    for block in re.split(r"\n\s*\n", docstring or ""):
        if block.startswith("    "):
            blocks.append(f"```text\n{block}\n```")
        else:
            lines = [escaped(line) for line in block.splitlines()]
            blocks.append("\n".join(re.sub(r"^(\s*)([-+]|\d+\.) ", r"\1\\\2 ", x) for x in lines))
    return "\n\n".join(blocks)


# parameters


def comments(node, lines):
    """What stands beside each parameter, as nbdev's style has it: {name: comment}.

    A comment belongs to a parameter that stands alone on its line."""
    a = node.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    on_line = {}
    for arg in named:
        on_line.setdefault(arg.lineno, []).append(arg.arg)
    found = {}
    for number, args in on_line.items():
        comment = re.search(r"#\s*(.+)$", lines[number - 1])
        if comment and len(args) == 1 and "'#" not in lines[number - 1]:
            found[args[0]] = comment[1]
    return found


def signature(node, is_method):
    "The parameters as one line, and what is returned."
    args = node.args
    if is_method and args.args:
        args.args = args.args[1:]
        args.defaults = args.defaults[-len(args.args):] if args.args else []
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(args)}){returns}"


def is_static(node):
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)


def fenced(kind, signature, body, depth):
    "A MyST directive of the Python domain."
    marks = ":" * (8 - depth)
    return f"{marks}{{py:{kind}}} {signature}\n\n{body.strip()}\n{marks}\n"


def described(node, lines):
    "The docstring and the parameters with their comments."
    fields = [f":param {name}: {escaped(text)}" for name, text in comments(node, lines).items()]
    return "\n\n".join(filter(None, [prose(ast.get_docstring(node)), "\n".join(fields)]))


def method(node, lines):
    is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
    head = node.name + ("" if is_property else signature(node, not is_static(node)))
    return fenced("property" if is_property else "method", head, described(node, lines), 2)


def class_entry(node, lines, back):
    "A class: how it is made, and its public methods."
    methods = [n for n in node.body if isinstance(n, FUNCTION)]
    body, head = prose(ast.get_docstring(node)), node.name
    for made in methods:
        if made.name == "__init__":
            head += signature(made, True)
            body += "\n\n" + described(made, lines)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    for field in fields:
        comment = re.search(r"#\s*(.+)$", lines[field.lineno - 1])
        text = ast.unparse(field) if len(ast.unparse(field)) < 80 else field.target.id
        body += f"\n\n`{text}`" + (f": {escaped(comment[1])}" if comment else "")
    shown = [n for n in methods if not n.name.startswith("_") and ast.get_docstring(n)]
    parts = [back, body, *(method(n, lines) for n in shown)]
    return fenced("class", head, "\n\n".join(parts), 1)


def entry(node, name, lines, back):
    "What the reference says of one exported name."
    if isinstance(node, ast.ClassDef):
        return class_entry(node, lines, back)
    if isinstance(node, FUNCTION):
        body = f"{back}\n\n{described(node, lines)}"
        return fenced("function", name + signature(node, False), body, 1)
    value = ast.unparse(node.value) if node.value else ""
    shown = f"`` = {value} ``" if value and len(value) < 80 else ""
    comment = re.search(r"#\s*(.+)$", lines[node.lineno - 1])
    text = escaped(comment[1]) if comment and "'#" not in lines[node.lineno - 1] else ""
    return fenced("data", name, f"{back}\n\n{shown} {text}", 1)


# pages


def module_page(path, lesson, title):
    "A module's page: each exported name in the order in which the lesson builds it."
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    module, left, parts = f"qwen_nb.{path.stem}", set(exported(tree)), []
    for node in tree.body:
        for name in names_of(node):
            if name in left:
                left.remove(name)
                place = label(f"{module}.{name}")
                back = f"{{.built}}\n{{ref}}`built in the lesson <{place}>`"
                parts.append(entry(node, name, lines, back))
    about = prose(ast.get_docstring(tree))
    head = f"# {path.stem}\n\n```{{py:module}} {module}\n```\n\n{about}\n\n"
    lesson_link = f"Lesson: [{number_of(lesson)} · {escaped(title)}](../nbs/{lesson}.ipynb)"
    how = f"```text\nfrom {module} import ...\n```"
    return "\n\n".join([head + lesson_link, how, *parts])


@cache
def module_of(lesson):
    "The module that a notebook exports; none for the index and the glossary."
    text = (ROOT / f"nbs/{lesson}.ipynb").read_text(encoding="utf-8")
    found = re.search(r"#\|\s*default_exp\s+(\w+)", text)
    return found[1] if found else None


def top_level():
    "What `import qwen_nb` gives at once: each name with its module."
    names = exported(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
    modules = [path.stem for path in sorted(PACKAGE.glob("[!_]*.py"))]
    where = {name: module for module in modules for name in public(module)}
    return {name: f"qwen_nb.{where[name]}.{name}" for name in names if name in where}


def module_pages():
    "All pages of the reference: {name: markdown}."
    titles = {name: title for name, title, _, _ in lessons()}
    pages, entries = {}, []
    for lesson in titles:
        path = PACKAGE / f"{module_of(lesson)}.py"
        pages[path.stem] = module_page(path, lesson, titles[lesson])
        entries.append(f"{number_of(lesson)} · {path.stem} <{path.stem}>")
    first = ", ".join(f"{{py:obj}}`{n} <{whole}>`" for n, whole in top_level().items())
    tree = "\n".join(["```{toctree}", ":maxdepth: 1", "", *entries, "```"])
    pages["index"] = (
        "# API reference\n\nEvery exported name of every module, in the order of the lessons. "
        f"At the top of the package: {first}.\n\n{tree}\n"
    )
    return pages
