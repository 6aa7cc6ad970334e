#!/usr/bin/env python3
"""Write the table of lessons into nbs/index.ipynb, from the first cell of each lesson.

Pages of mistakes that follow each other share a row.

`--check` only says whether it is out of date. `--times` lists the lessons whose stated time is far
from the estimate: 200 words a minute, and a minute for each open cell of code.
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
    "30": "Fast, small, and for many",
    "80": "Build it yourself",
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


# Their time cannot be told from what stands open in them.
UNTOLD = {
    "10h_cases": "its cases stand in folded cells",
    "10h_hunt": "its cells are the hunt, which has a time of its own",
}


def estimate(name, cells):
    """Minutes to read a lesson: 200 words a minute, and a minute for each open cell of code.

    On a page of mistakes an open cell is one line, and what it prints is read."""
    words = opened = printed = 0
    for cell in cells:
        text = "".join(cell["source"])
        folded = cell["metadata"].get("jupyter", {}).get("source_hidden")
        if cell["cell_type"] == "markdown":
            facts = r"\*\*(?:Time|You need|Next):\*\*[^\n]*|\[!\[Open[^\n]*|\]\([^)]*\)"
            words += len(re.sub(facts, "", text).split())
        elif text.strip() and not folded:
            opened += 1
            for out in cell["outputs"]:
                shown = out.get("text") or out.get("data", {}).get("text/plain", "")
                printed += len("".join(shown).split())
    if name.endswith("_mistakes"):
        return (words + printed) / 200
    return words / 200 + opened


def far_off(most=1.5):
    "Lessons whose stated time is more than so many times the estimate, or less: name → both."
    found = {}
    for name, _, _, minutes in lessons():
        nb = json.loads((ROOT / f"nbs/{name}.ipynb").read_text(encoding="utf-8"))
        about = estimate(name, nb["cells"])
        if name not in UNTOLD and not 1 / most <= minutes / about <= most:
            found[name] = minutes, round(about)
    return found


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


def rows_of(found):
    "Lessons that share a row: lists, most of one lesson, but of all neighbouring mistakes pages."
    rows = []
    for lesson in found:
        is_page = lesson[0].endswith("_mistakes")
        if is_page and rows and rows[-1][-1][0].endswith("_mistakes"):
            if rows[-1][-1][0][:2] == lesson[0][:2]:
                rows[-1].append(lesson)
                continue
        rows.append([lesson])
    return rows


def mistakes_row(pages):
    "One row for several pages of mistakes: each is a link, the minutes are added up."
    first, last = (pages[i][0].partition("_")[0] for i in (0, -1))
    numbers = f"{first} to {last}" if len(pages) > 1 else first
    subjects = []
    for name, title, _, _ in pages:
        subject = title.removeprefix("The mistakes of ")
        subjects.append(f"[{subject}]({name}.ipynb)")
    minutes = sum(page[3] for page in pages)
    return f"| {numbers} | The mistakes of {'; '.join(subjects)}. | {minutes} | ●● |\n"


def lesson_row(name, title, summary, minutes):
    difficulty = "●" if name in EASY else "●●●" if name in HARD else "●●"
    row = f"| [{name}]({name}.ipynb) | {title}. {summary} | {minutes} | {difficulty} |\n"
    return row.replace("?.", "?").replace("!.", "!")


def table():
    "The rows as markdown."
    rows, said = BEGIN, None
    for group in rows_of(lessons()):
        name = group[0][0]
        part = PARTS.get(name[:2]) if re.match(r"\d\d_", name) else None
        if part and part != said:  # 30_speed and 30_width both begin with 30_
            rows += f"| **{part}** | | | |\n"
            said = part
        is_mistakes = name.endswith("_mistakes")
        rows += mistakes_row(group) if is_mistakes else lesson_row(*group[0])
    return rows


def main():
    if "--times" in sys.argv[1:]:
        for name, (minutes, about) in far_off().items():
            print(f"{name:22} says {minutes}, the estimate is {about}")
        return
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
