"Edge cases of the ruler that would bore a reader of notebook 01."

import json
import math
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

from qwen_nb.verify import (
    check,
    check_fails,
    first_difference,
    plot_errors,
    record,
    rounding_steps,
    worst_steps,
)

FLOATS = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbours_are_at_most_one_step_apart(dtype):
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tiny = torch.finfo(dtype).smallest_normal
    a = torch.tensor([1.0, 1.999, 3e-3, 500.0, tiny, tiny / 2, 0.0], dtype=dtype)
    b = (a.view(whole) + 1).view(dtype)
    for x, y in zip(a, b):  # each alone, so that no larger number lends it a coarser unit
        assert 0 < rounding_steps(y, x) <= 1
        assert 0 < rounding_steps(y[None], x[None]) <= 1
    with pytest.raises(AssertionError):
        check(b, a, steps=0)
    check(b, a, steps=1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_nan(dtype):
    a, b = torch.tensor(
        [[1, INF, -INF, INF, NAN, NAN, 2], [1, INF, -INF, -INF, NAN, 1, INF]], dtype=dtype
    )
    assert rounding_steps(a, b).tolist() == [0, 0, 0, INF, INF, INF, INF]
    assert rounding_steps(b, a).tolist() == [0, 0, 0, INF, INF, INF, INF]
    check(a[:3], b[:3], steps=0)
    for i in range(3, 7):
        check_fails(a[i], b[i], steps=1e300)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_unit_is_eps_times_size_plus_mean(dtype):
    b = torch.tensor([[1.0, 2.0, 0.0, -5.0], [64, 0, 0, 0]], dtype=dtype)  # means 2 and 16
    a = b.double() + torch.tensor([[0.0, 0.25, 0.5, -1.0], [0, 0, 0, 1]])
    expected = (
        torch.tensor([[0.0, 0.25 / 4, 0.5 / 2, 1 / 7], [0, 0, 0, 1 / 16]], dtype=torch.float64)
        / torch.finfo(dtype).eps
    )
    assert torch.allclose(rounding_steps(a.to(dtype), b), expected, rtol=1e-12)


def test_an_infinity_does_not_stretch_the_unit():
    b = torch.tensor([1.0, 1.0, -INF])
    assert rounding_steps(b + 1e-3, b)[0] > 1000


def test_zeros_are_measured_by_the_smallest_number():
    zero = torch.zeros(3)
    check(zero, -zero, steps=0)
    assert rounding_steps(zero + 1e-30, zero).min() > 1e14
    a = torch.tensor([[0.0, 0, 0], [1, 2, 3]])  # a row of zeros is judged alone
    assert rounding_steps(a + 1e-9, a)[0].min() > 1e30 and rounding_steps(a + 1e-9, a)[1].max() < 1


def test_float64_up_to_its_largest_numbers():
    b = torch.tensor([1e308, 1e308, 1e308], dtype=torch.float64)
    assert rounding_steps(b * (1 - 1e-6), b).min() > 1e9
    assert rounding_steps(-b, b).min() == INF  # their difference overflows


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_are_equal_or_not(dtype):
    a, b = torch.tensor([1, 0, 1], dtype=dtype), torch.tensor([1, 1, 1], dtype=dtype)
    assert rounding_steps(a, b).tolist() == [0, INF, 0]
    check(a, a.clone(), steps=0)
    check_fails(a, b, steps=1e300)


def test_large_integers_are_not_rounded():
    a = torch.tensor([2**53 + 1])
    with pytest.raises(AssertionError, match=f"ours {2**53 + 1}, theirs {2**53}"):
        check(a, a - 1)


def test_unlike_tensors():
    x = torch.ones(2, 3)
    for other in x[0], x.double(), x.T:
        with pytest.raises(ValueError, match="they must be alike"):
            rounding_steps(other, x)
    with pytest.raises(AssertionError, match=r"our shape is \(3,\), theirs \(2, 3\)"):
        check(x[0], x)  # it would broadcast
    with pytest.raises(AssertionError, match="our dtype is torch.float64"):
        check(x.double(), x)
    with pytest.raises(AssertionError, match="ours is a NoneType"):
        check(None, x, name="empty stub")
    with pytest.raises(AssertionError, match="nothing to compare"):
        check(x[:0], x[:0])


def test_numbers_with_gradients_and_without_axes():
    x = torch.tensor(3.0, requires_grad=True)
    check(x, x.detach(), steps=0)
    check(nn.Parameter(torch.ones(2)), torch.ones(2) * (1 + 1e-7))


def test_the_message_points_at_the_worst(capsys):
    b = torch.ones(2, 3)
    a = b.clone()
    a[1, 2], a[0, 1] = 2, 1.5
    with pytest.raises(
        AssertionError,
        match=r"at \(1, 2\), ours 2, theirs 1; 2 of 6 elements are over the 8 allowed",
    ):
        check(a, b)
    check(b, b, name="same")
    assert capsys.readouterr().out == "✓ same: bit for bit equal, float32 (2, 3)\n"


def test_check_fails_fails():
    with pytest.raises(AssertionError, match="cannot see this mistake"):
        check_fails(torch.ones(2), torch.ones(2))


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


def test_the_exercise_fails_on_its_stub():
    nb = json.loads(
        (Path(__file__).parent.parent / "nbs/01_verify.ipynb").read_text(encoding="utf-8")
    )
    cells = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    names = dict(torch=torch, math=math, rounding_steps=rounding_steps)
    stub, grader = (
        next(c for c in cells if c.startswith(f"def {n}(")) for n in ("first_bad_position", "grade")
    )
    exec(stub, names)
    exec(grader.split("\ntry:")[0], names)
    for bad in (
        names["first_bad_position"],
        lambda *a, **k: 0,
        lambda a, b, steps=8: 7,
        lambda a, b, steps=8: int(rounding_steps(a, b).amax((0, 2, 3)).argmax()),
    ):
        with pytest.raises(AssertionError):
            names["grade"](bad)
