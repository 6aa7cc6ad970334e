"""Config and shapes: other families, official files, hooks after a failure."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from families import tiny

from qwen_nb.ablation import heads_off
from qwen_nb.architecture import draw_architecture, parameter_shapes, read_config, trace_shapes
from qwen_nb.inspect import decoder_layers
from qwen_nb.memory import QWEN_CONFIGS, count_parameters

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT.parent / "shared" / "qwen" / "configs"
needs_facts = pytest.mark.skipif(
    not FACTS.is_dir(), reason=f"the official configs are not in {FACTS}"
)


def annotated():
    "The cell with the annotated config of Qwen3-0.6B."
    notebook = json.loads((ROOT / "nbs/00a_architecture.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    return next(cell for cell in cells if cell.startswith("QWEN3_06B = {"))


def test_every_number_of_the_config_has_a_comment():
    lines = [line for line in annotated().splitlines() if line.startswith('    "')]
    bare = [line for line in lines if "#" not in line and "model_type" not in line]
    assert len(lines) == 26 and not bare, bare


@needs_facts
def test_the_annotated_config_is_the_official_one():
    ours = ast.literal_eval(annotated().removeprefix("QWEN3_06B = "))
    assert ours == json.loads((FACTS / "Qwen3-0.6B.config.json").read_text())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shapes_of_any_causal_lm(family):
    model = tiny(family)
    steps = trace_shapes(model, torch.arange(5).repeat(2, 1))
    assert steps[0].takes == (2, 5) and steps[0].gives == (2, 5, 60)
    kind = type(decoder_layers(model)[0]).__name__
    blocks = [step for step in steps if step.kind == kind]
    assert len(blocks) == 3
    assert all(step.takes == step.gives == (2, 5, 48) for step in blocks)


def test_no_hook_survives_a_failure():
    model = tiny("llama")
    with pytest.raises(IndexError):
        trace_shapes(model, torch.tensor([[10_000]]))
    with pytest.raises(KeyboardInterrupt), heads_off(model, 0, [0]):
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": None}, "None"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_configs_of_other_families_are_refused(change, words):
    for fn in (read_config, parameter_shapes, count_parameters, draw_architecture):
        with pytest.raises(ValueError, match=words):
            fn(QWEN_CONFIGS["Qwen3-0.6B"] | change)


def test_head_dim_where_the_file_has_none():
    without = {k: v for k, v in QWEN_CONFIGS["Qwen3-0.6B"].items() if k != "head_dim"}
    assert read_config(without)["head_dim"] == 128
    assert read_config(without | {"model_type": "qwen2"})["head_dim"] == 1024 // 16


def test_biases_of_attention():
    config = QWEN_CONFIGS["Qwen3-0.6B"] | {"attention_bias": True}
    shapes = parameter_shapes(config)
    assert shapes["model.layers.0.self_attn.q_proj.bias"] == (2048,)
    assert shapes["model.layers.0.self_attn.v_proj.bias"] == (1024,)
    assert shapes["model.layers.0.self_attn.o_proj.bias"] == (1024,)
    qwen2 = parameter_shapes(QWEN_CONFIGS["Qwen2.5-0.5B"])
    assert qwen2["model.layers.0.self_attn.k_proj.bias"] == (128,)
    assert "model.layers.0.self_attn.o_proj.bias" not in qwen2


@needs_facts
def test_every_tensor_of_the_real_file_is_predicted():
    pattern = r"(model\.\S+|lm_head\S+)\s+\S*?\s*[\[(]([\d, ]+)[\])]"
    real = {}
    for row in (FACTS / "Qwen2.5-0.5B.tensors.txt").read_text().splitlines():
        found = re.match(pattern, row)
        if found:
            real[found[1]] = tuple(map(int, re.findall(r"\d+", found[2])))
    assert len(real) == 290
    assert real == parameter_shapes(QWEN_CONFIGS["Qwen2.5-0.5B"])
