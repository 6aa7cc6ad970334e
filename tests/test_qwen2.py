"""Qwen1.5, 2 and 2.5: the released tensors, the reference with YaRN and with sliding windows, and
what is refused. tests/test_family.py has random configs.

The official files are not part of this project. They are looked for in ../shared/qwen beside the
repository, or in the folder that QWEN_NB_DATA names."""

import inspect
import json
import os
from pathlib import Path

import pytest
import torch

import qwen_nb.windows as q2
from qwen_nb.attention import causal_mask
from qwen_nb.cache import KVCache
from qwen_nb.generation import generate
from qwen_nb.gqa import Attention
from qwen_nb.loading import family_config
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.windows import WindowAttention, WindowConfig, layer_windows, window_mask
from qwen_nb.writing import pad_left

FACTS = (
    Path(
        os.environ.get("QWEN_NB_DATA")
        or Path(__file__).resolve().parent.parent.parent / "shared" / "qwen"
    )
    / "configs"
)
official = pytest.mark.skipif(not FACTS.is_dir(), reason=f"the official configs are not in {FACTS}")
COUNTS = {
    "Qwen2-0.5B": 494_032_768,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
}
SMALL = dict(
    model_type="qwen2",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=128,
    rope_theta=1e4,
)


def on_meta(raw):
    with torch.device("meta"):
        return Qwen(family_config(raw))


def small(seed=0, **changes):
    torch.manual_seed(seed)
    model = Qwen(family_config(SMALL | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1 if p.dim() == 1 else 0, 0.2)
    return model


# ---- released models


@official
def test_every_tensor_of_the_half_billion():
    lines = [
        line.split(" ", 1) for line in (FACTS / "Qwen2.5-0.5B.tensors.txt").read_text().splitlines()
    ]
    theirs = {name: tuple(json.loads(rest[: rest.index("]") + 1])) for name, rest in lines}
    model = on_meta(json.loads((FACTS / "Qwen2.5-0.5B-Instruct.config.json").read_text()))
    assert (
        len(theirs) == 290
        and {name: tuple(t.shape) for name, t in model.state_dict().items()} == theirs
    )


@official
@pytest.mark.parametrize("name", COUNTS)
def test_official_config(name):
    raw = json.loads((FACTS / f"{name}-Instruct.config.json").read_text())
    config, model = family_config(raw), on_meta(raw)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name] and type(config) is QwenConfig
    assert (config.rope_theta, config.qkv_bias, config.o_bias, config.qk_norm) == (
        1e6,
        True,
        False,
        False,
    )
    assert (
        config.head_dim * config.num_attention_heads == config.hidden_size
        and config.tie_word_embeddings == (name != "Qwen2.5-7B")
    )
    on = family_config(
        raw | dict(use_sliding_window=True)
    )  # what it would be if somebody turned it on
    full = min(raw["max_window_layers"], config.num_hidden_layers)
    assert on.windows == [None] * full + [raw["sliding_window"]] * (config.num_hidden_layers - full)


@official
def test_yarn_as_the_model_cards_write_it():
    raw = json.loads((FACTS / "Qwen2.5-7B-Instruct.config.json").read_text())
    card = dict(type="yarn", factor=4.0, original_max_position_embeddings=32_768)
    ours = family_config(raw | dict(rope_scaling=card)).rotary()
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    theirs = Qwen2RotaryEmbedding(transformers.Qwen2Config(**raw | dict(rope_scaling=card)))
    far = torch.arange(0, 131_072, 4001)[None]
    torch.testing.assert_close(ours(far), theirs(torch.zeros(1), far), rtol=0, atol=1e-6)
    assert not torch.allclose(ours(far)[0], family_config(raw).rotary()(far)[0], atol=0.1)


