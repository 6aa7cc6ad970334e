#!/usr/bin/env python3
"""Every check of the project. `make test` runs it; where there is no make, python tools/test.py"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# seconds: a notebook that takes longer, with one thread and another beside it, is named. A slow
# machine is no fault
LONG = 150
BIN = str(Path(sys.executable).parent)
ENV = os.environ | dict(
    PATH=BIN + os.pathsep + os.environ["PATH"], PYTHONUTF8="1", MPLBACKEND="agg"
)


def run(*command, cwd=ROOT, **env):
    "Run it and show what it prints."
    program = shutil.which(command[0], path=ENV["PATH"]) or command[0]
    return subprocess.run([program, *map(str, command[1:])], cwd=cwd, env=ENV | env).returncode == 0


def python(*args, **kwargs):
    return run(sys.executable, *args, **kwargs)


def exported():
    "Clean and export a copy: nothing may differ from what stands here."
    with tempfile.TemporaryDirectory() as tmp:
        copy, unwanted = Path(tmp), shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        for folder in ("nbs", "qwen_nb"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        if not (run("nbdev-export", cwd=copy) and run("nbdev-clean", cwd=copy)):
            return False
        text = lambda root: {
            p.relative_to(root).as_posix(): p.read_text(encoding="utf-8")
            for p in [*root.glob("nbs/*.ipynb"), *root.glob("qwen_nb/**/*.py")]
        }
        here, there = text(ROOT), text(copy)
        differ = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
    for name in differ:
        print(f"{name} is not clean or not exported: run nbdev-export and nbdev-clean")
    return not differ


def notebooks():
    """Run them all, two at a time, and say which failed and which took long. (A cell that hangs is
    stopped by nbdev after 10 minutes.)"""
    command, lines = (
        [shutil.which("nbdev-test", path=ENV["PATH"]), "--n-workers", "2", "--timing"],
        [],
    )
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENV | dict(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    times = re.findall(r"^(\S+\.ipynb): (\d+) secs", "".join(lines), re.M)
    for name, secs in times:
        if int(secs) > LONG:
            print(
                f"{name} took {secs} s, longer than {LONG} s: is this machine slow, or has the "
                "notebook grown?"
            )
    if process.returncode:
        return (
            ", ".join(re.findall(r"^\t(\S+\.ipynb)$", "".join(lines), re.M))
            or f"nbdev-test ended with {process.returncode}"
        )
    return bool(times)


def tests():
    """Run them in two processes, one thread each, that share the test files. What the second prints
    is shown when both have ended."""
    with tempfile.TemporaryDirectory() as shared, tempfile.TemporaryFile() as printed:
        command = [sys.executable, "-m", "pytest", "-q", "tests", "--share", shared]
        env = ENV | dict(OMP_NUM_THREADS="1")
        both = [
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
            for out in (None, printed)
        ]
        passed = [process.wait() == 0 for process in both]
        printed.seek(0)
        print(printed.read().decode("utf-8", "replace"), end="", flush=True)
    return all(passed)


def workflows():
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    return run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *files) and run(
        "zizmor", "--offline", "--no-progress", "--quiet", *files
    )


STEPS = {
    "notebooks clean and exported": exported,
    "badges, install cells and links": lambda: python("tools/notebooks.py", "--check"),
    "table of lessons": lambda: python("tools/course.py", "--check"),
    "README": lambda: python("tools/readme.py", "--check"),
    "lint": lambda: run("ruff", "check", "--quiet", "--output-format=concise", "."),
    "workflows": workflows,
    "notebooks": notebooks,
    "tests": tests,
}


def main():
    failed, start = [], time.time()
    for name, step in STEPS.items():
        print(f"== {name}", flush=True)
        began, done = time.time(), step()  # True, or False, or what failed
        if done is not True:
            failed.append(f"{name} ({done})" if done else name)
        print(
            f"== {name}: {'passed' if done is True else 'FAILED'} after {time.time() - began:.0f} "
            "s\n",
            flush=True,
        )
    print(
        f"{time.time() - start:.0f} s in all.",
        f"Failed: {', '.join(failed)}." if failed else "All passed.",
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
