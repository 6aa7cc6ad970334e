"""Training: gradients, accumulation and checkpoints that are what they should be, and runs that survive kill -9, full disks and NaN."""

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from qwen_nb import data
from qwen_nb import train as training
from qwen_nb.data import IGNORED, Packed, Shards, write_shards
from qwen_nb.lessons import ANSWER, STORIES, WorldRows
from qwen_nb.inspect import load_reference, packaged_model
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.train import (
    Objective,
    OneProcess,
    Run,
    TrainConfig,
    cast_once,
    checkpoints,
    forward,
    init_weights,
    label_weight,
    latest_checkpoint,
    learning_rate,
    load_checkpoint,
    next_token_loss,
    parameter_groups,
    read_config,
    read_folder,
    read_log,
    save_pretrained,
    train,
    use_checkpointing,
    write_folder,
)

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
QUICK = dict(
    SMALL,
    steps=6,
    batch_size=4,
    seq_len=32,
    lr=3e-3,
    warmup=2,
    save_every=2,
    keep=0,
    log_every=1,
    eval_every=0,
    sample=0,
    peak_tflops=1.0,
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(data.world_stories(60, seed=3), 400)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder, data.world_stories(60, seed=3), tokenizer)
    return folder


@pytest.fixture
def config(tmp_path, shards):
    return TrainConfig(out=str(tmp_path / "out"), data=str(shards), **QUICK)


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 600
    return str(e.value)


def small(**kw):
    return init_weights(
        Qwen(QwenConfig(**dict(SMALL, vocab_size=448, rope_theta=1e4) | kw)), seed=1
    )


def losses(out):
    return [line["loss"] for line in read_log(out)]


def final_weights(out):
    return load_checkpoint(checkpoints(out)[-1])["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- one step

FAMILIES = dict(
    qwen3={},
    qwen2=dict(qkv_bias=True, qk_norm=False),
    untied=dict(tie_word_embeddings=False),
    yarn=dict(rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)),
)


def test_a_config_that_cannot_be_written_is_refused(tmp_path):
    "Written as a dense Qwen3 it would come back as another model, without a word."
    from qwen_nb.qwen2 import WindowConfig

    config = small().config
    windowed = Qwen(WindowConfig(**vars(config), windows=[4] * config.num_hidden_layers))
    with pytest.raises(ValueError, match="WindowConfig cannot be written yet"):
        save_pretrained(windowed, tmp_path / "m")


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


def test_only_copying_makes_the_loss_of_a_die_fall():
    "Labels shifted by one: eight equally likely symbols cost ln 8, whoever predicts. Labels not shifted: nothing."

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
    "Full weights in bfloat16 are refused wherever an optimizer is made of them; adapters beside them are float32."
    from qwen_nb import finetune, lora, preference

    for dtype in (torch.bfloat16, torch.float16):
        model, name = small().to(dtype), str(dtype)[6:]
        one_sentence(f"are {name}.*dtype=torch.float32", lambda: parameter_groups(model))
        one_sentence(name, lambda: next(finetune.tune(model, [])))
        one_sentence(name, lambda: next(preference.dpo(model, preference.frozen(model), [])))
        one_sentence(name, lambda: next(preference.grpo(model, preference.frozen(model), None, [])))
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


@pytest.mark.parametrize(
    "change", [dict(accumulate=2), dict(accumulate=4), dict(checkpointing=True)]
)
def test_parts_equal_the_large_batch(tmp_path, config, change):
    train(config)
    train(replace(config, out=str(tmp_path / "b"), **change))
    assert losses(config.out) == pytest.approx(losses(tmp_path / "b"), rel=1e-6)
    a, b = final_weights(config.out), final_weights(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)


