"""The whole loop: it survives kill -9, full disks, Ctrl-C and NaN."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from runs import SMALL, final_weights, losses, one_sentence, same, small

from qwen_nb import budget as budget_module
from qwen_nb import data
from qwen_nb import log as log_module
from qwen_nb import run as run_module
from qwen_nb import train as train_module
from qwen_nb.durable import checkpoints, load_checkpoint, read_folder
from qwen_nb.inspect import packaged_model
from qwen_nb.log import read_log
from qwen_nb.prompt import encode_chat
from qwen_nb.resume import OneProcess, Run, latest_checkpoint
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig
from qwen_nb.shards import Shards, write_shards
from qwen_nb.tokenizer import Tokenizer

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def listens():
    "SIGINT as in a terminal: a background job (`nohup make test &`) begins with it ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


DRIVER = """
import json, os, random, sys, time
import torch
torch.set_num_threads(1)
os.fsync = lambda fd: None  # slow, and what the system has been given survives kill -9 without it
from qwen_nb.durable import checkpoints, load_checkpoint
from qwen_nb.log import read_log
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig
config, folder = json.loads(sys.argv[1]), sys.argv[2]
sys.path.insert(0, sys.argv[3])
from kill import killed

def run(out, at=None, after=None):
    return killed(lambda: train(TrainConfig(**config | dict(out=out))), out, at, after)

def result(out):
    last = load_checkpoint(checkpoints(out)[-1])
    tensors = {**last["weights"], **last["moments"]}
    found = {k: t.numpy().tobytes() for k, t in tensors.items()}
    sums = open(out + "/final/checksums.json").read()
    return [line["loss"] for line in read_log(out)], found, sorted(os.listdir(out)), sums

assert not torch.cuda.is_available(), "CUDA cannot be used after a fork"
# so that what torch imports late is there before the forks
train(TrainConfig(**config | dict(out=folder + "/first")))
"""


def drive(config, folder, body, timeout=500):
    "Run the body in a process of its own, which sees no GPU: it forks."
    code = textwrap.dedent(DRIVER) + textwrap.dedent(body)
    env = os.environ | dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1", CUDA_VISIBLE_DEVICES="")
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


@pytest.mark.parametrize(
    "change", [dict(accumulate=2), dict(accumulate=4), dict(checkpointing=True)]
)
def test_parts_equal_the_large_batch(tmp_path, config, change):
    train(config)
    train(replace(config, out=str(tmp_path / "b"), **change))
    assert losses(config.out) == pytest.approx(losses(tmp_path / "b"), rel=1e-6)
    a, b = final_weights(config.out), final_weights(tmp_path / "b")
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)


def test_a_finished_run_is_left_alone(config):
    final = train(config)
    (final / "notes.txt").write_text("mine")
    assert train(config) == final and (final / "notes.txt").read_text() == "mine"
    (final / "model.safetensors").write_bytes(b"")
    (final / "notes.txt").unlink()
    assert train(config) == final and read_folder(final)  # mended


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that only one process gets")
def test_asked_to_stop_it_saves_the_step(tmp_path, config, listens):
    "SIGINT and SIGTERM; and the run goes on to the losses of one that was not stopped."
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kill_9_before_every_file_operation(tmp_path, config):
    """Killed before each single operation on a file, then resumed: every loss, weight and moment is
    that of the run never stopped, and nothing else lies about."""
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
            out = f"{folder}/{n}"
            while kills < 100 and run(out, after=took * rng.uniform(0.05, 0.4)):
                kills += 1
            run(out)
            assert result(out) == result(folder + "/whole"), n
        print("kills", kills)
        """,
    )
    assert int(out.split()[-1]) > 4


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
    real = budget_module.forward

    def broken(model, batch):
        return real(model, batch) * (math.nan if model.training and broken.calls >= 3 else 1.0)

    broken.calls = 0

    def count(lines):
        broken.calls = lines[-1]["step"]

    monkeypatch.setattr(budget_module, "forward", broken)
    message = one_sentence(
        "step 4: the loss is nan", lambda: train(config, on_log=count), FloatingPointError
    )
    assert "step-000002 is safe" in message and "lower lr (it is 0.003)" in message
    assert all(
        t.isfinite().all()
        for t in load_checkpoint(latest_checkpoint(config.out))["weights"].values()
    )
    monkeypatch.setattr(budget_module, "forward", real)
    train(config)
    assert len(losses(config.out)) == 6


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


def test_pictures(tmp_path, config, tokenizer, monkeypatch):
    import IPython.display
    import matplotlib.pyplot as plt

    cleared = []
    monkeypatch.setattr(IPython.display, "clear_output", lambda wait: cleared.append(wait))
    monkeypatch.setattr(plt, "show", lambda: cleared.append(len(plt.gcf().axes)))
    train(replace(config, eval_every=2), on_log=run_module.live_plot(floor=0.5))
    assert cleared == [True, 5] * 6
    run_module.plot_log(config.out, speed=False)
    assert len(plt.gcf().axes) == 3 and len(plt.gcf().axes[0].lines[0].get_xdata()) == 6
    plt.close("all")
    ids = torch.tensor([tokenizer.encode("Max has the ball.")])
    maps = train_module.attention_map(small(), ids)
    assert (
        maps.shape[:2] == (2, 4)
        and torch.allclose(maps.sum(-1), torch.ones(maps.shape[:-1]))
        and not maps.triu(1).any()
    )


