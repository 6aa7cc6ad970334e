"""The log of a run: its lines, its speed, its lessons and its question."""

import math
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import losses
from torch.utils.flop_counter import FlopCounterMode

from qwen_nb import data
from qwen_nb import log as log_module
from qwen_nb.lessons import COURSE
from qwen_nb.log import read_log
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig
from qwen_nb.train import forward, init_weights

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")


def test_a_damaged_log(config):
    train(config)
    path = Path(config.out) / "log.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        good[0]
        + b"?"
        + good[1]
        + b"5\n\xff\xfe\n"
        + b'{"step": "x", "loss": 1}\n'
        + b"".join(good[2:])
        + b'{"step": 7, "lo'
    )
    assert [line["step"] for line in read_log(config.out)] == [1, 3, 4, 5, 6]
    train(config)
    assert [line["step"] for line in read_log(config.out)] == [1, 3, 4, 5, 6]
    path.unlink()
    train(config)
    assert read_log(config.out) == []


def test_the_log(config, monkeypatch):
    seen, board = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            board.append((os.path.basename(folder), purge_step))

        def add_scalar(self, name, value, step):
            board.append((name, step))

        def add_text(self, name, value, step):
            board.append((name, step))

        def close(self):
            board.append("closed")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer)
    )
    train(
        replace(config, eval_every=3, sample=5, log_every=2),
        on_log=lambda lines: seen.append(len(lines)),
    )
    log = read_log(config.out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 6] and seen == [1, 2, 3, 4, 5]
    assert (
        [line["step"] for line in log if "held_out" in line]
        == [1, 3, 6]
        == [line["step"] for line in log if "sample" in line]
    )
    assert all(
        line["tokens_per_second"] > 0
        and line["peak_share"] > 0
        and math.isfinite(line["grad_norm"])
        for line in log
    )
    assert (
        board[0] == ("tensorboard", 0)
        and board[-1] == "closed"
        and {("loss", 4), ("sample", 3), ("held_out", 6), ("lr", 1)} <= set(board)
    )
    with open(os.path.join(config.out, "log.jsonl"), "a") as f:
        f.write('{"step": 7, "lo')
    assert read_log(config.out) == log
    log_module.cut_log(config.out, 3)
    assert [line["step"] for line in read_log(config.out)] == [1, 2, 3]


def test_without_tensorboard(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(config)
    assert len(losses(config.out)) == 6


def test_speed():
    c = QwenConfig(100, 32, 64, 3, 4, 2, 8)
    with FlopCounterMode(display=False) as counter:
        model = init_weights(Qwen(c))
        batch = dict(
            input_ids=torch.zeros(1, 40, dtype=torch.long),
            position_ids=torch.arange(40)[None],
            document_ids=torch.zeros(1, 40, dtype=torch.long),
        )
        forward(model, batch)
    matrices = sum(
        v
        for name, v in counter.get_flop_counts()["Global"].items()
        if name.__name__.startswith(("mm", "addmm"))
    )
    attention = 3 * 4 * 4 * 8 * 40 * 40 // 2  # what a causal mask leaves of scores and mix
    assert log_module.flops_per_token(c, 40) * 40 == 3 * (matrices + attention)
    assert 1e8 < log_module.measure_peak("cpu", "float32", 256) < 1e14
    times = iter([0, 5, 10, 12, 20, 29])  # three products; the best took 2
    assert (
        log_module.measure_peak("cpu", size=8, repeats=2, clock=lambda: next(times)) == 2 * 8**3 / 2
    )


# ---- lessons and questions


def test_lessons():
    c = TrainConfig(lesson_rows=100, batch_size=8)
    assert log_module.lesson_steps(c) == 13 and log_module.lesson_steps(TrainConfig()) == 1000
    assert log_module.lesson_steps(TrainConfig(data="book")) == 0
    assert log_module.lesson_steps(TrainConfig(lesson_rows=0)) == 0
    assert log_module.lesson_now(TrainConfig(data="book"), 1) == ""
    assert "lists" in log_module.lesson_now(c, 12) and "stories" in log_module.lesson_now(c, 13)
    assert log_module.why_not_yet(c, 13) and not log_module.why_not_yet(c, 14)
    assert not log_module.why_not_yet(TrainConfig(lesson_rows=0), 1)
    for steps, short in ((13, True), (14, False)):
        assert bool(log_module.too_short(replace(c, steps=steps))) == short
    assert not log_module.too_short(TrainConfig(data="book", steps=1))


def test_every_lesson_has_words():
    names = {name for _, mix in COURSE for name in mix}
    assert names <= log_module.LESSON_WORDS.keys()


def test_what_is_said_at_the_end():
    "Learnt by heart only what was taught: a rise while lessons run is none."
    def log(*losses):
        return [dict(step=100 * i, loss=1.0, held_out=x) for i, x in enumerate(losses, 1)]

    book, world = TrainConfig(data="book", steps=400), TrainConfig(steps=300)
    assert "by heart. More text" in log_module.end_note(book, log(3, 2, 2.5, 3))
    assert "which answering" in log_module.end_note(book, log(3, 2, 2.5, 3), asks=True)
    assert log_module.end_note(book, log(3, 2, 1.5, 1.51)) == log_module.end_note(book, []) == ""
    said = log_module.end_note(world, log(7, 8, 9))
    assert "inside its lessons" in said and "after step 1,000" in said and "heart" not in said
    long = TrainConfig(steps=1400)
    rises_in_lessons = log(*[1.0] * 3, *[9.0] * 7, 2.0, 1.5, 1.2, 1.1)
    assert log_module.end_note(long, rises_in_lessons) == ""


def test_questions():
    find = log_module.find_question
    story = "Max is in the attic.\nMax has the ball.\nWho has the ball? Max.\nMax went away.\n"
    before, question, answer = find(story)
    assert (question, answer) == ("Who has the ball?", "Max.")
    assert before == "Max is in the attic.\nMax has the ball.\nWho has the ball?"
    assert find(story[: story.index("? Max") + 5]) is None  # the answer is cut off
    assert find("Nothing is asked.\n") is None and find("") is None
    talk = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n".format
    before, question, answer = find(talk("Where?", "Here.") + talk("Who?", "Max\nand Ben."))
    assert (question, answer) == ("Who?", "Max\nand Ben.") and before.endswith("assistant\n")
    assert find(talk("Where?", "Here.")[:-12]) is None  # cut inside of the answer's turn
    for tale in data.world_stories(50):
        found = find(tale)
        asked = [line for line in tale.split("\n") if "? " in line]
        assert bool(found) == bool(asked) and (not asked or asked[-1] == " ".join(found[1:]))