# What the lesson's table says of windows: layers, max_window_layers, windowed layers if turned on.
# (Of Qwen2.5-0.5B, whose base and Instruct differ, only the Instruct's file is there to be read.)
WINDOWED = {
    "Qwen2.5-0.5B": (24, 21, 3),
    "Qwen2.5-1.5B": (28, 21, 7),
    "Qwen2.5-3B": (36, 70, 0),
    "Qwen2.5-7B": (28, 28, 0),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_the_table_of_windows(name):
    layers, first, windowed = WINDOWED[name]
    raw = dict(use_sliding_window=True, max_window_layers=first)
    if FACTS.is_dir():
        raw = json.loads((FACTS / f"{name}-Instruct.config.json").read_text())
        assert (raw["num_hidden_layers"], raw["max_window_layers"]) == (layers, first)
    found = layer_windows(raw | dict(use_sliding_window=True), layers)
    assert sum(window is not None for window in found) == windowed
    lesson = (Path(__file__).resolve().parent.parent / "nbs/12_window.ipynb").read_text("utf-8")
    assert f"| {name}-Instruct | {layers} | {first} | {windowed or 'none'} |" in lesson


# ---- biases, padding, signatures


@pytest.mark.parametrize("family, has_bias", [("qwen2", True), ("qwen3", False)])
def test_biases_of_a_family(family, has_bias):
    "The config does not say it: the family's name does, with and without windows."
    for window in ({}, dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)):
        names = dict(small(model_type=family, **window).named_parameters())
        biases = {name.split(".")[-2] for name in names if name.endswith("bias")}
        assert biases == ({"q_proj", "k_proj", "v_proj"} if has_bias else set())


@pytest.mark.parametrize("left_out", ["q", "k", "v"])
def test_each_bias_counts(left_out):
    model, ids = small(), torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids)
        for layer in model.model.layers:
            getattr(layer.self_attn, f"{left_out}_proj").bias.zero_()
        assert (model(ids) - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("theta", [100.0, 1e6])
def test_padding_and_base_as_the_reference(theta):
    transformers = pytest.importorskip("transformers")
    rope = dict(rope_parameters=dict(rope_type="default", rope_theta=theta))
    model = small(**rope)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL | rope)).eval()
    state = model.state_dict()
    theirs.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    texts = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 11)]
    ids, mask = pad_left(texts)
    real = mask.bool()
    with torch.no_grad():
        ours, want = model(ids, mask), theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[real], want[real], rtol=1e-4, atol=1e-4)


def test_defaults():
    def defaults(f):
        parameters = inspect.signature(f).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    public = [getattr(q2, name) for name in q2.__all__]
    assert {f.__name__: defaults(f) for f in public if callable(f)} == dict(
        check_windows={},
        layer_windows={},
        window_mask=dict(device=None),
        WindowAttention={},
        WindowConfig=defaults(QwenConfig) | dict(windows=None),
    )
    assert defaults(WindowAttention.forward) == dict(mask=None, cache=None)


# ---- windows


@pytest.mark.parametrize(
    "q_len, k_len, window", [(5, 5, 2), (6, 6, 1), (4, 4, 9), (1, 6, 3), (2, 7, 3)]
)
def test_mask_in_words(q_len, k_len, window):
    at = k_len - q_len
    assert window_mask(q_len, k_len, window)[0, 0].tolist() == [
        [at + i - window < j <= at + i for j in range(k_len)] for i in range(q_len)
    ]


@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize("cached", [0, 1, 9])
def test_attention_equals_full_attention_under_the_mask(window, cached):
    "Keys out of sight are cut off early; the result is that of all keys under a mask, padded too."
    torch.manual_seed(0)
    args = 24, 4, 2, 8
    near, full = WindowAttention(window, *args), Attention(*args)
    full.load_state_dict(near.state_dict())
    n, pad = 12, 3
    x, (cos, sin) = torch.randn(2, n, 24), family_config(SMALL).rotary()(torch.arange(n)[None])
    real = torch.ones(2, n)
    real[1, :pad] = 0
    whole = causal_mask(n, n, real)
    want = full(x, cos, sin, whole & window_mask(n, n, window))
    cache = KVCache(
        QwenConfig(**dict(num_hidden_layers=1, num_key_value_heads=2, head_dim=8)), 2, n
    )
    steps = [slice(0, cached), slice(cached, n)] if cached else [slice(0, n)]
    got = torch.cat(
        [near(x[:, s], cos[:, s], sin[:, s], whole[:, :, s, : s.stop], cache) for s in steps], 1
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1, pad:], want[1, pad:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 16])
def test_cache_and_padding(window):
    "Cache, no cache, pieces and left padding: the same text."
    model = small(use_sliding_window=True, sliding_window=window, max_window_layers=1)
    texts = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 11)]
    ids, mask = pad_left(texts)
    together = generate(model, ids, 12, mask, temperature=0.0, stop_ids=())
    for kw in (dict(use_cache=False), dict(prefill_chunk=7)):
        assert torch.equal(
            generate(model, ids, 12, mask, temperature=0.0, stop_ids=(), **kw), together
        )
    for row, text in zip(together, texts):
        assert torch.equal(
            generate(model, text[None], 12, temperature=0.0, stop_ids=())[0, len(text) :], row[30:]
        )


