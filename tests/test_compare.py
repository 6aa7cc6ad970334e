"Whole models compared: outputs of all kinds, names that differ, any error drawn."

import json
import math
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

from qwen_nb.compare import first_difference, plot_errors, record, worst_steps
from qwen_nb.verify import check, must_accept, must_refuse, rounding_steps

INF, NAN = math.inf, math.nan


class Odd(nn.Module):
    "Gives all the kinds of output that `record` may meet."

    def __init__(self):
        super().__init__()
        self.pair, self.none, self.empty, self.linear = (
            Const((torch.ones(2), None)),
            Const(None),
            Const(()),
            nn.Linear(2, 2),
        )

    def forward(self, x, scale=1):
        self.pair(x), self.none(x), self.empty(x)
        return (
            self.linear(x).mul_(scale).add_(1)
        )  # in place: what was recorded must not change with it


class Const(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out


def test_record():
    model, x = Odd(), torch.ones(1, 2)
    seen = record(model, x, scale=2)
    assert list(seen) == ["pair", "linear", ""]
    assert not any(t.requires_grad for t in seen.values())
    check(seen["linear"] * 2 + 1, seen[""], steps=0)
    assert not any(m._forward_hooks for m in model.modules())


def test_record_takes_its_hooks_out_after_an_error():
    model = Odd()
    with pytest.raises(RuntimeError):
        record(model, torch.ones(1, 5))
    assert not any(m._forward_hooks for m in model.modules())


def runs():
    theirs = {"a": torch.ones(2), "wrapped": torch.ones(2), "b": torch.ones(2), "": torch.ones(2)}
    return {k: v.clone() for k, v in theirs.items()}, theirs


def test_first_difference():
    ours, theirs = runs()
    assert first_difference(ours, theirs, steps=0) is None
    del ours["wrapped"]
    ours["extra"] = torch.zeros(1)
    assert first_difference(ours, theirs, steps=0) is None and list(worst_steps(ours, theirs)) == [
        "a",
        "b",
        "",
    ]
    for wrong in (
        torch.tensor([1, NAN]),
        torch.ones(3),
        torch.ones(2).double(),
        torch.ones(2) * 1.1,
    ):
        assert first_difference(ours | {"b": wrong}, theirs) == "b"
    assert (
        first_difference(ours | {"": torch.zeros(2)}, theirs) == ""
    )  # not None: a name, and a false one


def test_nothing_in_common():
    ours, theirs = runs()
    for bad in ({}, {"a": theirs["a"]}, {"model." + k: v for k, v in ours.items()}):
        with pytest.raises(ValueError, match="no output named ''"):
            first_difference(bad, theirs)
    with pytest.raises(ValueError):
        first_difference(ours, {})


def test_modules_without_elements_are_equal():
    none = {
        "expert": torch.empty(0, 3),
        "": torch.ones(1),
    }  # an expert of a mixture to which no token was sent
    assert first_difference(none, none, steps=0) is None


def test_plot_errors_draws_any_error():
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    ours, theirs = runs()
    fig, ax = plt.subplots()
    for wrong in 1.0, 1 + 1e-6, 1.5, NAN, INF:
        for steps in 0, 64, INF:
            plot_errors(ours | {"b": ours["b"] * wrong}, theirs, steps, ax)
            found = first_difference(ours | {"b": ours["b"] * wrong}, theirs, steps)
            assert ("No module" in ax.get_title()) == (found is None) and [
                t.get_text() for t in ax.texts
            ] == [found] * (found is not None)
            fig.canvas.draw()
            ax.clear()
    plt.close("all")


def test_logits_before_hidden_states():
    class Output:
        logits, last_hidden_state = torch.ones(1), torch.zeros(1)

    class Hidden:
        last_hidden_state = torch.zeros(1)

    assert record(Const(Output()), torch.ones(1))[""] == 1
    assert record(Const(Hidden()), torch.ones(1))[""] == 0


def exercise():
    "Stub, grader and solution of the exercise, out of their cells."
    path = Path(__file__).parent.parent / "nbs/01a_compare.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    names = dict(torch=torch, math=math, rounding_steps=rounding_steps, must_accept=must_accept)
    names["try_answer"] = lambda grader, answer: None
    for cell in cells:
        if "def first_bad_position" in cell or "def grade_first_bad_position" in cell:
            exec(cell, names)
    return names


def test_the_exercise_takes_numbers_of_any_kind():
    names = exercise()
    solution = names["first_bad_position_solution"]

    def as_tensor(ours, theirs, steps=8):
        found = solution(ours, theirs, steps)
        return None if found is None else torch.tensor(found)

    def in_a_loop(ours, theirs, steps=8):
        for i in range(ours.shape[1]):
            if (rounding_steps(ours[:, i], theirs[:, i]) > steps).any():
                return i

    must_accept(names["grade_first_bad_position"], as_tensor)
    must_accept(names["grade_first_bad_position"], in_a_loop)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b, steps=8: None,
        lambda a, b, steps=8: 0,
        lambda a, b, steps=8: 7,
        lambda a, b, steps=8: (rounding_steps(a, b) > steps).nonzero()[0, 1].item(),
        lambda a, b, steps=8: rounding_steps(a, b).amax((0, 2, 3)).argmax().item(),
        lambda a, b, steps=8: (rounding_steps(a, b).amax((0, 2, 3)) > 8).nonzero()[0].item(),
        lambda a, b, steps=8: (rounding_steps(a, b)[-1].amax((1, 2)) > steps).nonzero()[0].item(),
        lambda a, b, steps=8: (rounding_steps(a, b)[1].amax((1, 2)) > steps).nonzero()[0].item(),
        lambda a, b, steps=8: (rounding_steps(a, b).mean((0, 2, 3)) > steps).nonzero()[0].item(),
    ],
)
def test_the_exercise_refuses(wrong):
    must_refuse(exercise()["grade_first_bad_position"], wrong, "a wrong answer")
