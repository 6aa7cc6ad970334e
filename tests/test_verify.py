"Edge cases of the ruler and of the graders that would bore a reader of notebook 01."

import json
import math
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_nb.inspect import load_reference
from qwen_nb.verify import (
    back_to_front,
    check,
    check_fails,
    must_accept,
    must_refuse,
    planted,
    rounding_steps,
    told,
    try_answer,
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


def test_five_for_one_beside_an_infinity():
    "An infinity in the mean would make every step of its vector infinite, and hide this."
    ours, theirs = torch.tensor([INF, 5.0]), torch.tensor([INF, 1.0])
    assert rounding_steps(ours, theirs)[1] > 1e6
    check_fails(ours, theirs, steps=1e6)
    check_fails(torch.tensor([-INF, 5.0]), torch.tensor([-INF, 1.0]), steps=1e6)


def test_hooks_are_taken_out():
    model, _ = load_reference()
    with pytest.raises(KeyboardInterrupt), back_to_front(model):
        assert any(m._forward_hooks for m in model.modules())
        raise KeyboardInterrupt
    assert not any(m._forward_hooks for m in model.modules())
    with planted():
        pass


# graders


def add(a, b):
    mean = b.mean(-1)
    return a + mean


class Layer:
    def __init__(self, size):
        self.size = size

    def __call__(self, x):
        return x.view(self.size)


def decorated(f):
    @wraps(f)
    def inner(*args):
        return f(*args)

    return inner


def grade_add(answer):
    got = answer(torch.ones(3, 4), torch.ones(3, 4))
    if got is None:  # no assert: pytest would write more lines into its message
        raise AssertionError("the function returns None: it is still empty")
    if got.shape != (3, 4):
        raise AssertionError(f"shape {tuple(got.shape)}, expected (3, 4)")


def grade_layer(answer):
    answer(5)(torch.ones(4))


def failure(grader, answer):
    with pytest.raises(Exception) as info:
        grader(answer)
    return told(info.value, answer)


@pytest.mark.parametrize("answer", [add, decorated(add), torch.no_grad()(add)])
def test_a_slip_in_a_shape_names_the_line(answer):
    said = failure(grade_add, answer)
    assert said.startswith("your code stopped at `return a + mean` with RuntimeError: The size of")
    assert "\n" not in said


def test_a_slip_in_a_class_names_the_line():
    said = failure(grade_layer, Layer)
    assert said.startswith("your code stopped at `return x.view(self.size)` with RuntimeError")
    same = failure(lambda layer: layer(torch.ones(4)), Layer(5))
    assert same == said


def test_the_learners_line_is_named_though_the_grader_stands_in_the_same_file():
    def helped(a, b):
        return add(a, b)

    assert "`return add(a, b)`" in failure(grade_add, helped)


def test_what_the_grader_cannot_use_is_no_line_of_the_learner():
    said = failure(grade_add, lambda a, b: 3)
    assert said.startswith("the grader could not go on with what your code gave it, AttributeError")
    assert failure(grade_add, 3).startswith("the grader could not go on")  # no function at all
    assert failure(grade_add, partial(max, 1)).startswith("the grader could not go on")


def test_sentences_of_the_grader_are_kept():
    assert failure(grade_add, lambda a, b: None).endswith("it is still empty")

    def empty(a, b):
        raise AssertionError

    said = failure(grade_add, empty)
    assert said == "your code stopped at `raise AssertionError` with AssertionError"


def test_code_without_a_file_still_has_a_line():
    names = {}
    exec("def f(a, b):\n    return a + b.mean(-1)", names)
    assert failure(grade_add, names["f"]).startswith(
        "your code stopped at line 2 with RuntimeError"
    )


def test_only_the_first_line_of_a_long_message():
    def long(a, b):
        raise ValueError("first\nsecond")

    assert failure(grade_add, long).endswith("with ValueError: first")


def test_try_answer_never_raises(capsys):
    assert try_answer(grade_add, lambda a, b: a) is True
    for wrong in (add, lambda a, b: None, None, lambda: None, "text"):
        assert try_answer(grade_add, wrong) is False
    right, *rest = capsys.readouterr().out.splitlines()
    assert right == "✓ right"
    assert len(rest) == 5 and all(line.startswith("not yet: ") for line in rest)


def test_graders_are_tested_both_ways(capsys):
    must_accept(grade_add, lambda a, b: a)
    must_refuse(grade_add, add, "the axis lost")
    assert capsys.readouterr().out.startswith("✗ the axis lost: your code stopped at")
    with pytest.raises(AssertionError, match="refuses the solution: .*still empty"):
        must_accept(grade_add, lambda a, b: None, "the solution")
    with pytest.raises(AssertionError, match="the grader accepts a wrong sum"):
        must_refuse(grade_add, lambda a, b: a, "a wrong sum")


def cells_of(name):
    path = Path(__file__).parent.parent / f"nbs/{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in code]


def exercise():
    "Stub, grader and solution of the exercise, out of their cells."
    names = dict(torch=torch, rounding_steps=rounding_steps, try_answer=lambda *a: None)
    for cell in cells_of("01_verify"):
        if "def my_steps" in cell or "def grade_my_steps" in cell:
            exec(cell, names)
    return names


def test_the_exercise_takes_every_way_to_write_it():
    names = exercise()

    def by_hand(ours, theirs):
        eps = torch.finfo(theirs.dtype).eps
        ours.sub_(0)  # in place: the grader hands over copies
        a, b = ours.to(torch.float64), theirs.to(torch.float64)
        mean = b.abs().sum(-1)[..., None] / b.shape[-1]
        return torch.abs(b - a) / eps / (torch.abs(b) + mean)

    must_accept(names["grade_my_steps"], by_hand)
    must_accept(names["grade_my_steps"], names["my_steps_solution"])
    must_refuse(names["grade_my_steps"], names["my_steps"], "the stub")


def test_an_endless_loop_is_stopped_in_any_thread():
    import threading
    import time

    from qwen_nb.verify import at_most

    def endless():
        while True:
            pass

    def tried():
        try:
            with at_most(0.1):
                endless()
        except TimeoutError as error:
            said.append(str(error))

    said = []
    tried()
    thread = threading.Thread(target=tried)
    thread.start()
    thread.join(10)
    assert said == ["still running after 0.1 s: does every loop end?"] * 2
    with at_most(0.1):
        pass
    time.sleep(0.3)  # a block that ended in time is not interrupted afterwards


def test_a_grader_stops_an_endless_answer(monkeypatch):
    from qwen_nb import pieces
    from qwen_nb.diagnose import diagnose
    from qwen_nb.mine import pieces_of

    def endless(x):
        while True:
            pass

    at_most = pieces.at_most
    monkeypatch.setattr(pieces, "at_most", lambda seconds: at_most(0.05))
    verdict = diagnose(pieces_of("rotate_half")[0], endless)
    assert not verdict.right and "`while True:` with TimeoutError: still running" in verdict.text
