"""Lessons of the building edition, run as they stand or solved: what two test files share, so that
two processes can share the work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_nb.mine import lessons_with_pieces

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted(path.stem for path in (ROOT / "building").glob("*.ipynb"))
LONG = "14b_balance", "22_finetune", "22a_lora", "22b_preference", "22c_rewards"  # they train
ENV = dict(MPLBACKEND="agg", OMP_NUM_THREADS="1", PYTHONUTF8="1")


def run_lessons(*names, solved=False, **env):
    "Lessons in one call of the tool, each in a process of its own: name → what the graders said."
    command = [sys.executable, "tools/building.py", "--run", *names, *["--solved"] * solved]
    done = subprocess.run(
        command,
        env=os.environ | ENV | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    if len(names) == 1:
        return {names[0]: done.stdout if not done.returncode else f"FAILED\n{done.stdout}"}
    parts = re.split(r"(?m)^== (\w+)$", done.stdout)
    return dict(zip(parts[1::2], parts[2::2]))


def chosen_lessons(request):
    "The lessons that are asked for in the tests that were chosen of a file."
    chosen = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in chosen if hasattr(item, "callspec")]
    return list(dict.fromkeys(names))


def a_share(first):
    "Every second lesson, from the first or the second on; those that train are slow."
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow) if n in LONG else n for n in LESSONS[first::2]]


def check_empty(name, said):
    "A lesson with nothing filled in runs to its end, and each grader says what is to do."
    assert "FAILED" not in said, said
    for piece in lessons_with_pieces()[name]:
        assert f"… {piece.name} is still to be written" in said, said
    assert "✗" not in said, said


def check_solved(name, said):
    "A lesson with everything filled in runs to its end, every piece is right, the model answers."
    assert "FAILED" not in said, said
    assert said.count("is right") == len(lessons_with_pieces()[name]), said
    assert "Who has the ball?" in said, said
