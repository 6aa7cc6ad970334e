"""The family picture: sizes, traits, cache and cost of every family against what transformers
builds, what generation allocates and what PyTorch counts.

The official files are not part of this project. They are looked for in ../shared/qwen beside the
repository, or in the folder that QWEN_NB_DATA names."""

import json
import os
import random
from dataclasses import replace
from itertools import chain
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen_nb.cache import KVCache
from qwen_nb.cost import cost_parts, label_ends, plot_family
from qwen_nb.family import FAMILY, changes, count, family_table, relative, traits
from qwen_nb.hybrid import cache_parts
from qwen_nb.loading import family_config
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.qwen1 import Qwen1Config
from qwen_nb.qwen3_5 import HybridConfig
from qwen_nb.windows import WindowConfig
from qwen_nb.writing import Context

FACTS = (
    Path(
        os.environ.get("QWEN_NB_DATA")
        or Path(__file__).resolve().parent.parent.parent / "shared" / "qwen"
    )
    / "configs"
)
OFFICIAL = {
    "Qwen-1.8B": "Qwen-1_8B.qwen_config_dict",
    "Qwen2.5-0.5B": "Qwen2.5-0.5B-Instruct.config",
    "Qwen2.5-1.5B": "Qwen2.5-1.5B-Instruct.config",
    "Qwen2.5-7B": "Qwen2.5-7B-Instruct.config",
    "Qwen3-0.6B": "Qwen3-0.6B.config",
    "Qwen3-8B": "Qwen3-8B.config",
    "Qwen3.6-35B-A3B": "Qwen3.6-35B-A3B.config",
    "Qwen3.8-27B": "Qwen3.8-27B.config",
}
RELEASED = {
    "Qwen-1.8B": 1_836_828_672,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3.5-0.8B": 752_393_024,
    "Qwen3.6-35B-A3B": 34_660_610_688,
    "Qwen3.8-27B": 26_895_998_464,
}


def facts(config):
    return traits(config), count(config), cache_parts(config), cost_parts(config)


def random_config(family, seed):
    "One of ours without sliding windows, and the reference's, drawn as in test_family.py."
    pytest.importorskip("transformers")
    from test_family import FAMILIES

    theirs = FAMILIES[family](random.Random(f"{family} {seed}"))
    raw = theirs.to_dict() | dict(use_sliding_window=False)
    if "sliding_attention" in (raw.get("layer_types") or []):
        raw.pop("layer_types")
    return family_config(raw), theirs


@pytest.mark.skipif(not FACTS.is_dir(), reason=f"the official configs are not in {FACTS}")
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_config(name):
    assert facts(
        family_config(json.loads((FACTS / f"{OFFICIAL[name]}.json").read_text()))
    ) == facts(FAMILY[name].config)


def test_released_sizes():
    assert {name: count(FAMILY[name].config)[0] for name in RELEASED} == RELEASED
    assert [
        cache_parts(FAMILY[name].config) for name in ("Qwen-1.8B", "Qwen2.5-0.5B", "Qwen3-0.6B")
    ] == [(192 * 1024, 0), (12 * 1024, 0), (112 * 1024, 0)]
    for name, r in FAMILY.items():
        total, active = count(r.config)
        assert (active < total) == ("-A" in name) == (traits(r.config)["experts"] != "none")


SEEDED = [
    (family, seed)
    for family in (
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5MoeForCausalLM",
    )
    for seed in range(3)
]


@pytest.mark.parametrize("family, seed", SEEDED)
def test_size_and_traits_are_the_references(family, seed):
    transformers = pytest.importorskip("transformers")
    config, theirs = random_config(family, seed)
    with torch.device("meta"):
        reference = getattr(transformers, family)(theirs)
    assert count(config)[0] == sum(p.numel() for p in reference.parameters())
    names, found = "\n".join(n for n, _ in reference.named_parameters()), traits(config)
    assert found["norm of each q and k"] == ("q_norm" in names) and found[
        "head is the embedding"
    ] == ("lm_head" not in names)
    if "q_proj" in names:
        assert found["bias of q, k, v"] == ("q_proj.bias" in names)
    assert (found["experts"] != "none") == ("experts" in names) and (
        "shared" in found["experts"]
    ) == ("shared_expert." in names)
    assert (
        found["share of layers with attention"]
        == sum("q_proj.weight" in n for n in names.splitlines()) / theirs.num_hidden_layers
    )


@pytest.mark.parametrize("family, seed", SEEDED)
def test_cache_and_cost_are_what_is_allocated_and_counted(family, seed):
    config, _ = random_config(family, seed)
    torch.manual_seed(seed)
    model, (look, matrices, states), (token, once) = (
        Qwen(config).eval(),
        cost_parts(config),
        cache_parts(config, bytes_per_number=4),
    )
    for n in (1, 9, 40):
        context, ids = Context(model, 1, n), torch.zeros(1, n, dtype=torch.long)
        assert (
            sum(
                t.nbytes
                for t in (
                    chain(*context.cache.layers)
                    if hasattr(context.cache, "layers")
                    else [context.cache.kv]
                )
            )
            == token * n + once
        )
        if n > 1:
            context.read(ids[:, 1:])
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            context.read(ids[:, :1])
        found = counter.get_flop_counts()["Global"]
        conv = found.pop(torch.ops.aten.convolution, 0)
        assert sum(found.values()) == look * n + matrices
        assert found.get(torch.ops.aten.bmm, 0) == look * n
        linear = getattr(config, "layer_types", None) and config.layer_types.count(
            "linear_attention"
        )
        if linear:
            assert (
                states
                == conv // (2 * config.linear_conv_kernel_dim - 1)
                + 7
                * linear
                * config.linear_num_value_heads
                * config.linear_key_head_dim
                * config.linear_value_head_dim
            )
        else:
            assert states == conv == 0


