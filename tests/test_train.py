"""One step of training: gradients, first weights, optimizer, learning rate, and the floor."""

import math

import pytest
import torch
from runs import FAMILIES, one_sentence, small
from torch.nn import functional as F

from qwen_nb import train as train_module
from qwen_nb.durable import save_pretrained
from qwen_nb.inspect import load_reference
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.rows import IGNORED, Packed
from qwen_nb.shards import Shards
from qwen_nb.train import forward, init_weights, learning_rate, next_token_loss, parameter_groups

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_gradients_equal_the_references(tmp_path, shards, family, dtype, close):
    "Of a packed row: the reference reads its documents one by one."
    save_pretrained(
        small(**FAMILIES[family]), tmp_path / "m", Shards(shards).tokenizer(), torch.float32
    )
    ours, theirs = (
        Qwen.from_pretrained(tmp_path / "m", dtype).train(),
        load_reference(tmp_path / "m", dtype, attn_implementation="sdpa")[0],
    )
    batch = Packed(Shards(shards), 100).batch(0, 2)
    assert batch["document_ids"].max() > 0
    real = (batch["labels"] != IGNORED).sum()
    logits = forward(ours, batch)
    F.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED
    ).backward()
    for ids, labels, documents in zip(batch["input_ids"], batch["labels"], batch["document_ids"]):
        for d in documents.unique():
            mine = documents == d
            nll = F.cross_entropy(
                theirs(ids[mine][None]).logits[0],
                labels[mine],
                ignore_index=IGNORED,
                reduction="sum",
            )
            (nll / real).backward()
    for name, p in ours.named_parameters():
        other = theirs.get_parameter(name).grad
        assert (p.grad - other).norm() <= close * other.norm(), name


def test_only_copying_makes_the_loss_of_a_die_fall():
    """Labels shifted by one: eight equally likely symbols cost ln 8, whoever predicts. Labels not
    shifted: nothing."""

    def run(shift):
        model, die = (
            init_weights(Qwen(QwenConfig(8, 32, 64, 2, 4, 2, 8, 64, 1e4))),
            torch.Generator().manual_seed(0),
        )
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=5e-3)
        for _ in range(80):
            ids = torch.randint(0, 8, (16, 33), generator=die)
            batch = dict(
                input_ids=ids[:, :-1],
                position_ids=torch.arange(32).expand(16, -1),
                document_ids=torch.zeros(16, 32, dtype=torch.long),
            )
            loss = next_token_loss(forward(model, batch), ids[:, 1:] if shift else ids[:, :-1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert run(False) < 0.1 and abs(run(True) - math.log(8)) < 0.1


def test_initial_weights():
    for hidden in (64, 256):
        model = small(hidden_size=hidden, intermediate_size=2 * hidden, qkv_bias=True)
        for name, p in model.named_parameters():
            if p.dim() > 1:
                assert abs(p.std() * hidden**0.5 - 1) < 0.05 and abs(p.mean()) < 0.01, name
            else:
                assert (p == (0 if name.endswith("bias") else 1)).all(), name
    assert all(torch.equal(a, b) for a, b in zip(small().parameters(), small().parameters()))


def test_what_decays():
    model = small(qkv_bias=True, tie_word_embeddings=False)
    decays, stays = parameter_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decays["weight_decay"] == 0.3 and stays["weight_decay"] == 0
    assert all(
        ("proj" in n or "embed" in n or "lm_head" in n) and n.endswith("weight")
        for n in (names[id(p)] for p in decays["params"])
    )
    assert all("norm" in n or n.endswith("bias") for n in (names[id(p)] for p in stays["params"]))
    assert len(decays["params"]) + len(stays["params"]) == len(names)


def test_narrow_weights_are_not_trained():
    """Full weights in bfloat16 are refused wherever an optimizer is made of them; adapters beside
    them are float32."""
    from qwen_nb import finetune, lora, preference, rewards

    for dtype in (torch.bfloat16, torch.float16):
        model, name = small().to(dtype), str(dtype)[6:]
        one_sentence(f"are {name}.*dtype=torch.float32", lambda: parameter_groups(model))
        one_sentence(name, lambda: next(finetune.tune(model, [])))
        one_sentence(name, lambda: next(preference.dpo(model, preference.frozen(model), [])))
        one_sentence(name, lambda: next(rewards.grpo(model, preference.frozen(model), None, [])))
        assert len(parameter_groups(lora.add_lora(model, 2))[0]["params"]) == 2 * 2 * 7
    assert parameter_groups(small().double())


def test_learning_rate():
    rates = [learning_rate(t, 100, 2.0, 10, 0.1) for t in range(101)]
    assert (
        rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
        and rates[10] == 2
        and rates[100] == pytest.approx(0.2)
    )
    assert rates[55] == pytest.approx(2 * (0.1 + 0.9 / 2)) and all(
        a > b for a, b in zip(rates[10:], rates[11:])
    )
    assert (
        learning_rate(0, 5, 1.0, 0) == 1
        and learning_rate(3, 2, 1.0, 5) == pytest.approx(0.8)
        and learning_rate(9, 5, 1.0, 0, 0.5) == pytest.approx(0.5)
    )


def test_the_floor(tokenizer):
    "The same as measured by the world's own notebook, story by story."
    import random

    from qwen_nb.world import Chooser, story

    nats = tokens = 0
    for i in range(20):
        choose = Chooser(random.Random(f"5/{i}"))
        ids = tokenizer.encode("".join(line.text + "\n" for line in story(choose)))
        nats, tokens = nats + choose.nats - math.log(8), tokens + len(ids)
    assert train_module.world_floor(tokenizer, 20, 5) == pytest.approx(nats / tokens)
