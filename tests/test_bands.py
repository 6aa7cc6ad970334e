"""Products of few rows in bands: the same numbers, wherever a model asks for one."""

import pytest
import torch
from test_fast import KINDS, random_model, random_prompts
from torch.nn import functional as F

from qwen_nb import bands, several
from qwen_nb.bands import BandedProducts, few_rows, fits, in_bands
from qwen_nb.fixed import FixedCache, before_attention
from qwen_nb.generation import generate
from qwen_nb.lean import LeanStep, after_attention
from qwen_nb.model import Qwen, QwenConfig


@pytest.fixture
def small_ones_too(monkeypatch):
    "Bands for every weight whose outputs can be cut; how many products were, is counted."
    cut = []
    monkeypatch.setattr(bands, "LEAST", 1)
    monkeypatch.setattr(bands, "BANDS", 2)
    monkeypatch.setattr("qwen_nb.lean.FUSE_BELOW", 0)  # as for a large model
    monkeypatch.setattr(bands, "bands_pay", lambda: True)
    monkeypatch.setattr(bands, "in_bands", lambda *args: cut.append(1) or in_bands(*args))
    return cut


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("outputs, inputs", [(8, 3), (64, 96), (1024, 40)])
def test_the_same_product(rows, outputs, inputs):
    x, weight = torch.randn(rows, inputs).double(), torch.randn(outputs, inputs).double()
    torch.testing.assert_close(in_bands(x, weight), F.linear(x, weight), rtol=1e-12, atol=1e-12)


def test_what_is_seen_inside(small_ones_too):
    weight, bias = torch.randn(16, 6), torch.randn(16)
    x, start = torch.randn(2, 5, 6), torch.randn(5, 16)
    asked = [
        lambda: F.linear(x, weight),
        lambda: F.linear(x, weight, bias),
        lambda: torch.addmm(start, x[0], weight.t()),
        lambda: torch.nn.Linear(6, 16)(x),
    ]
    for n, ask in enumerate(asked, 1):
        torch.manual_seed(n)
        want = ask()
        torch.manual_seed(n)
        with BandedProducts():
            got = ask()
        torch.testing.assert_close(got, want)
        assert len(small_ones_too) == n
    left = [
        lambda: F.linear(x[0, 0], weight),
        lambda: F.linear(x, weight[:9]),
        lambda: F.linear(x.double(), weight.double()),
        lambda: torch.addmm(start, x[0], weight.t(), alpha=2),
        lambda: torch.addmm(start[:, :6].contiguous(), start, weight),
        lambda: F.linear(torch.randn(300, 6), weight),
    ]
    for ask in left:
        with BandedProducts():
            ask()
    assert len(small_ones_too) == len(asked)


def test_other_things_than_tensors_are_left_alone():
    class Codes:
        dtype = torch.float32

    assert not fits(torch.ones(1, 4), Codes())


@pytest.mark.parametrize("kind", KINDS)
def test_fast_ways_write_the_same_ids_in_bands(kind, small_ones_too):
    prompts = steps = 0
    for seed in range(4):
        model, rng = random_model(kind, seed)
        ids, mask = random_prompts(model, rng)
        ask = dict(attention_mask=mask, temperature=0.0, stop_ids=())
        plain = generate(model, ids, 20, fast=False, **ask)
        assert not small_ones_too
        generate(model, ids, 1, **ask)
        of_the_prompt, small_ones_too[:] = len(small_ones_too), []
        assert torch.equal(generate(model, ids, 20, **ask), plain), f"{kind}, seed {seed}"
        prompts, steps = prompts + of_the_prompt, steps + len(small_ones_too) - of_the_prompt
        small_ones_too.clear()
    assert prompts and steps, f"{prompts} products of prompts and {steps} of steps were cut"


def test_a_check_of_several_tokens_is_cut_too(small_ones_too):
    model, _ = random_model("qwen3", 0)
    reader = several.LeanReader(model, 40)
    reader.read([1, 2, 3, 4])
    assert not small_ones_too, "the model itself reads a beginning"
    reader.read([5, 6, 7], 3)
    assert small_ones_too


def test_compiled_layers_are_left_alone(small_ones_too):
    model, _ = random_model("qwen3", 0)
    halves = (lambda *args: before_attention(*args), after_attention)
    step = LeanStep(model, FixedCache(model.config, 1, 8), halves=halves)
    assert not isinstance(step.few_rows, BandedProducts)
    assert isinstance(LeanStep(model, FixedCache(model.config, 1, 8)).few_rows, BandedProducts)


def test_only_large_models_in_float32_are_looked_at(monkeypatch):
    monkeypatch.setattr(bands, "bands_pay", lambda: True)
    wide = QwenConfig(512, 512, 1024, 1, 8, 4, 64)
    model = Qwen(wide)
    assert isinstance(few_rows(model), BandedProducts)
    assert not isinstance(few_rows(model.bfloat16()), BandedProducts)
    assert not isinstance(few_rows(Qwen.from_pretrained(dtype=torch.float32)), BandedProducts)
    monkeypatch.setattr(bands, "bands_pay", lambda: False)
    assert not isinstance(few_rows(Qwen(wide)), BandedProducts)


def test_bands_pay_needs_two_cores(monkeypatch):
    for cores, mkl, pays in ((1, True, False), (2, True, True), (8, False, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=cores: n)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda found=mkl: found)
        assert bands.bands_pay() is pays
