"""Scaling: the floor of rows without an end token, what a point is, and that the stored points are
those of this code."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from qwen_nb.budget import Objective, label_weight
from qwen_nb.log import flops_per_token
from qwen_nb.model import Qwen
from qwen_nb.rows import IGNORED
from qwen_nb.scaling import (
    end_nats,
    fit_law,
    frontier,
    mean_loss,
    run_point,
    sized,
    story_batch,
    story_ids,
)
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.train import forward, init_weights
from qwen_nb.world import PEOPLE, Chooser, story

STORED = json.loads(
    (Path(__file__).resolve().parent.parent / "benchmarks/scaling.json").read_text(encoding="utf-8")
)


def test_the_end_costs_what_it_says():
    "Told again and again from the same lines, a story ends there as often as `end_nats` says."
    lines = story(Chooser(random.Random(7)))
    assert math.exp(-end_nats(lines)) == pytest.approx(
        1
        / (
            (9 - sum(l.text.split()[1] in ("went", "took", "dropped", "gave") for l in lines))
            * (3 - sum(1 for _ in trailing(lines)))
        )
    )
    ends = told = 0.0
    for seed in range(3000):
        lines = story(Chooser(random.Random(seed)))
        for i in range(1, len(lines) + 1):
            events = sum(
                l.kind is None and l.text.split()[1] in ("went", "took", "dropped", "gave")
                for l in lines[:i]
            )
            if events == 5:
                ends, told = ends + math.exp(-end_nats(lines[:i])), told + (i == len(lines))
    assert abs(ends - told) < 4 * math.sqrt(told)  # those that end after five events


def trailing(lines):
    for line in reversed(lines):
        if not line.kind:
            return
        yield line


def test_the_floor():
    words = Tokenizer.from_pretrained()
    ids, floor = story_ids(words, 20, "x")
    nats = labels = 0
    for i in range(20):
        choose = Chooser(random.Random(f"x/{i}"))
        lines = story(choose)
        nats, labels = (
            nats + choose.nats - math.log(len(PEOPLE)) - end_nats(lines),
            labels + len(words.encode("".join(l.text + "\n" for l in lines))) - 1,
        )
    assert floor == pytest.approx(nats / labels) and labels == sum(
        map(len, ids)
    ) - 20 == label_weight(story_batch(ids))


def test_a_batch_is_its_stories():
    ids, _ = story_ids(Tokenizer.from_pretrained(), 5, 0)
    model = init_weights(Qwen(sized(32)))
    batch = story_batch(ids)
    with torch.no_grad():
        for row, x in enumerate(ids):
            alone = forward(model, story_batch([x]))
            assert torch.allclose(forward(model, batch)[row, : len(x) - 1], alone[0], atol=1e-4)
            assert (
                batch["labels"][row, : len(x) - 1].tolist() == x[1:]
                and (batch["labels"][row, len(x) - 1 :] == IGNORED).all()
            )
    assert mean_loss(Objective(model), ids, 2) == pytest.approx(
        mean_loss(Objective(model), ids, 5), rel=1e-5
    )


def test_the_stored_points_are_of_this_code():
    points = STORED["points"]
    assert {(p["hidden"], p["steps"]) for p in points} >= {
        (h, s) for h in (16, 32, 64, 96) for s in (40, 80, 160, 320)
    } and len({p["floor"] for p in points}) == 1
    lengths = [len(x) - 1 for x in story_ids(Tokenizer.from_pretrained(), 640, "train")[0]]
    for p in points:
        assert (
            p["parameters"] == sum(w.numel() for w in Qwen(sized(p["hidden"])).parameters())
            and p["loss"] > p["floor"]
        )
        if p["steps"] == 40:
            assert p["tokens"] == sum(lengths) and p["flops"] == sum(
                n * flops_per_token(sized(p["hidden"]), n) for n in lengths
            )
    small = run_point(16, 40)
    stored = next(p for p in points if (p["hidden"], p["steps"]) == (16, 40))
    assert small | dict(loss=0) == stored | dict(loss=0) and small["loss"] == pytest.approx(
        stored["loss"], rel=0.005
    )


def test_law_and_frontier():
    points = [dict(flops=c, loss=0.5 + 7 * c**-0.3) for c in (1e6, 1e7, 1e9)]
    assert fit_law(points, 0.5) == pytest.approx((7, 0.3))
    assert (
        frontier([dict(flops=2e7, loss=9.0), *reversed(points), dict(flops=1e6, loss=8.0)])
        == points
    )
