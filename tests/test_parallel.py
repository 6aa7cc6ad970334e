"""Many processes: DDP and FSDP give the losses of one, their checkpoints are one ordinary folder,
and the death of one loses nothing that was saved."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from warm import CAN, Started

from qwen_nb import parallel
from qwen_nb.data import world_stories
from qwen_nb.durable import checkpoints, config_json, load_checkpoint
from qwen_nb.log import read_log
from qwen_nb.mixture import MoEConfig
from qwen_nb.model import Qwen
from qwen_nb.parallel import many
from qwen_nb.resume import latest_checkpoint
from qwen_nb.run import train
from qwen_nb.settings import MODEL_KEYS, TrainConfig
from qwen_nb.shards import write_shards
from qwen_nb.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name == "nt",
    reason="needs torch.distributed with gloo, and POSIX signals",
)
LOST = "another process of this run died or was stopped"

SCRIPT = """
import json, os, sys, time
from qwen_nb.parallel import DDP, FSDP, held, many
from qwen_nb.settings import TrainConfig
from qwen_nb.resume import Run, optimizer_step
from qwen_nb.run import train

def own_count(run):
    "The mistake: every process divides by its own number of labels."
    total = run.total
    # a loss is a float, a count is not
    run.total = lambda x: total(x) if isinstance(x, float) else x * run.engine.world_size
    return run

# the other is there first, and must not look for the dead one
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and os.environ["RANK"] == "1": time.sleep(2)
jobs, found = json.load(open(sys.argv[1])), {}
try:
    with many("ddp", jobs[-1][1]["out"]) as engine:
        for kind, settings in jobs:
            config = TrainConfig(**settings)
            if kind == "wrong":
                run = own_count(Run(config, engine))
                found["wrong"] = [optimizer_step(run)["grad_norm"] for _ in range(3)]
                continue
            this = dict(ddp=DDP, fsdp=FSDP)[kind](engine.device)
            open(f"{os.path.dirname(config.out)}/pid{this.rank}", "w").write(str(os.getpid()))
            train(config, this)
            run = Run(config, this)
            optimizer_step(run)
            found[config.out] = held(run)
        if len(sys.argv) > 2: json.dump(found, open(f"{sys.argv[2]}{engine.rank}.json", "w"))
except (ValueError, OSError, FloatingPointError) as e:
    print(f"stopped: {e}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that torchrun starts
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("data"), Tokenizer.from_pretrained()
    # documents of very different lengths in short rows: the processes have unequal numbers of
    # labels
    write_shards(
        folder / "shards",
        [text[:n] for n, text in zip([8, 300, 20, 900] * 60, world_stories(240, seed=5))],
        words,
    )
    return dict(
        data=str(folder / "shards"),
        steps=12,
        batch_size=12,
        seq_len=48,
        lr=3e-3,
        warmup=2,
        save_every=4,
        log_every=1,
        eval_every=6,
        sample=8,
        peak_tflops=1.0,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
    )


def start(tmp_path, jobs, n=2, options=(), found=(), warm=True):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "jobs.json").write_text(
        json.dumps([(kind, s | dict(out=str(out))) for kind, out, s in jobs])
    )
    words = ["--standalone", "--nproc-per-node", n, *options]
    words = [*words, tmp_path / "script.py", tmp_path / "jobs.json", *found]
    words = [str(word) for word in words]
    env = dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    if warm and CAN:
        return Started(words, env)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(started, code=0):
    text = started.communicate(timeout=300)[0]
    assert (started.returncode == 0) == (code == 0), text
    return text


@pytest.fixture(scope="module")
def runs(tmp_path_factory, settings):
    "All runs of two processes, and those of one to compare with."
    tmp = tmp_path_factory.mktemp("runs")
    variants = dict(
        plain={},
        parts=dict(accumulate=3),
        again=dict(checkpointing=True),
        half=dict(dtype="bfloat16"),
        free=dict(clip=0.0),
    )
    jobs = [
        (kind, tmp / f"{kind}-{name}", settings | v)
        for kind in ("ddp", "fsdp")
        for name, v in variants.items()
        if (kind, name) != ("ddp", "again")
    ]
    finish(start(tmp, [*jobs, ("wrong", tmp / "wrong", settings)], found=[tmp / "found"]))
    for name, v in dict(
        plain={},
        halves=dict(accumulate=2),
        half=dict(dtype="bfloat16"),
        free=dict(accumulate=2, clip=0.0),
    ).items():
        train(TrainConfig(**settings | v | dict(out=str(tmp / f"one-{name}"))))
    return tmp


def curve(out, what="loss"):
    return torch.tensor([line[what] for line in read_log(out) if what in line], dtype=torch.float64)


