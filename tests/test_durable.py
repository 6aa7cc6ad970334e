"""Folders that appear whole or not at all, and models that others open."""

import os

import pytest
import torch
from runs import FAMILIES, one_sentence, small

from qwen_nb import data
from qwen_nb.durable import read_folder, save_pretrained, write_folder
from qwen_nb.inspect import load_reference
from qwen_nb.model import Qwen
from qwen_nb.tokenizer import Tokenizer

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")


def test_a_config_that_cannot_be_written_is_refused(tmp_path):
    "Written as a dense Qwen3 it would come back as another model, without a word."
    from qwen_nb.windows import WindowConfig

    config = small().config
    windowed = Qwen(WindowConfig(**vars(config), windows=[4] * config.num_hidden_layers))
    with pytest.raises(ValueError, match="WindowConfig cannot be written yet"):
        save_pretrained(windowed, tmp_path / "m")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_others_open_the_folder(tmp_path, tokenizer, family, dtype):
    model = small(**FAMILIES[family]).to(dtype).eval()
    save_pretrained(model, tmp_path / "m", tokenizer, dtype)
    again, (theirs, their_tokenizer) = (
        Qwen.from_pretrained(tmp_path / "m"),
        load_reference(tmp_path / "m", dtype),
    )
    text = data.world_stories(1)[0]
    ids = torch.tensor([tokenizer.encode(text)])
    assert (
        their_tokenizer(text).input_ids
        == ids[0].tolist()
        == Tokenizer.from_pretrained(tmp_path / "m").encode(text)
    )
    assert (
        again.config == model.config
        and torch.equal(again(ids), model(ids))
        and next(again.parameters()).dtype == dtype
    )
    assert (theirs(ids).logits - model(ids)).abs().max() < (1e-5 if dtype == torch.float32 else 0.2)
    assert theirs.generation_config.eos_token_id == [
        tokenizer.special[t] for t in ("<|im_end|>", "<|endoftext|>")
    ]


def test_no_name_for_a_mixture(tmp_path):
    one_sentence("mixture", lambda: save_pretrained(small(qkv_bias=True), tmp_path / "m"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path, monkeypatch):
    folder, files = tmp_path / "a", {"one": b"1", "two": b"2"}
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    one_sentence("holds thesis.txt, which would be lost", lambda: write_folder(folder, files))
    one_sentence("is a file", lambda: write_folder(folder / "thesis.txt", files))
    assert (folder / "thesis.txt").read_text() == "years" and [
        p.name for p in tmp_path.iterdir()
    ] == ["a"]
    write_folder(tmp_path / "b", files)
    write_folder(tmp_path / "b", {"one": b"new"})  # what it wrote itself it replaces
    assert read_folder(tmp_path / "b") == {"one": b"new"}
    rename, count = os.rename, []

    def fails_second(a, b):
        count.append(a)
        if len(count) == 2:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fails_second)
    one_sentence(
        "what was saved before is untouched", lambda: write_folder(tmp_path / "b", files), OSError
    )
    assert read_folder(tmp_path / "b") == {"one": b"new"} and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["a", "b"]
    monkeypatch.undo()
    os.rename(tmp_path / "b", tmp_path / "b.old.tmp")  # killed between the two
    write_folder(tmp_path / "b", files)
    assert read_folder(tmp_path / "b") == files and not (tmp_path / "b.old.tmp").exists()


def test_adapters_are_not_saved_as_a_model(tmp_path):
    from qwen_nb.lora import add_lora, merge_lora

    save_pretrained(small(), tmp_path / "a")
    before = (tmp_path / "a/model.safetensors").read_bytes()
    for model in (add_lora(small(), 2), merge_lora(add_lora(small(), 2))):
        one_sentence("has LoRA adapters", lambda: save_pretrained(model, tmp_path / "a"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == before
