#!/usr/bin/env python3
"""Write the table of lessons into nbs/index.ipynb, from the first cell of each lesson.

`--check` only says whether it is out of date.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs/index.ipynb"
BEGIN = "| lesson | what it is about | minutes | |\n|---|---|---:|---|\n"
PARTS = {
    "00": "Open it",
    "03": "Words, and a world to talk about",
    "04": "One layer",
    "08": "The whole model",
    "09": "Writing and talking",
    "11": "Every generation",
    "20": "Training",
    "90": "The command",
}
# Two thirds are ●●; these are easier or harder.
EASY = (
    "00_inspect 00b_memory 01_verify 02_weights 03d_languages 03e_world 04_rmsnorm 07_swiglu "
    "08b_real 10_chat 12_qwen2 13_qwen3 16_family 21d_log 90_terminal"
).split()
HARD = (
    "03c_special 05a_yarn 06b_heads 10b_prompt 11a_long 14b_balance 15_delta 15a_deltanet "
    "15d_qwen3_next 21b_durable 21e_resume 21g_parallel 22b_preference"
).split()


def lessons():
    "All of them in order: (name, title, summary, minutes)."
    found = []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title = first.splitlines()[0].removeprefix("# ")
        summary = re.search(r"^> (.+)$", first, re.M)
        time = re.search(r"\*\*Time:\*\* about (\d+)", first)
        if not summary or not time:
            sys.exit(f"{path.name}: its first cell lacks `> one line` or **Time:** about N minutes")
        found.append((path.stem, title, summary[1], int(time[1])))
    return found


def table():
    "The rows as markdown."
    rows = BEGIN
    for name, title, summary, minutes in lessons():
        part = PARTS.get(name[:2]) if re.match(r"\d\d_", name) else None
        if part:
            rows += f"| **{part}** | | | |\n"
        difficulty = "●" if name in EASY else "●●●" if name in HARD else "●●"
        rows += f"| [{name}]({name}.ipynb) | {title}. {summary} | {minutes} | {difficulty} |\n"
    return rows.replace("?.", "?").replace("!.", "!")


def main():
    nb = json.loads(INDEX.read_text(encoding="utf-8"))
    (cell,) = [c for c in nb["cells"] if BEGIN.splitlines()[0] in "".join(c["source"])]
    text = "".join(cell["source"])
    written = re.sub(re.escape(BEGIN) + r"(?:\|.*\n?)*", lambda _: table(), text)
    if "--check" in sys.argv[1:]:
        if written.rstrip() != text.rstrip():
            sys.exit("the table of lessons is out of date: run python tools/course.py")
        return
    cell["source"] = written.rstrip().splitlines(True)
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    INDEX.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
