"""Sizes: the table against the official files, memory by formula, weights that are watched."""

import json
from pathlib import Path

import matplotlib
import pytest
from families import tiny

from qwen_nb.architecture import parameter_shapes, read_config
from qwen_nb.memory import (
    QWEN_CONFIGS,
    alive_mib,
    component_sizes,
    draw_fit,
    draw_tree,
    free_memory,
    memory_gib,
    watch_memory,
)

matplotlib.use("agg")
FACTS = Path(__file__).resolve().parents[2] / "shared" / "qwen" / "configs"
needs_facts = pytest.mark.skipif(
    not FACTS.is_dir(), reason=f"the official configs are not in {FACTS}"
)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_parts_add_up_in_any_family(family):
    model = tiny(family)
    total = sum(p.numel() for p in model.parameters())
    sizes = component_sizes({name: p.shape for name, p in model.named_parameters()})
    assert sum(sizes.values()) == total and "other" not in sizes
    draw_tree(model)


@needs_facts
def test_the_table_is_the_official_configs():
    for name, ours in QWEN_CONFIGS.items():
        file = FACTS / f"{name}{'-Instruct' if 'Qwen2.5' in name else ''}.config.json"
        theirs = read_config(json.loads(file.read_text()))
        assert {k: theirs[k] for k in ours} == ours, name
        assert parameter_shapes(theirs) == parameter_shapes(ours), name


def test_memory_grows_with_bits_context_and_batch():
    config = QWEN_CONFIGS["Qwen3-0.6B"]
    weights, cache = memory_gib(config)
    assert memory_gib(config, bits=8) == (weights / 2, cache), "the cache stays at 16 bits"
    assert memory_gib(config, bits=32) == (weights * 2, cache * 2)
    assert memory_gib(config, context=8192) == (weights, 2 * cache)
    assert memory_gib(config, batch=3) == (weights, 3 * cache)


def test_what_fits_is_drawn_for_any_gpu():
    draw_fit(context=1, gpu_gib=80.0)
    draw_fit(configs={"one": QWEN_CONFIGS["Qwen3-8B"]})


def test_watched_weights():
    model = tiny("llama")
    mib = 4 * sum(p.numel() for p in model.parameters()) / 2**20
    refs = watch_memory(model)
    assert alive_mib(refs) == mib
    del model
    free_memory()
    assert alive_mib(refs) == 0
