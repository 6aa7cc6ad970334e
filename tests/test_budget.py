"""A step within a memory: sums over parts, activation checkpointing, bfloat16."""

import pytest
import torch
from runs import gradients, same, small
from siblings import SIBLINGS

from qwen_nb.budget import Objective, cast_once, label_weight, use_checkpointing
from qwen_nb.inspect import packaged_model
from qwen_nb.lessons import WorldRows
from qwen_nb.model import Qwen
from qwen_nb.rows import IGNORED, Packed
from qwen_nb.shards import Shards
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.train import forward, next_token_loss

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")


def test_the_loss(shards):
    model, batch = small(), Packed(Shards(shards), 64).batch(0, 3)
    logits = forward(model, batch)
    logp = logits.double().log_softmax(-1)
    want = [
        -logp[b, t, batch["labels"][b, t]].item()
        for b in range(3)
        for t in range(64)
        if batch["labels"][b, t] != IGNORED
    ]
    assert abs(next_token_loss(logits, batch["labels"]).item() - sum(want) / len(want)) < 1e-5
    assert (
        abs(Objective(model)(batch).item() - sum(want)) < 1e-2
        and label_weight(batch) == len(want) < 3 * 64
    )
    assert next_token_loss(logits.bfloat16(), batch["labels"]).dtype == torch.float32
    weights = torch.rand(3, 64)
    weighted = sum(
        w * weights[b, t].item()
        for w, (b, t) in zip(want, (batch["labels"] != IGNORED).nonzero().tolist())
    )
    assert abs(Objective(model)(batch | dict(weights=weights)).item() - weighted) < 1e-2


def test_checkpointing_changes_no_bit(shards):
    batch, found = Packed(Shards(shards), 64).batch(0, 2), []
    for wrap in (lambda m: m, use_checkpointing):
        model = wrap(small())
        calls = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
        next_token_loss(forward(model, batch), batch["labels"]).backward()
        found.append((gradients(model), len(calls)))
    assert same(found[0][0], found[1][0]) and [n for _, n in found] == [1, 2]
    assert use_checkpointing(small()).state_dict().keys() == small().state_dict().keys()


@pytest.mark.parametrize("sibling", ["", *SIBLINGS])
def test_casting_once_changes_no_loss(sibling):
    def loss(dtype, change=lambda model: model):
        return Objective(
            change(Qwen.from_pretrained(packaged_model(sibling), dtype="float32").train()), dtype
        )(batch)

    batch = WorldRows(Tokenizer.from_pretrained(), 256).batch(3000, 4)
    with torch.no_grad():
        assert loss("bfloat16") == loss("bfloat16", cast_once) != loss("float32")