def apart(a, b, what="loss"):
    return ((curve(a, what) - curve(b, what)).abs() / curve(b, what)).max().item()


def weights(out):
    return load_checkpoint(checkpoints(out)[-1])["weights"]


@pytest.mark.parametrize(
    "name",
    ["ddp-plain", "fsdp-plain", "ddp-parts", "fsdp-parts", "fsdp-again", "ddp-free", "fsdp-free"],
)
def test_the_losses_of_one_process(runs, name):
    one = runs / ("one-free" if "free" in name else "one-plain")
    assert len(curve(runs / name)) == 12 and len(curve(runs / name, "held_out")) == 3
    assert (
        apart(runs / name, one) < 3e-6
        and apart(runs / name, one, "held_out") < 3e-6
        and apart(runs / name, one, "grad_norm") < 1e-5
    )
    assert [line.get("sample") for line in read_log(runs / name)] == [
        line.get("sample") for line in read_log(one)
    ]


def test_bit_for_bit_where_the_sums_are_the_same(runs):
    for what in ("loss", "held_out", "grad_norm"):
        assert torch.equal(curve(runs / "ddp-plain", what), curve(runs / "one-halves", what))
    a, b = weights(runs / "ddp-plain"), weights(runs / "one-halves")
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert torch.equal(curve(runs / "fsdp-free"), curve(runs / "ddp-free")) and torch.equal(
        curve(runs / "ddp-free"), curve(runs / "one-free")
    )  # not clipped: no norm, so no other sum


def test_experts_that_one_process_does_not_use(tmp_path, settings):
    """A mixture of more experts than a few rows choose: every process has a gradient of every
    weight all the same."""
    sizes = MoEConfig(
        512,
        32,
        48,
        2,
        2,
        1,
        16,
        64,
        1e4,
        num_experts=48,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        router_aux_loss_coef=0,
    )
    (tmp_path / "c.json").write_text(json.dumps(config_json(sizes)))
    mixture = {k: v for k, v in settings.items() if k not in MODEL_KEYS} | dict(
        config_from=str(tmp_path / "c.json"), batch_size=2, steps=6, lr=1e-6
    )  # a larger one lets rounding decide who is chosen
    finish(start(tmp_path, [(kind, tmp_path / kind, mixture) for kind in ("ddp", "fsdp")]))
    train(TrainConfig(**mixture | dict(out=str(tmp_path / "one"))))
    busy = {
        name: m.any().item()
        for name, m in load_checkpoint(checkpoints(tmp_path / "one")[1])["moments"].items()
        if "exp_avg." in name
    }
    assert not all(busy.values())
    for kind in ("ddp", "fsdp"):
        assert (
            len(curve(tmp_path / kind)) == 6
            and apart(tmp_path / kind, tmp_path / "one") < 3e-6
            and apart(tmp_path / kind, tmp_path / "one", "grad_norm") < 1e-5
        )


def test_bfloat16(runs):
    for kind in ("ddp", "fsdp"):
        assert (
            1e-7 < apart(runs / f"{kind}-half", runs / "one-plain") < 0.02
            and apart(runs / f"{kind}-half", runs / "one-half") < 0.005
        )


def test_the_mean_of_means_fails(runs):
    wrong, right = (
        json.loads((runs / "found0.json").read_text())["wrong"],
        curve(runs / "one-plain", "grad_norm"),
    )
    assert (
        max(abs(w - r) / r for w, r in zip(wrong, right)) > 1e-4
    )  # ten times what the right way is allowed


def test_what_is_held(runs):
    n = sum(p.numel() for p in Qwen.from_pretrained(runs / "one-plain/final").parameters())
    for rank in (0, 1):
        found = json.loads((runs / f"found{rank}.json").read_text())
        assert found[str(runs / "ddp-plain")] == dict(
            weights=4 * n, gradients=4 * n, optimizer=8 * n
        )
        assert found[str(runs / "fsdp-plain")] == dict(
            weights=2 * n, gradients=2 * n, optimizer=4 * n
        )


def test_one_folder_that_others_open(runs):
    from transformers import AutoModelForCausalLM

    last = latest_checkpoint(runs / "fsdp-plain")
    ours, theirs = (
        Qwen.from_pretrained(last),
        AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32),
    )
    saved, one = load_checkpoint(last)["weights"], weights(runs / "one-plain")
    assert all(
        torch.equal(p, saved[name]) and torch.equal(p, theirs.get_parameter(name))
        for name, p in ours.named_parameters()
    )
    assert saved.keys() == one.keys() and all(
        torch.allclose(saved[k], one[k], rtol=1e-3, atol=1e-4) for k in one
    )
    assert {p.name for p in (runs / "fsdp-plain/final").iterdir()} == {
        p.name for p in (runs / "one-plain/final").iterdir()
    }