def test_the_run_is_the_ten_lines(config):
    "AdamW with groups, warm-up and cosine, clipping to a length that matters: a plain loop gives the same weights."
    c = replace(config, clip=0.3, weight_decay=0.5)
    plain = Run(replace(c, out="none"), OneProcess("cpu"))
    model, norms = plain.model, []
    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=0.5),
            dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0),
        ],
        betas=(0.9, 0.95),
    )
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * [0.5, 1, 1][step] if step < 3 else learning_rate(step, 6, 3e-3, 2)
        batch = plain.rows.batch(step, 4, 0)
        loss = next_token_loss(forward(model, batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        for p in model.parameters():
            p.grad *= min(1, 0.3 / norms[-1])
        optimizer.step()
    train(c)
    assert min(norms) > 0.3 and [line["grad_norm"] for line in read_log(c.out)] == pytest.approx(
        norms, rel=1e-4
    )
    assert losses(c.out)[-1] == pytest.approx(loss.item(), rel=1e-5)
    for name, t in final_weights(c.out).items():
        assert torch.allclose(t, model.get_parameter(name), atol=1e-4), name


def test_rows_of_the_world(config, monkeypatch):
    '`data = "world"`: rows made up on the fly, with the packaged tokenizer; the held-out ones by another seed.'
    asked = set()

    class Rows(WorldRows):
        def batch(self, step, batch_size, seed):
            asked.add((seed, self.course is STORIES, self.answer))
            return super().batch(step, batch_size, seed)

    monkeypatch.setattr(training, "WorldRows", Rows)
    final = train(
        replace(config, data="world", eval_every=6, seq_len=128, max_position_embeddings=128)
    )
    assert (
        asked == {(0, False, ANSWER), (training.HELD_OUT_SEED, True, 1.0)}
        and len(Tokenizer.from_pretrained(final)) <= Qwen.from_pretrained(final).config.vocab_size
    )
    assert (final / "tokenizer_config.json").read_bytes() == (
        training.packaged_model() / "tokenizer_config.json"
    ).read_bytes()


def test_parts_with_few_labels(config):
    "Exact also where the parts have different numbers of labels."
    runs = [Run(replace(config, accumulate=n, clip=0.0), OneProcess("cpu")) for n in (1, 4)]
    for run in runs:
        batch = run.rows.batch

        def uneven(step, size, seed, batch=batch):
            found = batch(step, size, seed)
            found["labels"][found["input_ids"][:, 0] % 2 == 0, 3:] = IGNORED
            return found

        run.rows = types.SimpleNamespace(batch=uneven)
        training.optimizer_step(run)
    counts = [label_weight(b) for b in runs[1].batches(runs[1].rows, 0, 0)]
    assert len(set(counts)) > 1
    for a, b in zip(*(run.model.parameters() for run in runs)):
        assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm()


def test_ranks_share_the_rows(config):
    whole = Run(config, OneProcess("cpu"))
    for step in (0, 7):
        want, parts = whole.rows.batch(step, 4, 0), []
        for rank in (0, 1):
            engine = OneProcess("cpu")
            engine.rank, engine.world_size = rank, 2
            parts += Run(replace(config, accumulate=2), engine).batches(whole.rows, step, 0)
        assert len(parts) == 4 and all(
            torch.equal(torch.cat([p[k] for p in parts]), want[k]) for k in want
        )


def test_bfloat16(tmp_path, config):
    train(config)
    train(replace(config, out=str(tmp_path / "b"), dtype="bfloat16"))
    assert losses(config.out) != losses(tmp_path / "b") and losses(config.out) == pytest.approx(
        losses(tmp_path / "b"), rel=0.02
    )
    assert {t.dtype for t in final_weights(tmp_path / "b").values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_casts_a_norms_output_once(config, dtype):
    run = Run(replace(config, dtype=dtype), OneProcess("cpu"))
    norm, x = (
        run.model.model.layers[0].input_layernorm,
        torch.randn(1, 3, run.model.config.hidden_size),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        assert norm(x).dtype == getattr(torch, dtype)
    assert norm(x).dtype == torch.float32 and run.model.model.norm(x).dtype == torch.float32


@pytest.mark.parametrize("sibling", ["", "qwen1", "qwen2", "qwen3_moe", "qwen3_5"])
def test_casting_once_changes_no_loss(sibling):
    def loss(dtype, change=lambda model: model):
        return Objective(
            change(Qwen.from_pretrained(packaged_model(sibling), dtype="float32").train()), dtype
        )(batch)

    batch = WorldRows(Tokenizer.from_pretrained(), 256).batch(3000, 4)
    with torch.no_grad():
        assert loss("bfloat16") == loss("bfloat16", cast_once) != loss("float32")


# ---- the config


def test_config(tmp_path):
    (tmp_path / "a.json").write_text('{"steps": 7, "lr": 1, "checkpointing": true, "data": "d"}')
    c = read_config(tmp_path / "a.json", ["lr=3e-4", "seed = 5", "checkpointing=False", "out=a=b"])
    assert (c.steps, c.lr, c.data, c.seed, c.checkpointing, c.out) == (
        7,
        3e-4,
        "d",
        5,
        False,
        "a=b",
    ) and read_config() == TrainConfig()
    for text, match in {
        "[1]": "holds a list",
        '{"steps": 1.5}': "steps is 1.5; expected a whole number",
        '{"steps": true}': "expected a whole number",
        '{"stesp": 1}': "did you mean steps",
        '{"lr": "1e-3"}': "expected a number",
        "{": "is damaged",
        '{"dtype": "int8"}': "expected 'float32' or 'bfloat16'",
        '{"beta2": 1}': "below 1",
        '{"model": {"x": 1}}': "no setting 'model'",
        '{"num_hidden_layers": 0}': "at least 1",
        '{"lr": 0}': "above 0",
        '{"lr": NaN}': "at least 0",
        '{"seq_len": 600}': "max_position_embeddings",
    }.items():
        (tmp_path / "b.json").write_text(text)
        one_sentence(match, lambda: read_config(tmp_path / "b.json"))
    one_sentence("ends in .toml or .json", lambda: read_config(tmp_path / "b.yaml"))
    one_sentence("no config", lambda: read_config(tmp_path / "none.toml"), FileNotFoundError)
    for text in ("steps", "steps=x", "checkpointing=1", "nothing=1"):
        one_sentence("config|no setting", lambda: read_config(None, [text]))


def test_toml(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text('steps = 7\nlr = 5e-4\nout = "x"  # here\n')
    assert read_config(tmp_path / "a.toml") == TrainConfig(steps=7, lr=5e-4, out="x")
    (tmp_path / "b.toml").write_text("steps = ")
    one_sentence("is damaged", lambda: read_config(tmp_path / "b.toml"))
    monkeypatch.setitem(sys.modules, "tomllib", None)  # as in Python 3.10
    monkeypatch.setitem(
        sys.modules, "tomli", types.SimpleNamespace(loads=lambda text: dict(steps=len(text)))
    )
    assert read_config(tmp_path / "a.toml") == TrainConfig(
        steps=len((tmp_path / "a.toml").read_text())
    )


# ---- folders


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


def test_go_on_from_a_model(tmp_path, config):
    first = train(config)
    second = replace(
        config,
        out=str(tmp_path / "b"),
        init_from=str(first),
        lr=1e-9,
        weight_decay=0.0,
        **{k: getattr(TrainConfig(), k) for k in SMALL},
    )
    train(second)
    before, after = (
        Qwen.from_pretrained(first, torch.float32),
        Qwen.from_pretrained(checkpoints(second.out)[-1]),
    )
    assert before.config == after.config and all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(before.parameters(), after.parameters())
    )
    one_sentence(
        "hidden_size is 48, but init_from",
        lambda: train(replace(second, out=str(tmp_path / "c"), hidden_size=48)),
    )
    one_sentence(
        "knows 128 positions", lambda: train(replace(second, out=str(tmp_path / "d"), seq_len=200))
    )
    other = tmp_path / "other"
    write_shards(
        other, data.world_stories(40, seed=9), Tokenizer.train(data.world_stories(40, seed=9), 320)
    )
    one_sentence(
        "another tokenizer",
        lambda: train(replace(second, out=str(tmp_path / "e"), data=str(other))),
    )


# ---- resuming


def stop_at(step):
    def watch(lines):
        if lines[-1]["step"] == step:
            raise KeyboardInterrupt

    return watch


def test_a_resumed_run_is_the_run(tmp_path, config):
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    for step in (1, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            train(config, on_log=stop_at(step))
    assert train(config) == tmp_path / "out/final"
    assert losses(config.out) == losses(whole.out) and [
        line["step"] for line in read_log(config.out)
    ] == [1, 2, 3, 4, 5, 6]
    a, b = (load_checkpoint(checkpoints(c.out)[-1]) for c in (config, whole))
    assert (
        same(a["weights"], b["weights"])
        and same(a["moments"], b["moments"])
        and len(a["moments"]) == 2 * len(a["weights"])
    )
    assert read_folder(tmp_path / "out/final") == read_folder(tmp_path / "whole/final")
    train(config)  # a finished run
    assert losses(config.out) == losses(whole.out)


def test_only_the_last_are_kept(config):
    train(replace(config, keep=2))
    assert [p.name for p in checkpoints(config.out)] == ["step-000004", "step-000006"]


def test_damaged_checkpoints_are_skipped(tmp_path, config):
    train(config)
    (*_, before, last), notes = checkpoints(config.out), []
    for file in sorted(p.name for p in last.iterdir()):
        good = (last / file).read_bytes()
        for bad in (good[:-3], good[:9] + bytes([good[9] ^ 4]) + good[10:], b"", None):
            (last / file).unlink() if bad is None else (last / file).write_bytes(bad)
            one_sentence("is damaged", lambda: load_checkpoint(last))
            notes.clear()
            assert (
                latest_checkpoint(config.out, notes.append) == before
                and len(notes) == 1
                and "step-000006 is damaged" in notes[0]
            )
            (last / file).write_bytes(good)
        assert latest_checkpoint(config.out, notes.append) == last
    whole = final_weights(config.out)
    (last / "optimizer.safetensors").write_bytes(b"")
    train(config)
    assert same(final_weights(config.out), whole)
    for bad in (b"[]", b"5", b'["model.safetensors"]'):
        (checkpoints(config.out)[-1] / "checksums.json").write_bytes(bad)
        one_sentence("is damaged", lambda: load_checkpoint(checkpoints(config.out)[-1]))
    for p in checkpoints(config.out):
        (p / "training.json").unlink()
    one_sentence("every checkpoint in .* is damaged", lambda: train(config))


def test_a_resume_keeps_the_checkpoint_it_goes_on_from(config):
    "Damaged ones after it do not count as kept."
    train(config)
    *_, before, last = checkpoints(config.out)
    (last / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, keep=1), on_log=stop)
    assert latest_checkpoint(config.out, lambda note: None) == before
    train(replace(config, keep=1))
    assert [p.name for p in checkpoints(config.out)] == [last.name] and load_checkpoint(last)


def stop(*args):
    raise KeyboardInterrupt


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


def test_a_finished_run_is_left_alone(config):
    final = train(config)
    (final / "notes.txt").write_text("mine")
    assert train(config) == final and (final / "notes.txt").read_text() == "mine"
    (final / "model.safetensors").write_bytes(b"")
    (final / "notes.txt").unlink()
    assert train(config) == final and read_folder(final)  # mended


def test_a_damaged_log(config):
    train(config)
    path = Path(config.out) / "log.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        good[0]
        + b"?"
        + good[1]
        + b"5\n\xff\xfe\n"
        + b'{"step": "x", "loss": 1}\n'
        + b"".join(good[2:])
        + b'{"step": 7, "lo'
    )
    assert [line["step"] for line in read_log(config.out)] == [1, 3, 4, 5, 6]
    train(config)
    assert [line["step"] for line in read_log(config.out)] == [1, 3, 4, 5, 6]
    path.unlink()
    train(config)
    assert read_log(config.out) == []


def test_adapters_are_not_saved_as_a_model(tmp_path):
    from qwen_nb.lora import add_lora, merge_lora

    save_pretrained(small(), tmp_path / "a")
    before = (tmp_path / "a/model.safetensors").read_bytes()
    for model in (add_lora(small(), 2), merge_lora(add_lora(small(), 2))):
        one_sentence("has LoRA adapters", lambda: save_pretrained(model, tmp_path / "a"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that only one process gets")
def test_asked_to_stop_it_saves_the_step(tmp_path, config):
    "SIGINT and SIGTERM; and the run goes on to the losses of one that was not stopped."
    import signal

    whole = train(replace(config, out=str(tmp_path / "whole")))
    for name in ("SIGINT", "SIGTERM"):
        c, before = (
            replace(config, out=str(tmp_path / name), save_every=1000),
            signal.getsignal(getattr(signal, name)),
        )

        def ask(lines):
            if lines[-1]["step"] == 3:
                os.kill(os.getpid(), getattr(signal, name))

        with pytest.raises(KeyboardInterrupt):
            train(c, on_log=ask)
        assert [p.name for p in checkpoints(c.out)][-1] == "step-000003" and signal.getsignal(
            getattr(signal, name)
        ) == before
        train(c)
        assert losses(c.out) == losses(whole.parent)
    c = replace(config, out=str(tmp_path / "twice"), save_every=1000)

    def ask_twice(lines):
        for _ in range(2 * (lines[-1]["step"] == 3)):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(c, on_log=ask_twice)
    assert [p.name for p in checkpoints(c.out)] == ["step-000000"]  # at once


def test_another_config(tmp_path, config, shards, tokenizer):
    train(config)
    for change, match in [
        (dict(lr=1e-4), "lr was 0.003 and is now 0.0001"),
        (dict(steps=9), "steps was 6 and is now 9"),
        (dict(seed=3, clip=2.0), "clip was 1.0 and is now 2.0; seed was 0"),
    ]:
        assert "init_from=" in one_sentence(match, lambda: train(replace(config, **change)))
    one_sentence("hidden_size was 32 and is now 64", lambda: train(replace(config, hidden_size=64)))
    before = final_weights(config.out)
    write_shards(tmp_path / "moved", data.world_stories(60, seed=3), tokenizer)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    train(
        replace(
            config,
            out=str(tmp_path / "elsewhere"),
            data=str(tmp_path / "moved"),
            accumulate=2,
            save_every=1,
            keep=1,
            eval_every=2,
            checkpointing=True,
        )
    )
    assert same(final_weights(tmp_path / "elsewhere"), before)
    write_shards(tmp_path / "moved", data.world_stories(61, seed=3), tokenizer)
    one_sentence(
        "are others than those it was trained on",
        lambda: train(
            replace(config, out=str(tmp_path / "elsewhere"), data=str(tmp_path / "moved"))
        ),
    )


@pytest.mark.parametrize(
    "kind, sibling",
    [
        ("init_from", ""),
        ("init_from", "qwen1"),
        ("init_from", "qwen3_moe"),
        ("init_from", "qwen3_5"),
        ("config_from", "qwen2"),
    ],
)
def test_a_run_needs_its_beginning_only_to_begin(tmp_path, config, kind, sibling):
    "The folder that it went on from is gone: the checkpoints have all that a resume needs."
    begin = tmp_path / "begin"
    shutil.copytree(packaged_model(sibling) if sibling else packaged_model(), begin)
    run = replace(
        config,
        data="world",
        seq_len=128,
        batch_size=2,
        steps=4,
        keep=2,
        **{kind: str(begin)},
        **{k: getattr(TrainConfig(), k) for k in SMALL},
    )
    whole = replace(run, out=str(tmp_path / "whole"))
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(run, on_log=stop_at(3))
    shutil.rmtree(begin)
    final = train(run)
    assert losses(run.out) == losses(whole.out) and same(
        final_weights(run.out), final_weights(whole.out)
    )
    assert read_folder(final) == read_folder(Path(whole.out) / "final")
    with pytest.raises(FileNotFoundError, match="begin"):
        train(replace(run, out=str(tmp_path / "new")))


def test_another_tokenizer_in_the_same_place(tmp_path, config, shards, tokenizer):
    "While a run goes on, the tokenizer's files are exchanged: what it saves has the one it was trained with."
    copied = tmp_path / "data"
    shutil.copytree(shards, copied)
    run, other = (
        replace(config, data=str(copied)),
        Tokenizer.train(data.world_stories(40, seed=9), 320),
    )

    def exchange(lines):
        for file in copied.glob("**/tokenizer.json"):
            file.write_bytes(training.to_json(training.tokenizer_json(other.vocabulary)))

    final = train(run, on_log=exchange)
    assert (
        Tokenizer.from_pretrained(final).vocabulary
        == tokenizer.vocabulary
        != other.vocabulary
        == Tokenizer.from_pretrained(next(copied.glob("**/tokenizer.json")).parent).vocabulary
    )


def test_a_resume_with_another_tokenizer(tmp_path, config):
    "The rows of the made-up world would be others."
    begin = tmp_path / "begin"
    shutil.copytree(packaged_model(), begin)
    run = replace(
        config,
        data="world",
        seq_len=128,
        batch_size=2,
        steps=4,
        init_from=str(begin),
        **{k: getattr(TrainConfig(), k) for k in SMALL},
    )
    with pytest.raises(KeyboardInterrupt):
        train(run, on_log=stop_at(3))
    for name, content in training.tokenizer_files(
        Tokenizer.train(data.world_stories(40, seed=9), 320)
    )[0].items():
        (begin / name).write_bytes(content)
    one_sentence("the tokenizer is another than the one it was trained with", lambda: train(run))


DRIVER = """
import json, os, random, sys, time
import torch
torch.set_num_threads(1)
os.fsync = lambda fd: None  # slow, and what the system has been given survives kill -9 without it
from qwen_nb.train import TrainConfig, checkpoints, load_checkpoint, read_log, train
config, folder = json.loads(sys.argv[1]), sys.argv[2]
sys.path.insert(0, sys.argv[3])
from kill import killed

def run(out, at=None, after=None): return killed(lambda: train(TrainConfig(**config | dict(out=out))), out, at, after)

def result(out):
    last = load_checkpoint(checkpoints(out)[-1])
    tensors = {**last["weights"], **last["moments"]}
    names = sorted(os.listdir(out))
    return [line["loss"] for line in read_log(out)], {k: t.numpy().tobytes() for k, t in tensors.items()}, names, open(out + "/final/checksums.json").read()

train(TrainConfig(**config | dict(out=folder + "/first")))  # so that what torch imports late is there before the forks
"""


def drive(config, folder, body, timeout=500):
    code = textwrap.dedent(DRIVER) + textwrap.dedent(body)
    env = os.environ | dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            json.dumps(asdict(config)),
            str(folder),
            str(Path(__file__).parent),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kill_9_before_every_file_operation(tmp_path, config):
    "Killed before each single operation on a file, then resumed: every loss, weight and moment is that of the run never stopped, and nothing else lies about."
    out = drive(
        replace(config, steps=2, keep=1),
        tmp_path,
        """
        run(folder + "/whole")
        want, at = result(folder + "/whole"), 1
        while run(out := f"{folder}/{at}", at):
            run(out)
            assert result(out) == want, at
            at += 1
        print("operations", at)
        """,
    )
    assert int(out.split()[-1]) > 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kill_9_at_random_moments(tmp_path, config):
    "One run, killed again and again until it is done."
    out = drive(
        replace(config, steps=30, keep=2),
        tmp_path,
        """
        start = time.time()
        run(folder + "/whole")
        took, rng, kills = time.time() - start, random.Random(0), 0
        for n in range(2):
            while run(f"{folder}/{n}", after=took * rng.uniform(0.05, 0.4)) and kills < 100: kills += 1
            run(f"{folder}/{n}")
            assert result(f"{folder}/{n}") == result(folder + "/whole"), n
        print("kills", kills)
        """,
    )
    assert int(out.split()[-1]) > 4


# ---- faults


def test_a_full_disk_loses_nothing(tmp_path, config, monkeypatch):
    whole, real, calls = replace(config, out=str(tmp_path / "whole")), os.fsync, [0]
    train(whole)
    for fail_at in (1, 3, 12, 20, 9, 11):
        calls[0] = 0

        def fsync(fd):
            calls[0] += 1
            if calls[0] >= fail_at:
                raise OSError(28, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        before = checkpoints(config.out)
        one_sentence("No space left", lambda: train(config), OSError)
        monkeypatch.setattr(os, "fsync", real)
        assert set(before) <= set(checkpoints(config.out)) and not list(
            (tmp_path / "out").glob("*.new.tmp")
        )
        for p in checkpoints(config.out):
            load_checkpoint(p)
    train(config)
    assert losses(config.out) == losses(whole.out) and same(
        final_weights(config.out), final_weights(whole.out)
    )


def test_nan_stops_the_run(config, monkeypatch):
    real = training.next_token_loss, training.forward

    def broken(model, batch):
        return real[1](model, batch) * (math.nan if model.training and broken.calls >= 3 else 1.0)

    broken.calls = 0

    def count(lines):
        broken.calls = lines[-1]["step"]

    monkeypatch.setattr(training, "forward", broken)
    message = one_sentence(
        "step 4: the loss is nan", lambda: train(config, on_log=count), FloatingPointError
    )
    assert "step-000002 is safe" in message and "lower lr (it is 0.003)" in message
    assert all(
        t.isfinite().all()
        for t in load_checkpoint(latest_checkpoint(config.out))["weights"].values()
    )
    monkeypatch.setattr(training, "forward", real[1])
    train(config)
    assert len(losses(config.out)) == 6


def test_a_broken_weight_is_never_saved(config, monkeypatch):
    real = training.optimizer_step

    def step(run):
        line = real(run)
        if run.step == 4:
            run.model.model.norm.weight.data[0] = math.inf
        return line

    monkeypatch.setattr(training, "optimizer_step", step)
    one_sentence("a weight is not a number", lambda: train(config), FloatingPointError)
    assert latest_checkpoint(config.out).name == "step-000002"


def test_what_does_not_fit(tmp_path, config, shards):
    one_sentence(
        "vocabulary of .* the model only 100 rows", lambda: train(replace(config, vocab_size=100))
    )
    one_sentence("need a multiple of 3", lambda: train(replace(config, accumulate=3)))
    one_sentence(
        "use a shorter seq_len or more text",
        lambda: train(replace(config, seq_len=100_000, max_position_embeddings=100_000)),
    )
    one_sentence(
        "no prepared data",
        lambda: train(replace(config, data=str(tmp_path / "none"))),
        FileNotFoundError,
    )
    assert not checkpoints(config.out)
    bad = tmp_path / "bad"
    write_shards(bad, data.world_stories(60, seed=3), Shards(shards).tokenizer())
    file = next(bad.glob("train-0*.bin"))
    file.write_bytes(b"\0" * file.stat().st_size)
    one_sentence("is corrupted", lambda: train(replace(config, data=str(bad))))


def test_whose_folder(tmp_path, config):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    one_sentence(
        "no run of ours .thesis.txt", lambda: train(replace(config, out=str(tmp_path / "mine")))
    )
    one_sentence("is a file", lambda: train(replace(config, out=str(tmp_path / "file"))))
    assert (tmp_path / "mine/thesis.txt").read_text() == "x" and train(
        replace(config, out=str(tmp_path / "empty"))
    ).is_dir()


@pytest.mark.skipif(os.name == "nt", reason="no such lock there")
def test_one_process_in_a_folder(config):
    lock = training.claim(config.out)
    code = "import json, sys; from qwen_nb.train import TrainConfig, train; train(TrainConfig(**json.loads(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(config))], capture_output=True, text=True
    )
    assert (
        done.returncode
        and "ValueError: another process is training in" in done.stderr.splitlines()[-1]
    )
    lock.close()
    train(config)


# ---- watching


def test_the_log(config, monkeypatch):
    seen, board = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            board.append((os.path.basename(folder), purge_step))

        def add_scalar(self, name, value, step):
            board.append((name, step))

        def add_text(self, name, value, step):
            board.append((name, step))

        def close(self):
            board.append("closed")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer)
    )
    train(
        replace(config, eval_every=3, sample=5, log_every=2),
        on_log=lambda lines: seen.append(len(lines)),
    )
    log = read_log(config.out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 6] and seen == [1, 2, 3, 4, 5]
    assert (
        [line["step"] for line in log if "held_out" in line]
        == [1, 3, 6]
        == [line["step"] for line in log if "sample" in line]
    )
    assert all(
        line["tokens_per_second"] > 0
        and line["peak_share"] > 0
        and math.isfinite(line["grad_norm"])
        for line in log
    )
    assert (
        board[0] == ("tensorboard", 0)
        and board[-1] == "closed"
        and {("loss", 4), ("sample", 3), ("held_out", 6), ("lr", 1)} <= set(board)
    )
    with open(os.path.join(config.out, "log.jsonl"), "a") as f:
        f.write('{"step": 7, "lo')
    assert read_log(config.out) == log
    training.cut_log(config.out, 3)
    assert [line["step"] for line in read_log(config.out)] == [1, 2, 3]


def test_without_tensorboard(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(config)
    assert len(losses(config.out)) == 6


def test_held_out_loss_is_that_of_the_large_batch(config):
    a, b = (Run(replace(config, accumulate=n), OneProcess("cpu")) for n in (1, 4))
    assert a.held_out_loss() == pytest.approx(b.held_out_loss(), rel=1e-6)
    batch = a.held_out.batch(0, 8, training.HELD_OUT_SEED)
    assert a.held_out_loss() == pytest.approx(
        next_token_loss(forward(a.model, batch), batch["labels"]).item(), rel=1e-6
    )


def test_pictures(tmp_path, config, tokenizer, monkeypatch):
    import IPython.display
    import matplotlib.pyplot as plt

    cleared = []
    monkeypatch.setattr(IPython.display, "clear_output", lambda wait: cleared.append(wait))
    monkeypatch.setattr(plt, "show", lambda: cleared.append(len(plt.gcf().axes)))
    train(replace(config, eval_every=2), on_log=training.live_plot(floor=0.5))
    assert cleared == [True, 5] * 6
    training.plot_log(config.out, speed=False)
    assert len(plt.gcf().axes) == 3 and len(plt.gcf().axes[0].lines[0].get_xdata()) == 6
    plt.close("all")
    maps = training.attention_map(small(), torch.tensor([tokenizer.encode("Max has the ball.")]))
    assert (
        maps.shape[:2] == (2, 4)
        and torch.allclose(maps.sum(-1), torch.ones(maps.shape[:-1]))
        and not maps.triu(1).any()
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
    assert training.world_floor(tokenizer, 20, 5) == pytest.approx(nats / tokens)


def test_speed():
    c = QwenConfig(100, 32, 64, 3, 4, 2, 8)
    with FlopCounterMode(display=False) as counter:
        model = init_weights(Qwen(c))
        batch = dict(
            input_ids=torch.zeros(1, 40, dtype=torch.long),
            position_ids=torch.arange(40)[None],
            document_ids=torch.zeros(1, 40, dtype=torch.long),
        )
        forward(model, batch)
    matrices = sum(
        v
        for name, v in counter.get_flop_counts()["Global"].items()
        if name.__name__.startswith(("mm", "addmm"))
    )
    attention = 3 * 4 * 4 * 8 * 40 * 40 // 2  # what a causal mask leaves of scores and mix
    assert training.flops_per_token(c, 40) * 40 == 3 * (matrices + attention)
    assert 1e8 < training.measure_peak("cpu", "float32", 256) < 1e14
    times = iter([0, 5, 10, 12, 20, 29])  # three products; the best took 2
    assert (
        training.measure_peak("cpu", size=8, repeats=2, clock=lambda: next(times)) == 2 * 8**3 / 2
    )