def test_a_wide_window_is_none():
    wide, plain = small(use_sliding_window=True, sliding_window=64, max_window_layers=0), small()
    assert all(isinstance(layer.self_attn, WindowAttention) for layer in wide.model.layers)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(wide(ids), plain(ids))
        narrow = small(use_sliding_window=True, sliding_window=63 - 4, max_window_layers=0)(ids)
    assert torch.allclose(narrow[:, :59], plain(ids)[:, :59], atol=1e-4) and not torch.allclose(
        narrow[:, 59], plain(ids)[:, 59], atol=1e-4
    )


def test_windows_train():
    model = small(use_sliding_window=True, sliding_window=3, max_window_layers=2).train()
    model(torch.arange(20)[None]).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = small(use_sliding_window=True, sliding_window=3, max_window_layers=2).bfloat16()
    with torch.no_grad():
        assert half(torch.arange(20)[None]).isfinite().all()


def test_settings_as_transformers_reads_them():
    transformers = pytest.importorskip("transformers")
    for on in (True, False):
        for first in (0, 2, 9):
            for width in (None, 5):
                raw = dict(
                    use_sliding_window=on,
                    max_window_layers=first,
                    sliding_window=width,
                    num_hidden_layers=4,
                )
                theirs = transformers.Qwen3Config(**raw)
                assert layer_windows(raw, 4) == [
                    theirs.sliding_window if kind == "sliding_attention" else None
                    for kind in theirs.layer_types
                ]
    assert (
        layer_windows(dict(use_sliding_window=True), 30) == [None] * 28 + [4096] * 2
    )  # the defaults


def test_qwen3_can_have_windows_too():
    config = family_config(
        SMALL
        | dict(
            model_type="qwen3",
            head_dim=8,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=3,
        )
    )
    assert type(config) is WindowConfig and config.windows == [None] * 3 + [4] and config.qk_norm
    assert (
        type(
            family_config(
                SMALL
                | dict(
                    use_sliding_window=False, sliding_window=4, layer_types=["full_attention"] * 4
                )
            )
        )
        is QwenConfig
    )


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(use_sliding_window="yes"), "use_sliding_window is 'yes'"),
        (dict(use_sliding_window=1), "use_sliding_window is 1"),
        (dict(sliding_window=0), "sliding_window is 0"),
        (dict(sliding_window=-3), "sliding_window is -3"),
        (dict(sliding_window=2.5), "sliding_window is 2.5"),
        (dict(sliding_window=True), "sliding_window is True"),
        (dict(max_window_layers=-1), "max_window_layers"),
        (dict(max_window_layers="all"), "max_window_layers"),
        (dict(layer_types=["sliding_attention"]), "layer_types"),
        (dict(layer_types="sliding"), "layer_types"),
        (dict(layer_types=7), "layer_types"),
        (dict(layer_types=["full_attention", "linear_attention"] * 2), "layer_types"),
        (dict(layer_types=[["full_attention"]] * 4), "layer_types"),
        (
            dict(use_sliding_window=False, layer_types=["sliding_attention"] * 4),
            "no window|give no",
        ),
        (dict(sliding_window=None, layer_types=["sliding_attention"] * 4), "no window|give no"),
        (dict(num_hidden_layers="4"), "num_hidden_layers"),
        (dict(hidden_act="gelu"), "hidden_act"),
    ],
)
def test_refused(changes, match):
    with pytest.raises(ValueError, match=match) as e:
        family_config(SMALL | dict(use_sliding_window=True, sliding_window=8) | changes)
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 300
