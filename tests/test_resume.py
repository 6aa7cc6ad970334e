"""Runs that are stopped and taken up: bit for bit the run that was never stopped."""

import json
import math
import os
import shutil
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from runs import SMALL, final_weights, losses, one_sentence, same, stop, stop_at

from qwen_nb import data
from qwen_nb import durable as durable_module
from qwen_nb import resume as resume_module
from qwen_nb import run as run_module
from qwen_nb.budget import label_weight
from qwen_nb.durable import checkpoints, load_checkpoint, read_folder
from qwen_nb.inspect import packaged_model
from qwen_nb.log import read_log
from qwen_nb.model import Qwen
from qwen_nb.resume import OneProcess, Run, latest_checkpoint
from qwen_nb.rows import IGNORED
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig
from qwen_nb.shards import write_shards
from qwen_nb.tokenizer import Tokenizer, tokenizer_json
from qwen_nb.train import forward, learning_rate, next_token_loss

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")


def test_the_run_is_the_ten_lines(config):
    """AdamW with groups, warm-up and cosine, clipping to a length that matters: a plain loop gives
    the same weights."""
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
        resume_module.optimizer_step(run)
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
    """While a run goes on, the tokenizer's files are exchanged: what it saves has the one it was
    trained with."""
    copied = tmp_path / "data"
    shutil.copytree(shards, copied)
    run, other = (
        replace(config, data=str(copied)),
        Tokenizer.train(data.world_stories(40, seed=9), 320),
    )

    def exchange(lines):
        for file in copied.glob("**/tokenizer.json"):
            file.write_bytes(durable_module.json_bytes(tokenizer_json(other.vocabulary)))

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
    for name, content in durable_module.tokenizer_files(
        Tokenizer.train(data.world_stories(40, seed=9), 320)
    )[0].items():
        (begin / name).write_bytes(content)
    one_sentence("the tokenizer is another than the one it was trained with", lambda: train(run))


def test_a_broken_weight_is_never_saved(config, monkeypatch):
    real = resume_module.optimizer_step

    def step(run):
        line = real(run)
        if run.step == 4:
            run.model.model.norm.weight.data[0] = math.inf
        return line

    monkeypatch.setattr(run_module, "optimizer_step", step)
    one_sentence("a weight is not a number", lambda: train(config), FloatingPointError)
    assert latest_checkpoint(config.out).name == "step-000002"


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
    lock = resume_module.claim(config.out)
    code = """
import json, sys
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig
train(TrainConfig(**json.loads(sys.argv[1])))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(config))], capture_output=True, text=True
    )
    assert (
        done.returncode
        and "ValueError: another process is training in" in done.stderr.splitlines()[-1]
    )
    lock.close()
    train(config)


def test_held_out_loss_is_that_of_the_large_batch(config):
    a, b = (Run(replace(config, accumulate=n), OneProcess("cpu")) for n in (1, 4))
    assert a.held_out_loss() == pytest.approx(b.held_out_loss(), rel=1e-6)
    batch = a.held_out.batch(0, 8, resume_module.HELD_OUT_SEED)
    assert a.held_out_loss() == pytest.approx(
        next_token_loss(forward(a.model, batch), batch["labels"]).item(), rel=1e-6
    )


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
