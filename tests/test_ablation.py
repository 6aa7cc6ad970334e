"""Switching heads off: other families, what is refused, the loss."""

import pytest
import torch
from families import tiny

from qwen_nb.ablation import attention_of, head_effects, heads_off, sentence_loss
from qwen_nb.inspect import decoder_layers


def test_heads_of_llama_can_be_switched_off():
    llama, ids = tiny("llama"), torch.arange(8)[None]
    before = sentence_loss(llama, ids)
    with heads_off(llama, 1, iter([0, 3])):
        assert sentence_loss(llama, ids) != before
        assert sentence_loss(llama, ids) != before, "the heads came back at the second call"
    assert sentence_loss(llama, ids) == before


@pytest.mark.parametrize(
    "layer, heads, words",
    [(3, [0], "layers 0 to 2"), (0, [4], "heads 0 to 3"), (-1, [0], "layers 0 to 2")],
)
def test_what_is_not_there_is_named(layer, heads, words):
    with pytest.raises(ValueError, match=words), heads_off(tiny("llama"), layer, heads):
        pass


def test_gpt2_has_no_o_proj():
    gpt2 = tiny("gpt2")
    with pytest.raises(ValueError, match="o_proj"), heads_off(gpt2, 0, [0]):
        pass
    with pytest.raises(ValueError, match="GPT2Block"):
        attention_of(decoder_layers(gpt2)[0])


def test_loss_is_shifted_by_one():
    llama, ids = tiny("llama"), torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        theirs = llama(ids, labels=ids).loss
        assert torch.allclose(sentence_loss(llama, ids), theirs)


def test_effects_have_a_row_for_each_layer():
    llama, ids = tiny("llama"), torch.arange(8)[None]
    one, together = head_effects(llama, ids, [0, 2])
    assert one.shape == (2, 4) and together.shape == (2,)
    every, _ = head_effects(llama, ids)
    assert every.shape == (3, 4)
    assert torch.equal(every[[0, 2]], one)
    assert not one.requires_grad
