"""Opening a model and taking it apart, where a notebook would be the wrong place: broken files,
missing libraries, other families."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file

from qwen_nb.inspect import (
    ancestry,
    caught,
    decoder_layers,
    defined_in,
    load_reference,
    outline,
    packaged_model,
    source,
    tree,
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
    code = (
        "import sys; sys.modules['transformers'] = None; import qwen_nb.memory as m; "
        "import qwen_nb.architecture as a; a.draw_architecture(m.QWEN_CONFIGS['Qwen3-0.6B'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MPLBACKEND": "agg"})


def test_import_is_light():
    "The tokenizer imports this module: no torch, no numpy, no matplotlib may come with it."
    code = (
        "import sys; import qwen_nb.inspect; "
        "print(sorted({'torch', 'numpy', 'matplotlib', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"import qwen_nb.inspect brings {done.stdout}"


def test_default_dtype_is_float32():
    model, _ = load_reference()
    assert next(model.parameters()).dtype == torch.float32
    half, _ = load_reference(dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_any_causal_lm(family):
    model = tiny(family)
    total = sum(p.numel() for p in model.parameters())
    assert outline(model).count == total
    assert f"{total:,}" in tree(model, depth=1)
    assert "0…2: 3 × " in tree(model)
    assert len(decoder_layers(model)) == 3
    assert torch.nn.Module in ancestry(model)
    assert source(type(model)).startswith(f"# transformers/models/{family}/")


def test_depth_counts_the_levels():
    assert outline(torch.nn.Linear(2, 2)).depth() == 1
    assert outline(torch.nn.Sequential(torch.nn.Linear(2, 2))).depth() == 2


def test_tied_head_counts_once_and_says_so():
    assert "tied" in tree(tiny("gpt2"))
    assert "tied" not in tree(tiny("llama"))


def test_layers_are_found_by_their_number():
    model = tiny("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no list of 5 layers"):
        decoder_layers(model)


def test_who_defines_a_name():
    model = tiny("llama")
    assert defined_in(model, "forward") is type(model)
    assert defined_in(type(model), "state_dict") is torch.nn.Module
    with pytest.raises(AttributeError, match="frobnicate"):
        defined_in(model, "frobnicate")


def test_caught_sees_only_the_expected_kind(capsys):
    def fails():
        raise ValueError("a sentence")

    caught(fails, error=ValueError)
    assert capsys.readouterr().out == "✗ caught, a sentence\n"
    with pytest.raises(ValueError):
        caught(fails)
    with pytest.raises(AssertionError, match="cannot see the mistake"):
        caught(print)
