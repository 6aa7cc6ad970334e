"""What a pass needs, what a machine offers, in which dtype it is faster, and what the benchmarks
say where there is no GPU. No clock decides here: times are given."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import one_sentence, small
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_nb import resume, speed, width
from qwen_nb.durable import checkpoints, load_checkpoint
from qwen_nb.inspect import packaged_model
from qwen_nb.mixture import MoEConfig
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.resume import OneProcess, Run
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig, read_run_config
from qwen_nb.writing import Context

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")
ROOT = Path(__file__).resolve().parent.parent
LOW_IS_SLOW, LOW_IS_FAST = dict(float32=1.0, bfloat16=16.0), dict(float32=1.0, bfloat16=0.4)


def verdict(monkeypatch, seconds):
    "The machine has been asked, and this is what it said."
    monkeypatch.setattr(width, "product_seconds", lambda *size, **settings: seconds)


# what a pass needs


class Read(TorchDispatchMode):
    "Bytes of weights that calls read: whole ones once, and rows that are looked up."

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
        self.whole, self.rows = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in filter(torch.is_tensor, args):
            place = t.untyped_storage().data_ptr()
            if place in self.weights and str(func) == "aten.embedding.default":
                self.rows += args[1].numel() * t[0].nbytes
            elif place in self.weights and not func.is_view and ".new_" not in str(func):
                self.whole[place] = self.weights[place].nbytes
        return func(*args, **kwargs or {})

    def bytes(self):
        return self.rows + sum(self.whole.values())


@pytest.mark.parametrize("name", [None, "qwen1", "qwen2", "qwen3_5"])
def test_weights_that_a_pass_reads(name):
    model = Qwen.from_pretrained(packaged_model(name) if name else None, torch.float32)
    for batch, new, past in ((1, 1, 5), (3, 1, 5), (2, 7, 0)):
        context, ids = Context(model, batch, past + new), torch.ones(batch, past + new).long()
        if past:
            context.read(ids[:, :past])
        with Read(model) as read:
            context.read(ids[:, past:])
        found = speed.pass_of(model.config, batch, new, past, bytes_per_number=4)
        assert sum(found.weights.values()) == read.bytes(), (batch, new, past)


def test_a_step_with_tables_of_n_grams():
    "Qwen4-exp looks its n-grams up: a token reads few rows of a table. Else it is as above."
    from test_next import own

    model = Qwen(own()).eval()
    context = Context(model, 1, 8)
    context.read(torch.arange(7)[None] + 4)
    with Read(model) as read:
        context.read(torch.tensor([[30]]))
    found = speed.pass_of(model.config, 1, 1, 7, bytes_per_number=4)
    assert all(number >= 0 for number in found.weights.values())
    idle = 4 * 16  # the norm of the indexer's keys, of which no block ends in this step
    assert sum(found.weights.values()) == read.bytes() + idle


def test_several_tokens_ask_more_experts():
    config = MoEConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    expert, gate = 3 * 16 * 8 * 2, 8 * 16 * 2
    one, two, many = (speed.weights_read(config, n)["mlp"] for n in (1, 2, 1000))
    assert one == 2 * expert + gate
    assert two == 8 * expert * (1 - 0.75**2) + gate
    assert many == 8 * expert + gate


def test_numbers_of_a_pass():
    c = QwenConfig()
    prefill, step = speed.pass_of(c, 1, 128), speed.pass_of(c, 1, 1, 127)
    assert sum(step.weights.values()) < sum(prefill.weights.values()) < 1.01 * step.bytes
    assert prefill.cache == step.cache == 128 * 2 * 28 * 8 * 128 * 2
    assert 1 < step.intensity < 2 and 90 < prefill.intensity < 128
    texts = speed.pass_of(c, 64, 1, 127)
    assert texts.operations == 64 * step.operations and texts.cache == 64 * step.cache
    assert texts.weights["mlp"] == step.weights["mlp"]


def test_bandwidth_is_bytes_over_the_best_time():
    times = iter([0, 9, 10, 14, 20, 28])
    found = speed.measure_bandwidth(mebibytes=1, repeats=2, clock=lambda: next(times))
    assert found == 2**20 / 4
    assert speed.least_seconds(speed.Pass(100, {}, 40), peak=50, bandwidth=4) == 10
    assert speed.least_seconds(speed.Pass(100, {}, 4), peak=50, bandwidth=4) == 2


def test_labels_do_not_overlap():
    assert speed.apart([0.5, 0.1, 0.12, 0.9], 0.05) == pytest.approx([0.5, 0.07, 0.12, 0.9])
    assert speed.apart([0.4, 0.4, 0.4], 0.1) == pytest.approx([0.4, 0.3, 0.2])


def test_calls_do_not_depend_on_the_size():
    model = small()
    one = speed.calls_of(model, Context)
    many = speed.calls_of(model, Context, batch=16, past=60)
    assert one == many and one["mm"] == 7 * 2 + 1
    assert sum(n for name, n in one.items() if "dot_product" in name) == 2
    assert not {"view", "t", "_unsafe_view", "empty", "transpose"} & one.keys()


def test_all_calls_are_counted_with_the_views():
    x = torch.ones(2, 3)

    def add():
        return x.t() + 1

    assert speed.calls_in(add) == {"t": 1, "add": 1}
    with speed.Calls() as calls:
        add()
    assert calls.found == {"add": 1}


# in which dtype


def test_by_way_of_float32_is_the_product():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 24, generator=g).bfloat16()
    weight, bias = torch.randn(70, 24, generator=g), torch.randn(70, generator=g)
    weight, bias = weight.bfloat16(), bias.bfloat16()
    for b in (None, bias):
        exact = F.linear(x.float(), weight.float(), b if b is None else b.float()).bfloat16()
        for rows in (16, 70, 512):
            found = width.by_way_of_float32(x, weight, b, rows)
            assert found.dtype == torch.bfloat16 and torch.allclose(found, exact, rtol=0.01)
        assert torch.equal(width.by_way_of_float32(x, weight, b), exact)


def test_a_product_is_timed_once_and_draws_no_numbers():
    width.product_seconds.cache_clear()
    looks, calls = iter(range(0, 400, 2)), []

    def clock():
        calls.append(1)
        return next(looks)

    before = torch.get_rng_state()
    for training in (False, True):
        times = width.product_seconds(16, 8, 8, training=training, clock=clock)
        assert times == dict(float32=2, bfloat16=2)
    assert len(calls) == 2 * 2 * 3 * 2
    width.product_seconds(16, 8, 8, training=True, clock=clock)
    assert len(calls) == 24, "asked again"
    assert torch.equal(torch.get_rng_state(), before), "a seed would give other draws"


@pytest.mark.parametrize("name", [None, "qwen1", "qwen3_moe", "qwen3_5"])
def test_wide_products(monkeypatch, name):
    "The logits of float32, up to rounding; every choice is asked; nothing is left behind."
    low = Qwen.from_pretrained(packaged_model(name) if name else None, torch.bfloat16)
    exact = Qwen.from_pretrained(packaged_model(name) if name else None, torch.float32)
    ids, went = torch.arange(20)[None], []
    by_way = width.by_way_of_float32
    monkeypatch.setattr(width, "by_way_of_float32", lambda *a: went.append(1) or by_way(*a))
    with torch.no_grad():
        plain, right = low(ids), exact(ids)
        verdict(monkeypatch, LOW_IS_SLOW)
        with width.wide_products():
            wide = low(ids)
            many = len(went)
            low(ids[:, :1])
            exact(ids)
        assert many > 8 and len(went) == many, "one row and float32 weights stay as they are"
        assert torch.equal(low(ids), plain) and len(went) == many
        verdict(monkeypatch, LOW_IS_FAST)
        with width.wide_products():
            assert torch.equal(low(ids), plain) and len(went) == many
    scale = right.abs().max()
    assert wide.dtype == torch.bfloat16
    assert (wide - right).abs().max() < 1.5 * (plain - right).abs().max() + 1e-3 * scale


def test_wide_products_leave_gradients_alone(monkeypatch):
    verdict(monkeypatch, LOW_IS_SLOW)
    x, weight = torch.ones(16, 8).bfloat16(), torch.ones(8, 8).bfloat16().requires_grad_()
    assert not width.pays(x, weight) and width.pays(x, weight.detach())
    with width.wide_products():
        F.linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_faster_dtype():
    for low, want in ((2.0, "float32"), (0.95, "float32"), (0.9, "bfloat16"), (0.2, "bfloat16")):
        assert width.faster_dtype(dict(float32=1.0, bfloat16=low)) == want


# training


def test_settings_take_auto():
    assert read_run_config(None, ["dtype=auto"]).dtype == "auto"
    one_sentence("'bfloat16' or 'auto'", lambda: read_run_config(None, ["dtype=fp8"]))


@pytest.mark.parametrize("seconds, want", [(LOW_IS_SLOW, "float32"), (LOW_IS_FAST, "bfloat16")])
def test_a_run_records_the_dtype_that_was_chosen(monkeypatch, config, capsys, seconds, want):
    "And keeps it when it goes on, also on a machine that would choose the other."
    verdict(monkeypatch, seconds)
    auto = replace(config, dtype="auto", steps=2)
    train(auto)
    said = capsys.readouterr().out
    assert said.count(f"dtype=auto: {want}") == 1 and said.count("\n") == 1
    saved = load_checkpoint(checkpoints(config.out)[-1])["config"]
    assert saved["dtype"] == want and auto.dtype == "auto"

    verdict(monkeypatch, LOW_IS_FAST if seconds is LOW_IS_SLOW else LOW_IS_SLOW)
    resumed = Run(auto, OneProcess("cpu"), checkpoints(config.out)[-1])
    resume.load_run(resumed, checkpoints(config.out)[-1])
    assert resumed.config.dtype == resumed.objective.dtype == want
    assert "dtype" not in capsys.readouterr().out

    other = "float32" if want == "bfloat16" else "bfloat16"
    changed = f"dtype was '{want}' and is now '{other}'"
    one_sentence(changed, lambda: train(replace(auto, dtype=other)))


def test_a_slow_choice_is_warned_of(monkeypatch):
    sizes, model = dict(steps=12_500, batch_size=32, seq_len=512), QwenConfig.from_pretrained()
    slow, fast = (TrainConfig(**sizes, dtype=d) for d in ("bfloat16", "float32"))
    ms = {name: 1e-2 * s for name, s in LOW_IS_SLOW.items()}
    verdict(monkeypatch, ms)
    said = width.dtype_warning(slow, model)
    assert "In bfloat16" in said and "days" in said and "hours" in said and said.count(". ") == 0
    assert width.dtype_warning(fast, model) == ""
    verdict(monkeypatch, dict(float32=1e-2, bfloat16=1.9e-2))
    assert width.dtype_warning(slow, model) == "", "less than double"

    def never(*size, **settings):
        raise AssertionError("a run of a moment is not worth a measurement")

    monkeypatch.setattr(width, "product_seconds", never)
    assert width.dtype_warning(replace(slow, steps=1, batch_size=1), model) == ""


def test_the_warning_stands_before_the_run(monkeypatch, config, capsys):
    monkeypatch.setattr(width, "dtype_warning", lambda *a: "It is slow here.")
    train(replace(config, steps=1))
    assert capsys.readouterr().out == "It is slow here.\n"


def test_spans():
    for seconds, want in (
        (3.0, "3 seconds"),
        (90, "90 seconds"),
        (7200, "2.0 hours"),
        (200_000, "2.3 days"),
        (600, "10.0 minutes"),
    ):
        assert width.span(seconds) == want


# the benchmarks


def script(name, *words):
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def test_without_a_gpu_the_script_says_so():
    done = script("gpu.py")
    assert done.returncode == 0 and "no GPU" in done.stdout and done.stdout.count("\n") == 1


def test_the_gpu_script_on_the_cpu(tmp_path):
    done = script("gpu.py", "--cpu", "--only", "check", "one", "engine", "--json", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a").read_text())
    assert found["found"]["check, qwen3, logits off by"] < 1e-5
    assert found["found"]["batch 1, plain, tokens/s"] > 0
    assert all("ModuleNotFoundError" in sentence for sentence in found["failed"]), done.stdout


@pytest.mark.slow
def test_the_table_of_the_cpu(tmp_path):
    done = script("decode.py", "--tiny", "--runs", 1, "--busy", "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert {"real", "packaged", "training", "memory", "dtype", "peak", "bandwidth"} <= found.keys()
    assert {row["way"] for row in found["packaged"]} >= {"ours, plain", "transformers"}
    without = found["dtype"][-1]
    assert without["as it stands"][-1] > without["by way of float32"][-1]
