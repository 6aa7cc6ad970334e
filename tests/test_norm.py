"RMSNorm against the reference's class on inputs that would bore a reader of notebook 04."

import json
import linecache
from pathlib import Path

import pytest
import torch

from qwen_nb.diagnose import exercise
from qwen_nb.norm import RMSNorm
from qwen_nb.verify import check, check_fails

transformers = pytest.importorskip("transformers")
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm  # noqa: E402

NOTEBOOK = Path(__file__).parent.parent / "nbs/04_rmsnorm.ipynb"
SECOND = NOTEBOOK.with_name("04a_dtypes.ipynb")
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


def notebook_code():
    nb = json.loads(SECOND.read_text(encoding="utf-8"))
    texts = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    return [text.removeprefix("#| reading\n") for text in texts]


@pytest.fixture(scope="module")
def lesson():
    "The names that the exercise needs, from the lesson's own cells."
    reference = type("Reference", (), {"model": type("Model", (), {"norm": Qwen3RMSNorm(2)})})
    f32, b16, f64 = torch.float32, torch.bfloat16, torch.float64
    names = dict(torch=torch, F=torch.nn.functional, check=check, reference=reference)
    names |= dict(f32=f32, b16=b16, f64=f64)
    names |= dict(exercise=exercise)
    starts = "def ms(", "def no_weight(", "def sqrt_and", "def norm_heads(", "#@title Grader"
    for cell in [c for c in notebook_code() if c.startswith(starts)]:
        text, file = cell.split("def worst_of")[0], f"<{cell[:60]}>"
        linecache.cache[file] = len(text), None, text.splitlines(True), file  # for `inspect`
        exec(compile(text, file, "exec"), names)
    return names


def by_heads(f):
    "An answer from a function that norms the last axis."

    def answer(x, weight, eps):
        return f(x.unflatten(-1, (-1, len(weight))), weight, eps).flatten(-2)

    return answer


def in_double(x, weight, eps):
    h = x.double()
    h = h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return weight * h.to(x.dtype)


def in_place(x, weight, eps):
    return x.copy_(RMSNorm(x.shape[-1], eps)(x.float()).detach()).mul_(weight)


@pytest.mark.parametrize("right", ["sqrt_and_divide", in_double, in_place])
def test_the_grader_accepts_every_right_answer(lesson, right):
    "A rounding in float32 is no mistake, and neither is writing into what was handed over."
    right = lesson[right] if isinstance(right, str) else right
    lesson["norm_heads_exercise"](by_heads(right))


def test_the_grader_refuses_every_mistake_of_the_lesson(lesson):
    assert len(lesson["mistakes"]) == 8
    wrong = [by_heads(f) for f in lesson["mistakes"].values()]
    wrong += [lesson["norm_heads"], lesson["all_together"], lambda x, weight, eps: None]
    wrong += [lambda x, weight, eps: x.float(), lambda x, weight, eps: x[..., :8]]
    for f in wrong:
        with pytest.raises(AssertionError) as e:
            lesson["norm_heads_exercise"](f)
        assert len(str(e.value)) > 20


def test_the_text_names_both_defaults_of_eps():
    "The default eps of nn.RMSNorm changed with PyTorch 2.7; settings.ini allows older ones."
    text = SECOND.read_text(encoding="utf-8")
    assert "up to 2.6" in text and "from 2.7" in text and "142848" in text
    x = torch.full((1, 64), 0.01, dtype=torch.bfloat16)
    got = torch.nn.functional.rms_norm(x, (64,))
    version = tuple(int(n) for n in torch.__version__.split(".")[:2])
    rule = torch.float32 if version >= (2, 7) else torch.bfloat16
    want = torch.nn.functional.rms_norm(x, (64,), None, torch.finfo(rule).eps)
    assert torch.equal(got, want)


def test_what_without_norms_means_is_told():
    "Both ways to take them out are measured: the stream's alone, and q_norm and k_norm too."
    outputs = NOTEBOOK.read_text(encoding="utf-8")
    assert "the stream's  " in outputs and "all, q_norm and k_norm too  " in outputs
    assert "times as much" in outputs