def test_a_background_job_goes_on(tmp_path, config):
    "Who starts with SIGINT ignored is not stopped by it."
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with run_module.stop_politely(True) as asked:
            os.kill(os.getpid(), signal.SIGINT)
        assert not asked and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ---- what a run says


WORLD = dict(data="world", seq_len=128, max_position_embeddings=128, eval_every=2, sample=12)


def test_an_evaluation_says_all(config):
    "Floor, lesson, why the held-out loss need not fall yet, one question and whether it is right."
    c = replace(config, **WORLD, lesson_rows=12, steps=6)  # 12 rows: 3 steps of 4
    assert log_module.lesson_steps(c) == 3
    train(c)
    lines = {line["step"]: line for line in read_log(c.out)}
    assert [step for step in lines if "sample" in lines[step]] == [1, 2, 4, 6]
    floor = train_module.world_floor(Tokenizer.from_pretrained(), longest=129)
    for step in (1, 2, 4, 6):
        line = lines[step]
        assert line["floor"] == floor and type(line["right"]) is bool
        assert ("lists" in line["lesson"]) == (step <= 3) == ("why" in line)
        assert ("stories" in line["lesson"]) == (step > 3)
        question, verdict = line["sample"].rsplit(" (", 1)
        expected = "right" if line["right"] else "wrong"
        assert "?" in question and verdict.startswith(expected)
        text = log_module.line_text(line)
        parts = ["held-out", f"floor {floor:.3f}", "lr ", "tokens/s"]
        parts += [line["lesson"], line["sample"]]
        assert all(part in text for part in parts) and "\n" not in text
    assert "begin after step 3" in lines[1]["why"]
    first = {line["sample"].partition("?")[0] for line in lines.values() if "sample" in line}
    assert len(first) == 1  # always the same question
    assert not {"floor", "lesson", "why", "sample"} & lines[3].keys()


def test_the_packaged_model_answers(config):
    "It knows where everything is, so the verdict is right; asked the same as what the text says."
    c = replace(config, **WORLD, init_from=str(packaged_model()), lr=1e-9, lesson_rows=0, steps=1)
    c = replace(c, **{k: getattr(TrainConfig(), k) for k in SMALL})
    train(c)
    (line,) = read_log(c.out)
    assert line["right"] and line["sample"].endswith("(right)") and "why" not in line
    assert line["held_out"] < 1.2 * line["floor"]


def test_text_without_questions_is_continued(tmp_path, config):
    texts = ["One two three four five six seven. " * 20] * 3 + ["Seven six five four. " * 30] * 3
    write_shards(tmp_path / "plain", texts, Tokenizer.train(texts, 300), held_out=0.4)
    c = replace(config, data=str(tmp_path / "plain"), eval_every=6, sample=5)
    train(c)
    line = read_log(c.out)[-1]
    assert " → " in line["sample"] and "right" not in line and "floor" not in line
    assert "lesson" not in line and "why" not in line


def test_a_conversation_is_asked(config, monkeypatch):
    "Of shards with conversations the question is the user's, the answer the model's turn."
    run = Run(config, OneProcess("cpu"))
    talk = [
        dict(role="user", content="Who has the key?"),
        dict(role="assistant", content="Max\nand Ben."),
    ]
    ids = encode_chat(run.tokenizer, talk, "qwen2.5", add_generation_prompt=False)
    batch = dict(
        input_ids=torch.tensor([ids]), document_ids=torch.zeros(1, len(ids), dtype=torch.long)
    )
    run.held_out = types.SimpleNamespace(batch=lambda *args: batch)
    prompt, question, answer = run_module.choose_question(run)
    assert (question, answer) == ("Who has the key?", "Max\nand Ben.")
    assert run.tokenizer.decode(prompt).endswith("assistant\n")
    run.config.sample = 30
    for says, right in (("Max\nand Ben.<|im_end|>\n", True), ("Max<|im_end|>", False)):
        tail = torch.tensor([prompt + run.tokenizer.encode(says, allow_special=True)])
        monkeypatch.setattr(run_module, "generate", lambda *args, **kw: tail)
        found = run_module.write_sample(run)
        assert found["right"] == right and ("wrong" in found["sample"]) != right


def test_a_run_shorter_than_its_lessons_says_so_first(config, capsys):
    c = replace(config, **WORLD, lesson_rows=1000, steps=2)
    seen = []
    train(c, on_log=lambda lines: seen.append(capsys.readouterr().out))
    assert "ends inside its lessons: stories begin after step 250" in seen[0] and not seen[1]
    train(c)  # it is done, so there is nothing to warn of
    assert "lessons" not in capsys.readouterr().out
    train(replace(c, out=c.out + "2", lesson_rows=4))
    assert "lessons" not in capsys.readouterr().out


def test_the_bar(config, capfd, monkeypatch):
    "Loss, floor, learning rate and speed."
    monkeypatch.delenv("TQDM_DISABLE")
    train(replace(config, **WORLD, lesson_rows=0, steps=2))
    err = capfd.readouterr().err
    assert re.search(r"loss \d\.\d{3}, floor 0\.\d{3}, lr \d\.\de-\d\d, [\d,]+ tokens/s", err), err
