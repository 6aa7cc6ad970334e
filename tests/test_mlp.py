"""SwiGLU against the reference's MLPs, on pretrained and random weights; graders of 07."""

import json
import linecache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qwen_nb.compare import record
from qwen_nb.diagnose import exercise
from qwen_nb.inspect import load_reference
from qwen_nb.memory import QWEN_CONFIGS, count_parameters
from qwen_nb.mlp import SwiGLU
from qwen_nb.verify import rounding_steps

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "07_swiglu.ipynb"
CONFIGS = ROOT.parent / "shared" / "qwen" / "configs"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def near(ours, theirs, steps=8):
    return rounding_steps(ours, theirs).max() <= steps


def ours_like(theirs):
    m = SwiGLU(*theirs.gate_proj.weight.shape[::-1])
    m.load_state_dict(theirs.state_dict(), strict=True)
    return m.to(theirs.gate_proj.weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_every_layer_of_the_pretrained_model(dtype):
    reference, tokenizer = load_reference(dtype=dtype)
    seen = record(
        reference,
        tokenizer("Max has the ball.\nAnna is in the attic.\n", return_tensors="pt").input_ids,
    )
    for i, block in enumerate(reference.model.layers):
        x = seen[f"model.layers.{i}.post_attention_layernorm"]
        got, want = record(ours_like(block.mlp), x), seen[f"model.layers.{i}.mlp"]
        assert near(got[""], want), i
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert near(got[name], seen[f"model.layers.{i}.mlp.{name}"]), (i, name)
        a, b, W = got["gate_proj"], got["up_proj"], block.mlp.down_proj.weight
        for wrong in (
            F.silu(b) * a,
            F.gelu(a) * b,
            F.relu(a) * b,
            a.sigmoid() * b,
            F.silu(b),
            F.silu(a),
        ):
            assert not near(wrong @ W.T, want), i


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
@torch.no_grad()
def test_random_weights_of_both_families(family, dtype):
    import transformers

    module = __import__(
        f"transformers.models.{family.lower()}.modeling_{family.lower()}", fromlist=["x"]
    )
    for hidden, intermediate in ((16, 40), (24, 24), (40, 8)):
        torch.manual_seed(0)
        theirs = getattr(module, f"{family}MLP")(
            getattr(transformers, f"{family}Config")(
                hidden_size=hidden, intermediate_size=intermediate
            )
        ).to(dtype)
        x = torch.randn(3, 5, hidden).to(dtype)
        assert near(ours_like(theirs)(x), theirs(x))


@torch.no_grad()
def test_positions_do_not_mix_and_any_leading_axes():
    torch.manual_seed(0)
    mlp, x = SwiGLU(16, 40), torch.randn(2, 6, 16)
    y, other = mlp(x), x.clone()
    other[0, 2] = 100.0
    changed = (mlp(other) - y).abs().amax(-1) > 1e-5
    assert changed.nonzero().tolist() == [[0, 2]]
    assert (
        near(mlp(x[0, 0]), y[0, 0], 64)
        and near(mlp(x[None]), y[None], 64)
        and mlp(x[:, :0]).shape == (2, 0, 16)
    )


def test_names_and_count():
    mlp = SwiGLU(16, 40)
    assert {n: tuple(p.shape) for n, p in mlp.named_parameters()} == {
        "gate_proj.weight": (40, 16),
        "up_proj.weight": (40, 16),
        "down_proj.weight": (16, 40),
    }
    with pytest.raises(RuntimeError, match="bias"):
        mlp.load_state_dict({**mlp.state_dict(), "gate_proj.bias": torch.zeros(40)}, strict=True)


def lesson():
    "The names that the exercises of 07 need, from the notebook's own cells."
    torch.manual_seed(0)
    layers = [SwiGLU(16, 24), SwiGLU(16, 24)]
    blocks = [type("Block", (), {"mlp": m}) for m in layers]
    reference = type("Model", (), {"model": type("Decoder", (), {"layers": blocks})})
    names = dict(torch=torch, F=F, exercise=exercise, layer=1)
    gate, up, down = (p.detach() for p in layers[1].parameters())
    names |= dict(x=torch.randn(1, 5, 16), W_gate=gate, W_up=up, W_down=down)
    names["reference"] = reference
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if text.startswith(("#@title Grader", "def fused_mlp", "def gated_")):
            file = f"<cell {cell['id']}>"  # where the engine looks for the solution's source
            linecache.cache[file] = len(text), None, text.splitlines(True), file
            exec(compile(text, file, "exec"), names)
    return names


def fused(x, W, W_down):
    gate, up = (x @ W.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ W_down.T


@torch.no_grad()
def test_the_grader_of_the_fused_mlp():
    "Wrong: sizes in the code, matrices from elsewhere, halves in the wrong order, one dtype."
    names = lesson()
    grade, by_hand = names["fused_mlp_exercise"], names["mlp_by_hand"]
    grade(fused)
    grade(lambda x, W, down: x.copy_(fused(x, W, down)))
    a, b, c = names["W_gate"], names["W_up"], names["W_down"]
    for wrong in (
        names["fused_mlp"],
        lambda x, W, down: by_hand(x, a, b, down),
        lambda x, W, down: fused(x, W, c),
        lambda x, W, down: fused(x, W.roll(len(W) // 2, 0), down),
        lambda x, W, down: (F.silu((x @ W.T)[..., :24]) * (x @ W.T)[..., 24:]) @ down.T,
        lambda x, W, down: fused(x.float(), W.float(), down.float()),
        lambda x, W, down: F.gelu(x @ W[: len(W) // 2].T) * (x @ W[len(W) // 2 :].T) @ down.T,
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            grade(wrong)


def test_the_grader_of_the_width():
    names = lesson()
    right = lambda h: -(-8 * h // 384) * 128
    names["gated_width_exercise"](right)
    for wrong in (names["gated_width"], lambda h: float(right(h)), lambda h: 4 * h):
        with pytest.raises(AssertionError):
            names["gated_width_exercise"](wrong)
    with pytest.raises(AssertionError, match="The mistake: a float"):
        names["gated_width_exercise"](lambda h: right(h) * 1.0)


def test_the_mlps_share_is_told_as_it_is():
    "In Qwen3-0.6B less than half of the weights sit in the MLPs."
    parts = count_parameters(QWEN_CONFIGS["Qwen3-0.6B"])
    assert round(100 * parts["mlp"] / sum(parts.values())) == 44
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "most of a model's weights" not in text
    assert "Qwen3-0.6B     44%" in text and "it is 44 %" in text


@pytest.mark.skipif(not CONFIGS.exists(), reason="no released configs here")
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-0.6B", "Qwen3-4B"])
def test_the_chart_has_the_released_widths(name):
    found = next(CONFIGS.glob(f"{name}*.config.json"))
    config = json.loads(found.read_text(encoding="utf-8"))
    for key in ("hidden_size", "intermediate_size"):
        assert config[key] == QWEN_CONFIGS[name][key]


@pytest.mark.skipif(not CONFIGS.exists(), reason="no released configs here")
def test_the_first_qwens_width():
    found = json.loads((CONFIGS / "Qwen-1_8B.qwen_config_dict.json").read_text(encoding="utf-8"))
    assert (found["hidden_size"], found["intermediate_size"]) == (2048, 2 * 5504)