def cut_back(source, out, step):
    "The run as it was after a step."
    shutil.copytree(
        source,
        out,
        ignore=lambda _, names: [
            n for n in names if n == "final" or n.startswith("step-") and int(n[5:]) > step
        ],
    )


def test_resume_and_change_the_engine(runs, settings, tmp_path):
    jobs = [
        (kind, tmp_path / f"{before}-{kind}", settings)
        for before in ("one", "ddp", "fsdp")
        for kind in ("ddp", "fsdp")
    ]
    for kind, out, _ in jobs:
        cut_back(runs / f"{out.name.split('-')[0]}-plain", out, 4)
    finish(start(tmp_path, jobs))
    for kind in ("ddp", "fsdp"):
        assert torch.equal(curve(tmp_path / f"{kind}-{kind}"), curve(runs / f"{kind}-plain"))
        cut_back(runs / f"{kind}-plain", tmp_path / f"{kind}-one", 8)
        train(TrainConfig(**settings | dict(out=str(tmp_path / f"{kind}-one"))))
    for out in [*(out for _, out, _ in jobs), tmp_path / "ddp-one", tmp_path / "fsdp-one"]:
        assert len(curve(out)) == 12 and apart(out, runs / "one-plain") < 3e-6, out.name


def test_three_processes_that_do_not_divide_the_matrices(runs, settings, tmp_path):
    finish(
        start(tmp_path, [("fsdp", tmp_path / "three", settings)], n=3, found=[tmp_path / "found"])
    )
    assert apart(tmp_path / "three", runs / "one-plain") < 3e-6
    parts = [
        json.loads((tmp_path / f"found{r}.json").read_text())[str(tmp_path / "three")]["weights"]
        for r in range(3)
    ]
    assert sum(parts) == 4 * sum(
        p.numel() for p in Qwen.from_pretrained(tmp_path / "three/final").parameters()
    )


# ---- faults


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_that_dies(runs, settings, tmp_path, kind):
    """Kill -9 of either process at random moments: the other stops with a sentence, the checkpoints
    are whole, the run comes out bit for bit."""
    out, rng, said = tmp_path / "run", random.Random(kind), 0
    slow = settings | dict(steps=12, save_every=2)
    for life in range(2):
        for pid in tmp_path.glob("pid*"):
            pid.unlink()
        started = start(tmp_path, [(kind, out, slow)])
        victim = tmp_path / f"pid{life}"
        while started.poll() is None and not (
            victim.is_file() and victim.read_text() and checkpoints(out)
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        before = checkpoints(out)
        try:
            os.kill(int(victim.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was faster
        text = started.communicate(timeout=60)[0]  # the other does not hang
        if started.returncode == 0:
            continue
        said += 1
        assert (
            f"{LOST}, so process {1 - life} stops too; the checkpoint {out}" in text
            and "start the same command again" in text
        )
        assert load_checkpoint(latest_checkpoint(out))["step"] >= int(before[-1].name[5:])
        shutil.rmtree(out / "final", ignore_errors=True)
    finish(start(tmp_path, [(kind, out, slow)]))
    assert said and torch.equal(curve(out), curve(runs / f"{kind}-plain"))
    a, b = weights(out), weights(runs / f"{kind}-plain")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_torchrun_starts_it_again(runs, settings, tmp_path):
    jobs, killed = [("fsdp", tmp_path / "run", settings)], False
    started = start(tmp_path, jobs, options=["--max-restarts", "1"], warm=False)
    while started.poll() is None and not killed:
        if checkpoints(tmp_path / "run") and (pid := (tmp_path / "pid1").read_text()):
            os.kill(int(pid), signal.SIGKILL)
            killed = True
        time.sleep(0.005)
    assert killed and LOST in finish(started)
    assert torch.equal(curve(tmp_path / "run"), curve(runs / "fsdp-plain"))


def test_one_sentence_for_all(settings, tmp_path):
    for change, match in (
        (dict(batch_size=13), "a multiple of 2"),
        (dict(vocab_size=100), "set vocab_size to at least"),
    ):
        text = finish(start(tmp_path, [("fsdp", tmp_path / "run", settings | change)]), code=2)
        assert text.count("stopped: ") >= 1 and all(
            match in line for line in text.splitlines() if "stopped: " in line
        )


def test_what_is_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no engine 'zero'; expected ddp or fsdp"):
        many("zero").__enter__()
    with pytest.raises(ValueError, match="torchrun"):
        many("ddp").__enter__()
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="no GPU, there are 2: start 2"):
        parallel.local_device()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.local_device() == torch.device("cuda", 1)
