"RoPE against transformers over random settings, and the things a notebook is too short for."

import copy
import json
import pickle
import random
import re
from pathlib import Path

import pytest
import torch

from qwen_nb.rope import (
    Rotary,
    apply_rope,
    cos_sin,
    inverse_frequencies,
    read_scaling,
    rotate_half,
    yarn_frequencies,
)

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "05_rope.ipynb"


def reference(head_dim, theta, scaling, max_position_embeddings=32_768):
    "The reference's rotary module for these numbers."
    pytest.importorskip("transformers")
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        num_hidden_layers=1,
        max_position_embeddings=max_position_embeddings,
    )
    config.rope_parameters = {"rope_theta": theta, **scaling}
    config.standardize_rope_params()
    return Qwen3RotaryEmbedding(config)


def random_numbers(rng):
    return dict(
        head_dim=2 * rng.choice([1, 2, 4, 16, 32, 40, 64, 128]),
        theta=rng.choice([100.0, 1e4, 500_000, 1_000_000, 1e7, rng.uniform(50, 1e6)]),
    )


def random_yarn(rng):
    "A YaRN scaling with any of its optional settings, in either spelling."
    scaling = {
        rng.choice(["type", "rope_type"]): "yarn",
        "factor": rng.choice([1, 1.0, 2, 4.0, 40, rng.uniform(1, 64)]),
        "original_max_position_embeddings": rng.choice(
            [256, 4096, 32_768, 131_072, rng.randint(64, 10**6)]
        ),
    }
    optional = dict(
        beta_fast=rng.choice([32, 24.5, 64]),
        beta_slow=rng.choice([1, 0.5, 2.0]),
        truncate=rng.random() < 0.5,
        attention_factor=rng.choice([None, rng.uniform(0.5, 2)]),
        mscale=rng.choice([None, 0, 0.707, 1.0]),
        mscale_all_dim=rng.choice([None, 0.0, 1.0, 0.8]),
    )
    return scaling | {k: v for k, v in optional.items() if rng.random() < 0.5}


def far_positions(rng, n=64):
    return torch.tensor([[rng.randrange(131_072) for _ in range(n)] for _ in range(2)])


@pytest.mark.parametrize("seed", range(100))
def test_yarn_equals_the_reference(seed):
    rng = random.Random(seed)
    numbers, scaling = random_numbers(rng), random_yarn(rng)
    theirs = reference(**numbers, scaling=dict(scaling))
    ours = Rotary(**numbers, scaling=scaling)
    assert torch.equal(ours.inv_freq, theirs.inv_freq), (numbers, scaling)
    assert ours.attention_factor == theirs.attention_scaling, (numbers, scaling)
    positions = far_positions(rng)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for a, b in zip(ours(positions, dtype), theirs(torch.zeros(1, dtype=dtype), positions)):
            assert a.dtype == dtype and torch.equal(a, b), (numbers, scaling, dtype)


@pytest.mark.parametrize("seed", range(30))
def test_linear_and_default_equal_the_reference(seed):
    rng = random.Random(seed)
    numbers, positions = random_numbers(rng), far_positions(rng)
    for scaling in (
        {},
        {"rope_type": "default"},
        {"type": "default", "rope_theta": numbers["theta"]},
        {"type": "linear", "factor": rng.uniform(1, 9)},
    ):
        theirs, ours = (
            reference(**numbers, scaling=dict(scaling)),
            Rotary(**numbers, scaling=scaling),
        )
        assert torch.equal(
            torch.stack(ours(positions)), torch.stack(theirs(torch.zeros(1), positions))
        ), (numbers, scaling)


def test_yarn_notices_each_of_its_settings():
    "Each setting changes the result, so the equality above is not empty."
    base = dict(head_dim=64, theta=1e6, factor=4.0, original_max_position_embeddings=32_768)

    def result(**kw):
        inv_freq, factor = yarn_frequencies(**(base | kw))
        return [*inv_freq.tolist(), factor]

    for kw in (
        dict(factor=5.0),
        dict(original_max_position_embeddings=4096),
        dict(beta_fast=16),
        dict(beta_slow=4),
        dict(truncate=False),
        dict(attention_factor=1.0),
        dict(mscale=0.7, mscale_all_dim=1.0),
        dict(theta=1e4),
    ):
        assert result(**kw) != result(), kw


