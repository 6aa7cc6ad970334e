"RMSNorm against the reference's class on inputs that would bore a reader of notebook 04."

import json
from pathlib import Path

import pytest
import torch

from qwen_nb.norm import RMSNorm
from qwen_nb.verify import check, check_fails

transformers = pytest.importorskip("transformers")
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm  # noqa: E402

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = (1, 1, 64), (2, 7, 64), (64,), (2, 3, 4, 64), (0, 5, 64), (3, 5, 1), (2, 5, 1000)


def pair(size, eps, dtype, theirs=Qwen3RMSNorm):
    torch.manual_seed(size)
    theirs = theirs(size, eps=eps).to(dtype)
    theirs.weight.data = torch.randn(size).to(dtype)
    ours = RMSNorm(size, eps).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("theirs", [Qwen2RMSNorm, Qwen3RMSNorm])
def test_bit_for_bit(dtype, shape, theirs):
    ours, theirs = pair(shape[-1], 1e-5, dtype, theirs)
    for size in (1e-6, 1, 1e4):
        x = (torch.randn(shape) * size).to(dtype)
        a, b = ours(x), theirs(x)
        assert a.dtype == dtype and a.shape == x.shape and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_values(dtype):
    ours, theirs = pair(4, 1e-6, dtype)
    big = torch.finfo(dtype).max
    x = torch.tensor(
        [
            [0, 0, 0, 0],
            [big, 1, 1, 1],
            [-big, big, big, big],
            [1e-30, 0, 0, 0],
            [60000, -60000, 1, 0],
        ],
        dtype=torch.float64,
    ).to(dtype)
    a, b = ours(x), theirs(x)
    assert (
        torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        and (a[0] == 0).all()
        and a[4].isfinite().all()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_token_spoils_no_other(bad):
    ours, _ = pair(4, 1e-6, torch.float32)
    x = torch.ones(2, 3, 4)
    clean = ours(x)
    x[1, 1, 2] = bad
    y = ours(x)
    assert y[1, 1].isnan().any()
    y[1, 1] = clean[1, 1]
    check(y, clean, steps=0)


def test_views_and_gradients():
    ours, theirs = pair(8, 1e-6, torch.float32)
    x = torch.randn(2, 8, 3).transpose(1, 2).requires_grad_()
    gradients = []
    for norm in ours, theirs:
        x.grad = None
        norm(x).square().sum().backward()
        gradients.append((x.grad, norm.weight.grad))
    for a, b in zip(*gradients):
        check(a, b, steps=0)


def test_it_is_a_checkpoints_norm():
    assert list(RMSNorm(5).state_dict()) == ["weight"]
    assert repr(RMSNorm(5, 1e-5)) == "RMSNorm(5, eps=1e-05)"
    assert torch.equal(RMSNorm(5).weight, torch.ones(5)) and RMSNorm(5).eps == 1e-6


def test_eps_is_used():
    x = torch.full((4,), 1e-3)
    check(RMSNorm(4, 1e-6)(x), torch.full((4,), 0.5**0.5))
    check_fails(RMSNorm(4, 1e-5)(x), torch.full((4,), 0.5**0.5))


def test_the_exercise_fails_on_its_stub():
    nb = json.loads(
        (Path(__file__).parent.parent / "nbs/04_rmsnorm.ipynb").read_text(encoding="utf-8")
    )
    cells = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    stub, grader = (
        next(c for c in cells if c.startswith(f"def {n}(")) for n in ("norm_heads", "grade")
    )
    reference = type("Reference", (), {"model": type("Model", (), {"norm": Qwen3RMSNorm(2)})})
    names = dict(torch=torch, check=check, reference=reference)
    exec(stub, names)
    exec(grader.split("\ntry:")[0], names)
    early = lambda x, w, eps: (
        (
            w
            * torch.nn.functional.rms_norm(
                x.unflatten(-1, (-1, len(w))).float(), (len(w),), None, eps
            )
        )
        .to(x.dtype)
        .flatten(-2)
    )
    for bad in names["norm_heads"], lambda x, w, eps: None, early:
        with pytest.raises(AssertionError):
            names["grade"](bad)
