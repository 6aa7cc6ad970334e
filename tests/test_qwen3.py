"""Qwen3: the released sizes, the bound on the scores, and what scales with the weights.
tests/test_family.py compares random configs with the reference.

The official files are not part of this project. They are looked for in ../shared/qwen beside the
repository, or in the folder that QWEN_NB_DATA names."""

import inspect
import json
import os
from pathlib import Path

import pytest
import torch

import qwen_nb.qwen3 as q3
from qwen_nb.attention import attend_explicit, causal_mask, record_attention
from qwen_nb.inspect import load_reference
from qwen_nb.loading import family_config
from qwen_nb.memory import QWEN_CONFIGS, count_parameters
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.qwen3 import largest_scores, score_bound

FACTS = (
    Path(
        os.environ.get("QWEN_NB_DATA")
        or Path(__file__).resolve().parent.parent.parent / "shared" / "qwen"
    )
    / "configs"
)
RELEASED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}
SMALL = dict(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e4,
)


def built(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen(config).parameters())


def small(seed=0, std=0.2, **changes):
    torch.manual_seed(seed)
    model = Qwen(QwenConfig(**SMALL | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1 if p.dim() == 1 else 0, std)
    return model


@pytest.mark.skipif(not FACTS.is_dir(), reason=f"the official configs are not in {FACTS}")
@pytest.mark.parametrize("name", RELEASED)
def test_official_config(name):
    raw = json.loads((FACTS / f"{name}.config.json").read_text())
    config = family_config(raw)
    assert built(config) == RELEASED[name]
    assert (
        config.head_dim,
        config.num_key_value_heads,
        config.qk_norm,
        config.qkv_bias,
        config.o_bias,
    ) == (128, 8, True, False, False)
    assert {k: raw[k] for k in QWEN_CONFIGS[name]} == QWEN_CONFIGS[
        name
    ]  # the facts that are typed in the notebooks


@pytest.mark.parametrize("name", RELEASED)
def test_typed_config(name):
    assert (
        built(family_config(QWEN_CONFIGS[name]))
        == RELEASED[name]
        == sum(count_parameters(QWEN_CONFIGS[name]).values())
    )


def test_largest_scores_are_the_references():
    pytest.importorskip("transformers")
    reference, _ = load_reference()
    model, ids = Qwen.from_pretrained(dtype="float32"), torch.arange(60).view(2, 30) + 100
    for ours, t in zip(largest_scores(model, ids), record_attention(reference, ids)):
        k = t["k"].repeat_interleave(t["q"].shape[1] // t["k"].shape[1], 1)
        assert ours == pytest.approx(
            (t["q"] @ k.mT * model.config.head_dim**-0.5).tril().abs().max().item(), rel=1e-4
        )


def test_defaults():
    for name in q3.__all__:
        parameters = inspect.signature(getattr(q3, name)).parameters.values()
        assert all(p.default is p.empty for p in parameters), name
    parameters = inspect.signature(QwenConfig).parameters.values()
    assert {p.name: p.default for p in parameters} == dict(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_theta=1e6,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        qk_norm=True,
    )


def test_scores_ahead_of_a_query_do_not_count():
    "A key that nobody may see yet can be as large as it likes."
    model = small(qk_norm=False)
    attn = model.model.layers[0].self_attn
    ids = torch.arange(8)[None]
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    q, k, v = attn.qkv(x, *model.config.rotary()(torch.arange(8)[None]))
    want = 0.0
    for head in range(6):
        for i in range(8):
            scores = q[0, head, i] @ k[0, head // 3, : i + 1].mT
            want = max(want, scores.abs().max().item() / 16**0.5)
    assert largest_scores(model, ids)[0] == pytest.approx(want, rel=1e-4)


def test_largest_scores_leave_no_hooks():
    model = small()
    with pytest.raises(ValueError):
        largest_scores(model, torch.tensor([[1000]]))
    assert not any(layer.self_attn._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("seed", range(5))
def test_bound_holds_and_is_reached(seed):
    model, ids = small(seed, std=0.5 + seed), torch.arange(30)[None]
    bounds = [score_bound(layer.self_attn) for layer in model.model.layers]
    assert all(s <= b for s, b in zip(largest_scores(model, ids), bounds))
    attn = model.model.layers[
        0
    ].self_attn  # a query and a key in the channel of the largest weight: the bound itself
    for norm in (attn.q_norm, attn.k_norm):
        norm.weight.data[3] = 2 * norm.weight.abs().max().item()
    one = torch.eye(16)[3].view(1, 1, 16) * 1e4
    q, k = attn.q_norm(one), attn.k_norm(one)
    assert (q * k).sum().item() / 16**0.5 == pytest.approx(score_bound(attn), rel=1e-4)
    assert score_bound(small(qk_norm=False).model.layers[0].self_attn) == float("inf")


@torch.no_grad()
def test_only_without_the_norm_do_scores_grow_with_the_weights():
    for qk_norm in (True, False):
        model, ids = small(qk_norm=qk_norm), torch.arange(30)[None]
        before = largest_scores(model, ids)[0]
        model.model.layers[0].self_attn.q_proj.weight *= 10
        assert largest_scores(model, ids)[0] == pytest.approx(
            before * (1 if qk_norm else 10), rel=1e-3
        )


def test_heads_wider_than_the_model():
    model = small()
    attn, x = model.model.layers[0].self_attn, torch.randn(1, 9, 40)
    assert attn.q_proj.weight.shape == (96, 40) and attn.o_proj.weight.shape == (40, 96)
    cos_sin = model.config.rotary()(torch.arange(9)[None])
    q, k, v = attn.qkv(x, *cos_sin)
    mix, _ = attend_explicit(q, k, v, causal_mask(9, 9))
    torch.testing.assert_close(attn(x, *cos_sin), attn.o_proj(mix.transpose(1, 2).flatten(-2)))
