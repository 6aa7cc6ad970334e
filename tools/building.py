#!/usr/bin/env python3
"""Make the building edition: building/*.ipynb from nbs/*.ipynb.

`--check` only says whether it is out of date, and whether a solution can be read in it.
`--run NAME …` runs lessons as they stand, each in a process of its own, on the packaged model or
on $QWEN_NB_MODEL; with `--solved`, with the package's code in the stubs, and the small exercises
answered with their solutions.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "building"
# Lines of pieces that tell nothing: they stand in other functions as well.
PLUMBING = """
inv_freq = inverse_frequencies(head_dim, theta)
k, v = repeat_kv(k, group), repeat_kv(v, group)
if layer_idx == len(self.kv) - 1:
for run in runs(tokenizer, pieces):
first = raw.get("max_window_layers", 28)
if attention_mask is not None:
for name, p in model.named_parameters():
"""
sys.path.insert(0, str(ROOT))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def written(nb):
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def make():
    "Every lesson with pieces: name → its building edition as text."
    from qwen_nb.edition import build_lesson
    from qwen_nb.mine import lessons_with_pieces

    return {
        name: written(build_lesson(read(ROOT / f"nbs/{name}.ipynb"), name))
        for name in lessons_with_pieces()
    }


def squeezed(line):
    "A line of code without spaces and comments."
    return re.sub(r"\s+", "", re.sub(r"#.*", "", line))


def telling_lines(piece):
    "The lines of a piece's body that would tell the solution."
    import inspect
    import textwrap

    from qwen_nb.edition import body_lines

    source = textwrap.dedent(inspect.getsource(piece.right))
    (node,), lines = ast.parse(source).body, source.split("\n")
    first, last = body_lines(node, lines)
    found = [squeezed(line) for line in lines[first - 1 : last]]
    plumbing = [squeezed(line) for line in PLUMBING.splitlines()]
    return [line for line in found if len(line) >= 25 and line not in plumbing]


def leaks(editions):
    "Lines of solutions that can be read in the building edition of their own lesson."
    from qwen_nb.edition import text_of
    from qwen_nb.mine import lessons_with_pieces

    found = []
    for name, pieces in lessons_with_pieces().items():
        telling = {piece.name: telling_lines(piece) for piece in pieces}
        for number, cell in enumerate(json.loads(editions[name])["cells"]):
            for line in text_of(cell).split("\n"):
                plain = squeezed(line)
                for piece, told in telling.items():
                    if any(part in plain for part in told):
                        found.append(f"{name}, cell {number}, {piece}: {line.strip()}")
    return found


def check():
    "Exit with a sentence if the edition is out of date or tells a solution."
    editions = make()
    here = {p.stem: p.read_text(encoding="utf-8") for p in FOLDER.glob("*.ipynb")}
    differ = sorted(n for n in editions.keys() | here.keys() if editions.get(n) != here.get(n))
    if differ:
        sys.exit(f"building/ is out of date ({', '.join(differ)}): run python tools/building.py")
    told = leaks(editions)
    if told:
        sys.exit("the building edition tells a solution:\n" + "\n".join(told))


def solve(nb):
    "The lesson with the package's own code in its stubs."
    from qwen_nb.edition import pieces_in, text_of, without_directives
    from qwen_nb.mine import lessons_with_pieces

    sources = {}
    for name, pieces in lessons_with_pieces().items():
        for cell in read(ROOT / f"nbs/{name}.ipynb")["cells"]:
            names = tuple(piece.name for piece in pieces_in(cell, pieces))
            if names:
                sources[names] = without_directives(text_of(cell))
    for cell in nb["cells"]:
        names = tuple(cell["metadata"].get("qwen_nb", {}).get("pieces", ()))
        if names:
            cell["source"] = sources[names].splitlines(True)


def said(outputs):
    "What a cell printed."
    return "".join("".join(out.get("text", "")) for out in outputs)


def run(name, solved):
    "Run a lesson, with a folder of its own for the pieces; print what the graders say."
    from execnb.shell import CaptureShell

    nb = read(FOLDER / f"{name}.ipynb")
    if solved:
        solve(nb)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MY_QWEN"] = str(Path(folder) / "my_qwen")
        os.chdir(ROOT / "nbs")
        shell = CaptureShell(ROOT / f"building/{name}.ipynb", mpl_format="png")
        for number, cell in enumerate(nb["cells"]):
            text = "".join(cell["source"])
            if cell["cell_type"] != "code":
                continue
            exercises = re.findall(r"^try_answer\(\w+, (\w+)\)", text, re.M) if solved else []
            for exercise in exercises:
                shell.run(f"{exercise} = {exercise}_solution")
            outputs = shell.run(text)
            if shell.exc:
                sys.exit(f"building/{name}, cell {number}: {shell.prettytb(name)}\n---\n{text}")
            if said(outputs).count("✓ right") < len(exercises):
                sys.exit(f"building/{name}, cell {number}, solved: {said(outputs)}")
            if "grade(" in text:
                print(said(outputs), end="")


def warm_up():
    "Import what every lesson needs, once for all of them."
    import execnb.shell  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    from qwen_nb import build, mine  # noqa: F401

    mine.all_pieces()


def in_a_process(name, solved):
    "Run a lesson in a process that is a copy of this one: nothing it does is seen by the next."
    if not hasattr(os, "fork") or sys.platform == "darwin":  # there a copy may not be used
        command = [sys.executable, __file__, "--run", name, *["--solved"] * solved]
        return subprocess.run(command).returncode
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        run(name, solved)
        status = 0
    except SystemExit as stopped:
        print(stopped)
        status = 1
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        status = 1
    sys.stdout.flush()
    os._exit(status)


def run_all(names, solved):
    "Run lessons one after the other, each under a line with its name; exit with those that failed."
    warm_up()
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        began = time.time()
        if in_a_process(name, solved):
            failed.append(name)
        print(f"-- {time.time() - began:.1f} s{', FAILED' * (name in failed)}", flush=True)
    if failed:
        sys.exit(f"these lessons do not run to their end: {', '.join(failed)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="say whether it is out of date")
    parser.add_argument("--run", metavar="NAME", nargs="+", help="run lessons")
    parser.add_argument("--solved", action="store_true", help="with the package's code in it")
    args = parser.parse_args()
    if args.run:
        one = len(args.run) == 1
        return run(args.run[0], args.solved) if one else run_all(args.run, args.solved)
    if args.check:
        return check()
    FOLDER.mkdir(exist_ok=True)
    editions = make()
    for path in FOLDER.glob("*.ipynb"):
        if path.stem not in editions:
            path.unlink()
    for name, text in editions.items():
        (FOLDER / f"{name}.ipynb").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