@pytest.mark.parametrize("name", ["Qwen-1.8B", "Qwen2.5-0.5B", "Qwen3-8B"])
def test_cost_of_released_models(name):
    "At full size, on the meta device, where the products are counted and not computed."
    config, n = FAMILY[name].config, 5000
    with torch.device("meta"):
        model = Qwen(config)
    cache = getattr(config, "cache", KVCache)(config, 1, n, torch.float32, "meta")
    cache.length = n - 1
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.head(
            model.model(
                torch.zeros(1, 1, dtype=torch.long, device="meta"),
                torch.full((1, 1), n - 1, device="meta"),
                None,
                cache,
            )
        )
    look, matrices, states = cost_parts(config)
    assert counter.get_total_flops() == look * n + matrices and states == 0


def test_changes():
    assert changes("Qwen2.5-0.5B", "Qwen3-0.6B") == {
        "bias of q, k, v": (True, False),
        "norm of each q and k": (False, True),
        "heads × head_dim / hidden_size": (1, 2),
    }
    assert changes("Qwen2.5-0.5B", "Qwen2.5-1.5B") == {} == changes(HybridConfig(), "Qwen3.5-0.8B")
    assert changes("Qwen-1.8B", Qwen1Config(use_dynamic_ntk=False, use_logn_attn=False)).keys() == {
        "past the training length"
    }
    for a in FAMILY:
        for b in FAMILY:
            assert changes(a, b) == {trait: (y, x) for trait, (x, y) in changes(b, a).items()}
    assert changes(
        QwenConfig(),
        QwenConfig(
            rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768)
        ),
    ) == {"past the training length": ("nothing", "yarn")}


def test_each_half_of_qwen1s_tricks_is_named():
    assert [
        traits(Qwen1Config(use_dynamic_ntk=ntk, use_logn_attn=logn))["past the training length"]
        for ntk in (True, False)
        for logn in (True, False)
    ] == ["dynamic NTK, log-n", "dynamic NTK", "log-n", "nothing"]


def test_what_is_refused():
    with pytest.raises(ValueError, match="'Qwen3-0.7B' is not in FAMILY"):
        changes("Qwen3-0.7B", "Qwen3-0.6B")
    windowed = WindowConfig(windows=[None] * 27 + [4096])
    for f in (count, cost_parts):
        with pytest.raises(ValueError, match="sliding window"):
            f(windowed)


def test_table():
    rows = family_table().splitlines()
    assert len(rows) == 2 + len(FAMILY) and all(row.count("|") == 6 for row in rows)
    for row, (name, r) in zip(rows[2:], FAMILY.items()):
        assert (
            row.startswith(f"| {name} ([{r.year}]({r.source})) | ")
            and (r.after or "the first") in row
        )
    mine = replace(FAMILY["Qwen3.5-0.8B"].config, rope_theta=500.0)
    (row,) = family_table({"mine": mine}).splitlines()[2:]
    assert (
        relative(mine) == "Qwen3.5-0.8B"
        and row
        == "| mine | against Qwen3.5-0.8B: RoPE base: 10,000,000 → 500 "
        "| 0.752 B | 0.752 B | 12 KiB and 19 MiB once |"
    )


def test_every_generation_changes_something():
    for name, r in FAMILY.items():
        if r.after:
            assert [*FAMILY].index(r.after) < [*FAMILY].index(name)
        if r.after and r.generation != FAMILY[r.after].generation:
            assert changes(r.after, name)


def test_labels_do_not_overlap_and_keep_their_order():
    fig, ax = plt.subplots()
    ax.set(xlim=(1, 10), ylim=(0, 1))
    names = [*FAMILY][:10]
    label_ends(
        ax, {name: y for name, y in zip(names, [0.5] * 5 + [0.51, 0.9, 0.97, 0.98, 0.99])}, gap=0.06
    )
    at = [t.get_position()[1] for t in ax.texts]
    assert (
        [t.get_text() for t in ax.texts] == names
        and at[-1] <= 1 + 1e-9
        and all(b - a >= 0.06 - 1e-9 for a, b in zip(at, at[1:]))
    )
    plt.close(fig)


def test_figure(monkeypatch):
    "Every model has a line and its name in each panel, one of the learner's own too."
    monkeypatch.setattr(plt, "show", lambda: None)
    models = {"Qwen3-0.6B": None, "Qwen3.5-0.8B": None, "mine": QwenConfig(num_hidden_layers=2)}
    plot_family(models)
    top, middle, low = plt.gcf().axes
    assert [t.get_text() for t in top.get_yticklabels()] == [*models]
    for ax in (middle, low):
        assert {t.get_text() for t in ax.texts} == models.keys()
    token, once = cache_parts(FAMILY["Qwen3.5-0.8B"].config)
    assert any(
        abs(line.get_ydata()[-1] - (token * 262_144 + once) / 2**30) < 1e-9 for line in middle.lines
    )
    plt.close("all")