def test_yarn_takes_its_original_context_from_the_config_if_it_must():
    "As transformers does."
    scaling = {"rope_type": "yarn", "factor": 4.0}
    theirs = reference(64, 1e6, dict(scaling), max_position_embeddings=4096)
    assert torch.equal(
        Rotary(64, 1e6, scaling, max_position_embeddings=4096).inv_freq, theirs.inv_freq
    )
    assert not torch.equal(
        Rotary(64, 1e6, scaling, max_position_embeddings=8192).inv_freq, theirs.inv_freq
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
BAD = [
    ({"rope_type": kind}, kind)
    for kind in ("longrope", "llama3", "dynamic", "mrope", "su", "proportional", "YARN", "")
] + [
    ({"factor": 4.0}, "None"),
    ({"rope_type": ["yarn"]}, "yarn"),
    ({"type": 3}, "3"),
    ("yarn", "yarn"),
    ([YARN], "expected a dict"),
    ({"rope_type": "linear"}, "lacks factor"),
    ({"rope_type": "yarn", "factor": 4.0}, "lacks original_max_position_embeddings"),
    ({"type": "yarn", "original_max_position_embeddings": 4096}, "lacks factor"),
    (YARN | {"factor": None}, "lacks factor"),
    (YARN | {"factor": 0.5}, "at least 1"),
    (YARN | {"factor": "4"}, "'4'"),
    (YARN | {"factor": True}, "True"),
    (YARN | {"factor": float("nan")}, "nan"),
    (YARN | {"factor": float("inf")}, "inf"),
    (YARN | {"original_max_position_embeddings": 0}, "above 0"),
    (YARN | {"beta_fast": 0}, "beta_fast"),
    (YARN | {"beta_fast": 1, "beta_slow": 32}, "below beta_slow"),
    (YARN | {"attention_factor": -1.0}, "attention_factor"),
    (YARN | {"truncate": "no"}, "truncate"),
    (YARN | {"mscale": [1]}, "mscale"),
    (YARN | {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (YARN | {"rope_theta": 1e6}, "rope_theta"),
]


@pytest.mark.parametrize("scaling, says", BAD)
def test_what_is_not_supported_is_refused_in_one_sentence(scaling, says):
    with pytest.raises(ValueError) as e:
        Rotary(64, 1e4, scaling)
    assert says in str(e.value) and "\n" not in str(e.value)
    if "has type" in str(e.value):
        assert "default, linear, yarn" in str(e.value)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {},
        {"rope_type": "default"},
        {"rope_theta": 1e4},
        {"type": "default", "rope_theta": 10_000},
    ],
)
def test_nothing_to_scale(scaling):
    assert read_scaling(scaling, 1e4) == ("default", {})
    assert torch.equal(Rotary(64, 1e4, scaling).inv_freq, inverse_frequencies(64, 1e4))


def test_the_callers_dict_is_left_alone():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    Rotary(64, 1e4, scaling, max_position_embeddings=4096)
    assert scaling == {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("head_dim", [0, 1, 33, -2])
def test_odd_heads_are_refused(head_dim):
    with pytest.raises(ValueError, match=str(head_dim)):
        Rotary(head_dim)


@pytest.mark.parametrize("theta", [0, 1, -1e4, float("nan"), float("inf")])
def test_a_senseless_base_is_refused(theta):
    with pytest.raises(ValueError, match="rope_theta"):
        Rotary(64, theta)


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(8),
        torch.arange(8.0)[None],
        torch.arange(8)[None].bfloat16(),
        torch.zeros(3, 1, 8, dtype=torch.int64),
        torch.ones(1, 8, dtype=torch.bool),
    ],
)
def test_positions_of_another_shape_or_dtype_are_refused(positions):
    with pytest.raises(ValueError, match="position_ids"):
        Rotary(64)(positions)


def test_frequencies_are_real_float32_numbers_wherever_they_are_made():
    "A model is planned on the meta device, under bfloat16, or in inference mode: the frequencies must not follow."
    want = Rotary(64, 1e6, YARN).inv_freq
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            rotary = Rotary(64, 1e6, YARN)
    finally:
        torch.set_default_dtype(before)
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, want)


def test_casting_a_model_leaves_its_rotary_alone():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.rotary = torch.nn.Parameter(torch.zeros(1)), Rotary(64, 1e6)

    model = Model().to(torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16 and model.rotary.inv_freq.dtype == torch.float32
    assert list(model.state_dict()) == ["weight"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(Rotary(64, 1e6)))):
        assert torch.equal(getattr(twin, "rotary", twin).inv_freq, model.rotary.inv_freq)


def test_tables_follow_the_positions():
    cos, sin = Rotary(64)(torch.arange(5)[None].to("meta"), torch.bfloat16)
    assert (
        cos.device.type == sin.device.type == "meta"
        and cos.shape == (1, 5, 64)
        and cos.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0, 1, 4095, 131_000])
def test_offsets_gaps_and_batches(dtype, offset):
    "The positions count, not the column: a token's turn does not depend on who stands beside it."
    torch.manual_seed(0)
    x, rotary = torch.randn(2, 3, 6, 64, dtype=dtype), Rotary(64, 1e6)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [9, 2, 50, 51, 7, 7]]) + offset
    whole = apply_rope(x, *rotary(positions, dtype))
    assert whole.dtype == dtype and whole.shape == x.shape
    for b in range(2):
        for s in range(6):
            alone = apply_rope(
                x[b : b + 1, :, s : s + 1], *rotary(positions[b : b + 1, s : s + 1], dtype)
            )
            torch.testing.assert_close(
                alone[0, :, 0],
                whole[b, :, s],
                rtol=0,
                atol=4 * torch.finfo(dtype).eps * x.abs().max().item(),
            )


def test_one_row_of_positions_serves_a_batch():
    x, tables = torch.randn(4, 2, 5, 8), Rotary(8)(torch.arange(5)[None])
    assert torch.equal(
        apply_rope(x, *tables), torch.cat([apply_rope(row[None], *tables) for row in x])
    )


def test_lengths_stay_and_position_zero_does_nothing():
    x = torch.randn(1, 2, 7, 32)
    turned = apply_rope(x, *Rotary(32)(torch.arange(7)[None]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0]) and not torch.equal(turned[:, :, 1], x[:, :, 1])
    assert torch.equal(rotate_half(rotate_half(x)), -x)


def test_gradients_flow():
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = cos_sin(torch.arange(3)[None], inverse_frequencies(8), torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), x)


def test_the_notebooks_folded_solutions_are_the_ones_it_runs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = {
        kind: "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == kind)
        for kind in ("markdown", "code")
    }
    folded = re.findall(
        r"<summary>Solution</summary>\s*```python\n(.*?)\n```", text["markdown"], re.S
    )
    assert len(folded) == 2 and all(solution in text["code"] for solution in folded)
