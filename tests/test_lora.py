"""LoRA: its formula, merging, what trains, and PEFT's files both ways."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune import one_sentence
from test_model import random_checkpoint
from torch import nn

from qwen_nb import lora as lo
from qwen_nb import rank as directions
from qwen_nb.durable import save_pretrained
from qwen_nb.inspect import packaged_model
from qwen_nb.loading import replace_weights
from qwen_nb.model import Qwen, QwenConfig


def open_model(folder, dtype="float32"):
    return Qwen.from_pretrained(folder, dtype=dtype)


def shake(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        [m.lora_B.weight.normal_(std=0.5) for m in lo.lora_layers(model).values()]
    return model


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return getattr(out, "logits", out)


@pytest.fixture(params=range(4))
def made(request, tmp_path):
    "A random checkpoint's folder and ids: both families, with and without biases."
    ids, _ = random_checkpoint(tmp_path / "base", request.param)
    return tmp_path / "base", ids


def test_the_formula():
    torch.manual_seed(0)
    for bias in (True, False):
        base = nn.Linear(12, 7, bias=bias, dtype=torch.float64)
        layer, x = (
            lo.LoRALinear(base, rank=3, alpha=6.0),
            torch.randn(5, 2, 12, dtype=torch.float64),
        )
        assert (
            torch.equal(layer(x), base(x))
            and layer.lora_A.weight.abs().max() <= 12**-0.5
            and layer.lora_A.weight.std() > 0
        )
        nn.init.normal_(layer.lora_B.weight)
        want = (
            x @ base.weight.T
            + (base.bias if bias else 0)
            + 6 / 3 * (x @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
        )
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_fresh_adapters_change_nothing_and_alone_train(made):
    folder, ids = made
    plain, model = open_model(folder), lo.add_lora(open_model(folder), rank=2)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    model(ids).logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert ("lora_" in name) == p.requires_grad and (
            "lora_B" not in name or p.grad.abs().max() > 0
        )
        if "lora_A" in name:
            assert p.grad.abs().max() == 0  # B is zero
    assert {n for n in model.state_dict() if "lora_" not in n} == plain.state_dict().keys()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(
        2 * sum(m.weight.shape) for n, m in plain.named_modules() if n.endswith(lo.LINEAR)
    )


def test_merge_and_unmerge(made):
    folder, ids = made
    model = shake(
        lo.add_lora(open_model(folder, "float64"), rank=3, targets=["q_proj", "down_proj"])
    )
    before, weights = logits(model, ids), {n: p.clone() for n, p in model.named_parameters()}
    assert (before - logits(open_model(folder, "float64"), ids)).abs().max() > 1e-3
    torch.testing.assert_close(logits(lo.merge_lora(model), ids), before, rtol=1e-6, atol=1e-6)
    one_sentence("merged already", lambda: lo.merge_lora(model))
    assert torch.equal(logits(lo.unmerge_lora(model), ids), before) and all(
        torch.equal(p, weights[n]) for n, p in model.named_parameters()
    )
    one_sentence("no adapter is merged", lambda: lo.unmerge_lora(model))
    baked = lo.bake_lora(model)
    other = Qwen(baked.config).double()
    other.load_state_dict(baked.state_dict(), strict=True)
    assert not lo.lora_layers(baked)
    torch.testing.assert_close(logits(other, ids), before, rtol=1e-6, atol=1e-6)


def test_half_precision_keeps_its_type_and_a_wide_adapter(made):
    folder, ids = made
    model = shake(lo.add_lora(open_model(folder, "bfloat16"), rank=2))
    assert logits(model, ids).dtype == torch.bfloat16 and all(
        m.lora_A.weight.dtype == torch.float32 for m in lo.lora_layers(model).values()
    )
    lo.merge_lora(model)
    assert logits(model, ids).dtype == torch.bfloat16


# ---- PEFT


def reference(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize(
    "targets", [lo.LINEAR, ["q_proj", "v_proj"], ["layers.0.self_attn.o_proj", "gate_proj"]]
)
def test_peft_opens_ours(made, tmp_path, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder, ids = made
    model = shake(lo.add_lora(open_model(folder), rank=3, alpha=5.0, targets=targets))
    lo.save_lora(model, tmp_path / "a", str(folder))
    names = load_file(tmp_path / "a/adapter_model.safetensors")
    assert len(names) == 2 * len(lo.lora_layers(model)) and all(
        n.startswith("base_model.model.model.layers.")
        and n.endswith((".lora_A.weight", ".lora_B.weight"))
        for n in names
    )
    theirs = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "a").eval()
    close(logits(model, ids), logits(theirs, ids))
    again = lo.load_lora(open_model(folder), tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(model, ids))
    close(logits(lo.merge_lora(again), ids), logits(theirs.merge_and_unload(), ids))
    assert (logits(reference(folder), ids) - logits(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=r".*\.(q|k)_proj"),
        dict(target_modules=["up_proj"], rank_pattern={"layers.0.mlp.up_proj": 2}),
        dict(target_modules=["q_proj", "up_proj"], use_rslora=True),
    ],
)
def test_we_open_pefts(made, tmp_path, settings):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder, ids = made
    theirs = peft.get_peft_model(
        reference(folder), peft.LoraConfig(r=4, lora_alpha=7, task_type="CAUSAL_LM", **settings)
    ).eval()
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    theirs.save_pretrained(tmp_path / "b")
    close(logits(lo.load_lora(open_model(folder), tmp_path / "b"), ids), logits(theirs, ids))


@pytest.mark.parametrize(
    "variant",
    [
        dict(use_dora=True),
        dict(lora_bias=True),
        dict(bias="all"),
        dict(alpha_pattern={"q_proj": 3}),
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="olora"),
    ],
)
def test_variants_of_pefts_are_refused(tmp_path, variant):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    random_checkpoint(tmp_path / "base", 1)
    peft.get_peft_model(
        reference(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["q_proj"], **variant)
    ).save_pretrained(tmp_path / "b")
    one_sentence(
        next(iter(variant)), lambda: lo.load_lora(open_model(tmp_path / "base"), tmp_path / "b")
    )


@pytest.mark.parametrize(
    "targets", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]]
)
def test_we_open_pefts_adapters_of_all_experts(tmp_path, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder, ids = packaged_model("qwen3_moe"), torch.arange(30)[None]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=[f"mlp.experts.{t}" for t in targets],
    )
    theirs = peft.get_peft_model(reference(folder), config).eval()
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "b")
    ours = lo.load_lora(open_model(folder), tmp_path / "b")
    close(logits(ours, ids), logits(theirs, ids))
    assert (logits(open_model(folder), ids) - logits(ours, ids)).abs().max() > 1e-2
    lo.save_lora(ours, tmp_path / "c")
    again = lo.load_lora(open_model(folder), tmp_path / "c")
    assert torch.equal(logits(again, ids), logits(ours, ids))


def changed(model):
    "Random numbers wherever PEFT trains something."
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name or p.requires_grad and "lora_" not in name:
            nn.init.normal_(p, std=0.5)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "whole, rows, more",
    [
        (None, 3, {}),
        (["embed_tokens", "lm_head"], 3, {}),
        (["embed_tokens", "lm_head"], 0, {}),
        (["embed_tokens"], 0, {}),
        (["embed_tokens"], 0, dict(ensure_weight_tying=True)),
        (["lm_head", "norm"], 0, {}),
    ],
)
def test_adapters_that_bring_whole_matrices(tmp_path, tied, whole, rows, more):
    "Grown vocabularies and `modules_to_save`: PEFT's logits, saved again, merged and saved."
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TINY, tie_word_embeddings=tied, initializer_range=0.3)
    )
    base.save_pretrained(tmp_path / "base")
    base = reference(tmp_path / "base")
    if rows:
        base.resize_token_embeddings(TINY["vocab_size"] + rows)
    settings = dict(r=2, target_modules=["q_proj"], modules_to_save=whole, **more)
    theirs = changed(peft.get_peft_model(base, peft.LoraConfig(**settings)))
    theirs.save_pretrained(tmp_path / "b", save_embedding_layers=bool(rows))
    ids = torch.randint(TINY["vocab_size"] + rows, (2, 20))
    want = logits(theirs, ids)
    ours = lo.load_lora(open_model(tmp_path / "base"), tmp_path / "b")
    close(logits(ours, ids), want)
    assert ours.config.vocab_size == TINY["vocab_size"] + rows
    lo.save_lora(ours, tmp_path / "c", str(tmp_path / "base"))
    close(logits(lo.load_lora(open_model(tmp_path / "base"), tmp_path / "c"), ids), want)
    save_pretrained(lo.bake_lora(ours), tmp_path / "d", dtype=torch.float32)
    close(logits(open_model(tmp_path / "d"), ids), want)
    close(logits(reference(tmp_path / "d"), ids), want)


TINY = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def test_whole_matrices_that_do_not_fit(tmp_path):
    "One sentence, and the model as it was."
    model = Qwen(QwenConfig(**TINY, tie_word_embeddings=False))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for whole, said in (
        ({embedding: torch.ones(62, 32)}, "embedding has 62 rows, the head 60"),
        ({embedding: torch.ones(60, 31)}, "shape .60, 31.; this model's has .60, 32."),
        ({"model.norm.weight": torch.ones(33)}, "model.norm.weight has shape"),
        ({"score.weight": torch.ones(2, 32)}, "score.weight is no weight of this model"),
        ({embedding: torch.ones(62, 32), head: torch.ones(62)}, "lm_head.weight has shape"),
    ):
        one_sentence(said, lambda whole=whole: replace_weights(model, whole))
    assert model.config.vocab_size == 60
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- what is refused


def test_refused(made, tmp_path):
    folder, ids = made
    for rank in (0, -1, 2.5, True):
        one_sentence("rank is", lambda: lo.add_lora(open_model(folder), rank=rank))
    one_sentence("alpha is 0", lambda: lo.add_lora(open_model(folder), alpha=0))
    one_sentence(
        "ends with query; there are", lambda: lo.add_lora(open_model(folder), targets=["query"])
    )
    one_sentence("no adapters", lambda: lo.save_lora(open_model(folder), tmp_path / "a"))
    model = lo.add_lora(open_model(folder), rank=2)
    one_sentence("adapters already", lambda: lo.add_lora(model))
    lo.save_lora(model, tmp_path / "a")
    one_sentence("adapters already", lambda: lo.load_lora(model, tmp_path / "a"))
    one_sentence(
        "adapter_config.json", lambda: lo.load_lora(open_model(folder), tmp_path), FileNotFoundError
    )
    path, plain = tmp_path / "a/adapter_model.safetensors", open_model(folder)
    good = load_file(path)
    first = next(n for n in good if "lora_A" in n)
    for bad, match in (
        ({n: t for n, t in good.items() if n != first}, "only one of the two"),
        (good | {first: good[first][:, 1:].contiguous()}, "another model"),
        (
            good | {"base_model.model.lm_head.weight": good[first].clone()},
            "lm_head.weight has shape",
        ),
        ({n.replace("layers.0", "layers.77"): t for n, t in good.items()}, "does not have"),
        ({}, "no adapters"),
    ):
        save_file(bad, path)
        one_sentence(match, lambda: lo.load_lora(plain, tmp_path / "a"))
        assert not lo.lora_layers(plain) and all(
            p.requires_grad for p in plain.parameters()
        )  # as before
    for bad, match in (
        ({n: t[0].clone() for n, t in good.items()}, "expected two matrices"),
        (good | {first: good[first] * float("nan")}, "expected two matrices"),
        ({n: t.long() for n, t in good.items()}, "expected two matrices"),
        (
            {n: (t[:1] if "lora_A" in n else t[:, :1]).clone() for n, t in good.items()},
            "do not belong together",
        ),
    ):
        save_file(bad, path)
        one_sentence(match, lambda: lo.load_lora(plain, tmp_path / "a"))
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-1])
    one_sentence("adapter_model.safetensors", lambda: lo.load_lora(plain, tmp_path / "a"))
    path.unlink()
    one_sentence("is missing", lambda: lo.load_lora(plain, tmp_path / "a"), FileNotFoundError)
    path.write_bytes(b"\xff" * random.randrange(1, 99))
    one_sentence("adapter_model.safetensors", lambda: lo.load_lora(plain, tmp_path / "a"))
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | dict(r=0)))
    one_sentence("r is 0", lambda: lo.load_lora(plain, tmp_path / "a"))
    for alpha in (0, -3, float("nan"), True, "4"):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | dict(lora_alpha=alpha)))
        one_sentence("expected two numbers above 0", lambda: lo.load_lora(plain, tmp_path / "a"))
    for alpha in ("4", float("inf"), float("nan")):
        one_sentence("alpha is", lambda: lo.add_lora(open_model(folder), alpha=alpha))


def test_an_older_adapter_stays_or_is_replaced_whole(made, tmp_path, monkeypatch):
    folder, ids = made
    old, new = (
        shake(lo.add_lora(open_model(folder), rank=2)),
        shake(lo.add_lora(open_model(folder), rank=2, alpha=64), seed=1),
    )
    lo.save_lora(old, tmp_path / "a")
    count, fsync = [], os.fsync

    def full(f):
        count.append(f)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        fsync(f)

    monkeypatch.setattr(os, "fsync", full)
    one_sentence("free some space", lambda: lo.save_lora(new, tmp_path / "a"), OSError)
    monkeypatch.undo()
    assert torch.equal(
        logits(lo.load_lora(open_model(folder), tmp_path / "a"), ids), logits(old, ids)
    )
    lo.save_lora(new, tmp_path / "a")
    assert torch.equal(
        logits(lo.load_lora(open_model(folder), tmp_path / "a"), ids), logits(new, ids)
    )
    one_sentence(
        "which would be lost", lambda: lo.save_lora(new, folder)
    )  # the base model's own folder


def test_a_merged_model_keeps_its_names(made):
    folder, ids = made
    model = lo.add_lora(open_model(folder), rank=2)
    names = [n for n, _ in model.named_parameters()]
    assert (
        [n for n, _ in lo.merge_lora(model).named_parameters()]
        == names
        == [n for n, _ in lo.unmerge_lora(model).named_parameters()]
    )


def test_baked_whatever_was_merged_before(made):
    "None, all or some of the adapters: the outcome is the same. Without any there is an error."
    folder, ids = made

    def adapted():
        return shake(lo.add_lora(open_model(folder, "float64"), rank=2))

    want, partly = logits(adapted(), ids), adapted()
    first, *_ = lo.lora_layers(partly).values()
    lo.merge_layer(first)
    for model in (adapted(), lo.merge_lora(adapted()), partly):
        baked = lo.bake_lora(model)
        assert not lo.lora_layers(baked)
        torch.testing.assert_close(logits(baked, ids), want, rtol=1e-6, atol=1e-6)
    one_sentence("no adapters to bake", lambda: lo.bake_lora(open_model(folder)))


def test_targets_are_ends_where_that_is_enough(tmp_path):
    folder = packaged_model()  # has several layers
    whole = lo.add_lora(open_model(folder), targets=["q_proj", "v_proj"])
    some = lo.add_lora(open_model(folder), targets=["layers.0.self_attn.q_proj", "up_proj"])
    for model, wanted in ((whole, ["q_proj", "v_proj"]), (some, sorted(lo.lora_layers(some)))):
        folder_of = tmp_path / str(len(wanted))
        lo.save_lora(model, folder_of)
        config = json.loads((folder_of / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["target_modules"] == wanted


def test_the_share_of_the_strongest_directions():
    torch.manual_seed(0)
    squares = torch.tensor([9.0, 4.0, 1.0])
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    torch.testing.assert_close(
        directions.energy(torch.diag(squares.sqrt()) @ rotation), squares.cumsum(0) / 14
    )
    low = torch.randn(20, 2) @ torch.randn(2, 30)
    mixed = directions.shuffled(low, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.flatten().sort()[0], low.flatten().sort()[0])
    assert directions.energy(low)[1] > 0.999 > 0.6 > directions.energy(mixed)[1]
