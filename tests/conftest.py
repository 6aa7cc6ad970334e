"""What several test files share."""

import os
import shutil
import signal
import subprocess
import sys
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--share",
        metavar="FOLDER",
        help="run only test files that no process with the same, at first empty, folder has begun",
    )


@lru_cache(None)  # a file's first test decides for all of them
def is_first(folder, name):
    "Whether no process came before this one with this name."
    try:
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def pytest_runtest_protocol(item):
    "True, which means that it is dealt with, if another process has begun the test's file."
    folder = item.config.getoption("--share")
    if folder and not is_first(folder, item.path.name):
        return True


@pytest.fixture(autouse=True)
def torch_as_it_was():
    "No test may leave the others another default dtype."
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def ctrl_c():
    "Ctrl-C does what it does in a terminal, in a background job too, where it is ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the source tree that has no git, with nothing fetched."
    tmp = tmp_path_factory.mktemp("wheel")
    (tmp / "source").mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp / "source")
    shutil.copytree(
        ROOT / "qwen_nb", tmp / "source/qwen_nb", ignore=shutil.ignore_patterns("__pycache__")
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            ".",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            tmp,
        ],
        cwd=tmp / "source",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp.glob("*.whl")
    return built
