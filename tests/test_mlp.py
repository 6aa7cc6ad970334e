"""SwiGLU against the reference's MLPs, on pretrained and on random weights; the mistakes it must tell apart."""

import pytest
import torch
from torch.nn import functional as F

from qwen_nb.inspect import load_reference
from qwen_nb.mlp import SwiGLU
from qwen_nb.verify import record, rounding_steps

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
