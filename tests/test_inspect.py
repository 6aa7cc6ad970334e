"""qwen_nb.inspect where a notebook would be the wrong place: broken files, missing libraries, other families."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_nb.inspect import (
    QWEN_CONFIGS,
    ancestry,
    component_sizes,
    count_parameters,
    decoder_layers,
    draw_architecture,
    draw_tree,
    heads_off,
    load_reference,
    next_token_loss,
    outline,
    packaged_model,
    parameter_shapes,
    read_config,
    source,
    trace_shapes,
    tree,
)

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT.parent / "shared" / "qwen" / "configs"
needs_facts = pytest.mark.skipif(
    not FACTS.is_dir(), reason=f"the official configs are not in {FACTS}"
)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(packaged_model(), tmp_path / "model"))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(error, words, *args):
    "The error, its one sentence, and the words in it that name the thing."
    with pytest.raises(error, match=words) as info:
        load_reference(*args)
    assert "\n" not in str(info.value)


def test_missing_folder_is_named(tmp_path):
    refused(FileNotFoundError, "nowhere: no such folder", tmp_path / "nowhere")
    refused(FileNotFoundError, "no such folder", "./nowhere")
    refused(FileNotFoundError, "no such folder", "a name with spaces")
    refused(FileNotFoundError, "no config.json", tmp_path)


def test_broken_weights_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(ValueError, re.escape(str(folder)), folder)
    file.unlink()
    refused(OSError, "no file named model.safetensors", folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda w: w.pop("model.layers.0.mlp.up_proj.weight"),
            "no model.layers.0.mlp.up_proj.weight",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(5)}),
            r"model.norm.weight of shape \(5,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, words):
    edit_weights(folder, change)
    refused(ValueError, words, folder)


def test_other_files_missing_or_wrong(folder):
    (folder / "tokenizer.json").unlink()
    refused(ValueError, "no tokenizer", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_family"}))
    refused(ValueError, "no_such_family", folder)
    (folder / "config.json").write_text("{")
    refused(OSError, "not a valid JSON", folder)


def test_dtype_must_be_torchs():
    refused(ValueError, "float17", None, "float17")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(ImportError, "pip install")


def test_import_needs_no_transformers():
    code = "import sys; sys.modules['transformers'] = None; import qwen_nb.inspect as i; i.draw_architecture(i.QWEN_CONFIGS['Qwen3-0.6B'])"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MPLBACKEND": "agg"})


def test_unknown_id_without_network():
    code = (
        "from qwen_nb.inspect import load_reference; load_reference('no-such-user/no-such-model')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.stderr.strip().splitlines()[-1].startswith("OSError: no-such-user/no-such-model: ")


def tiny(family):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_layer=3, n_head=4, n_embd=48, vocab_size=60, n_positions=32)
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=48,
            intermediate_size=80,
            vocab_size=60,
            tie_word_embeddings=False,
        )
    ).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_any_causal_lm(family):
    model, ids = tiny(family), torch.arange(5).repeat(2, 1)
    total = sum(p.numel() for p in model.parameters())
    assert outline(model).count == total and f"{total:,}" in tree(model, depth=1)
    assert sum(component_sizes({n: p.shape for n, p in model.named_parameters()}).values()) == total
    assert "0…2: 3 × " in tree(model) and len(decoder_layers(model)) == 3
    steps = trace_shapes(model, ids)
    assert steps[0].takes == (2, 5) and steps[0].gives == (2, 5, 60)
    blocks = [s for s in steps if s.kind == type(decoder_layers(model)[0]).__name__]
    assert len(blocks) == 3 and all(s.takes == s.gives == (2, 5, 48) for s in blocks)
    assert torch.nn.Module in ancestry(model) and source(type(model)).startswith(
        f"# transformers/models/{family}/"
    )
    draw_tree(model)


def test_tied_head_counts_once_and_says_so():
    assert "tied" in tree(tiny("gpt2")) and "tied" not in tree(tiny("llama"))


def test_heads_of_llama_can_be_switched_off_and_gpt2_says_no():
    llama, ids = tiny("llama"), torch.arange(8)[None]
    before = next_token_loss(llama, ids)
    with heads_off(llama, 1, [0, 3]):
        assert next_token_loss(llama, ids) != before
    assert next_token_loss(llama, ids) == before
    for layer, heads, words in [
        (3, [0], "layers 0 to 2"),
        (0, [4], "heads 0 to 3"),
        (-1, [0], "layers 0 to 2"),
    ]:
        with pytest.raises(ValueError, match=words), heads_off(llama, layer, heads):
            pass
    with pytest.raises(ValueError, match="o_proj"), heads_off(tiny("gpt2"), 0, [0]):
        pass


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


@needs_facts
def test_the_table_is_the_official_configs():
    for name, ours in QWEN_CONFIGS.items():
        file = FACTS / f"{name}{'-Instruct' if 'Qwen2.5' in name else ''}.config.json"
        theirs = read_config(json.loads(file.read_text()))
        assert {k: theirs[k] for k in ours} == ours, name
        assert parameter_shapes(theirs) == parameter_shapes(ours), name


@needs_facts
def test_every_tensor_of_the_real_file_is_predicted():
    rows = (FACTS / "Qwen2.5-0.5B.tensors.txt").read_text().splitlines()
    real = {
        m[1]: tuple(map(int, re.findall(r"\d+", m[2])))
        for r in rows
        if (m := re.match(r"(model\.\S+|lm_head\S+)\s+\S*?\s*[\[(]([\d, ]+)[\])]", r))
    }
    assert len(real) == 290 and real == parameter_shapes(QWEN_CONFIGS["Qwen2.5-0.5B"])


def test_folded_solutions_are_the_tested_ones():
    cells = json.loads((ROOT / "nbs" / "00_inspect.ipynb").read_text(encoding="utf-8"))["cells"]
    text = {
        kind: ["".join(c["source"]) for c in cells if c["cell_type"] == kind]
        for kind in ("markdown", "code")
    }
    folded = [
        s.strip()
        for md in text["markdown"]
        for s in re.findall(r"Solution</summary>\s*```python\n(.*?)```", md, re.S)
    ]
    assert len(folded) == 2 and all(any(s == code.strip() for code in text["code"]) for s in folded)
