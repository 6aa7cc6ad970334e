"""The engine by lean passes against the engine by plain ones: the same ids, over random models,
lengths, arrivals and shared beginnings, in float32, bfloat16 and as codes; where it is plain."""

import random

import pytest
import torch
from test_fast import KINDS as ALL_KINDS
from test_fast import random_model
from test_serve import random_request

from qwen_nb import paged_step
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.paged import PagedText, PagedTexts
from qwen_nb.paged_step import PageByPage, Pieces, Rectangle
from qwen_nb.quantised_model import quantise_model
from qwen_nb.sampling import Sampling
from qwen_nb.serve import Engine, choose_each, longest_text

KINDS = [kind for kind in ALL_KINDS if kind != "qwen4_exp"]  # its streams are not held by pages


def serve(model, seed, fast, requests=8):
    "Random requests at random times; the same for the same seed, whatever `fast` is."
    rng, vocab = random.Random(seed), model.config.vocab_size
    longest, size = min(60, longest_text(model.config)), rng.choice([1, 3, 4, 16])
    pages = -(-longest // size) * rng.choice([1, 2, 8])
    chunk = rng.choice([1, 7, 16, 64])
    engine = Engine(model, rng.choice([1, 4, 8]), pages, size, prefill_chunk=chunk, fast=fast)
    beginnings = [[rng.randrange(vocab) for _ in range(40)] for _ in range(2)]
    todo, given = [], []
    while len(todo) < requests:
        begin = [b[: longest // 2] for b in beginnings]
        try:
            todo.append(random_request(rng, vocab, begin, longest))
        except ValueError:  # a prompt that leaves no room: draw again
            continue
    waits = [rng.choice([0, 0, 1, 3]) for _ in todo]
    for request, wait in zip(todo, waits):
        given.append(engine.add(*request))
        for _ in range(wait):
            engine.step()
    while not engine.idle:
        engine.step()
    assert bool(engine.lean) == (fast is not False)
    return given


def first_difference(a, b):
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


def tie(model, ours, plain, share):
    "Whether two texts part where rounding decides: the lead of one id is below `share`."
    at = first_difference(ours.text, plain.text)
    with torch.no_grad():
        logits = model(torch.tensor([plain.text[:at]]))[0, -1].float()
    gap = (logits[ours.text[at]] - logits[plain.text[at]]).abs() / logits.abs().max()
    return gap < (share if not ours.sampling.temperature else max(share, 1e-2))


def same(model, seed, share=1e-5):
    "How many requests got the same ids in both ways; others must part at a tie."
    equal, lean, plain = 0, serve(model, seed, True), serve(model, seed, False)
    for a, b in zip(lean, plain):
        equal += a.ids == b.ids and a.reason == b.reason
        if a.ids != b.ids:
            assert tie(model, a, b, share), f"{seed}: the ids differ, and not by a tie"
    return equal / len(lean)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids(kind):
    shares = [same(random_model(kind, seed)[0], f"{kind} {seed}") for seed in range(2)]
    assert sum(shares) / len(shares) > 0.9, shares


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_on_many_schedules(kind):
    for seed in range(30):
        same(random_model(kind, seed)[0], f"{kind} {seed} more")


@pytest.mark.parametrize("kind", ["qwen1", "qwen3", "windows", "mixture"])
def test_the_same_ids_as_a_rectangle(kind, monkeypatch):
    "The way that a GPU takes, on a CPU."
    choose = lambda new, like: Pieces if max(new) > 1 else Rectangle
    monkeypatch.setattr(paged_step.paged_step, "__defaults__", (choose,))
    assert same(random_model(kind, 5)[0], f"{kind} 5") > 0.8


@pytest.mark.parametrize("small", [True, False])  # a copy in float32, or bfloat16 as it is
@pytest.mark.parametrize("kind", ["qwen1", "qwen2", "qwen3", "windows"])
def test_bfloat16(kind, small, monkeypatch):
    if not small:
        monkeypatch.setattr("qwen_nb.lean.FUSE_BELOW", 0)
    for seed in range(2):
        model = random_model(kind, seed, torch.bfloat16)[0]
        lean, plain = serve(model, seed, True), serve(model, seed, False)
        greedy = [(a, b) for a, b in zip(lean, plain) if not a.sampling.temperature]
        assert greedy
        for a, b in greedy:
            assert a.ids == b.ids or tie(model, a, b, 0.05), f"{kind}, seed {seed}"


def forced(model, kind, ids):
    "Logits behind each of the given ids, one by one, from texts of this kind."
    pool = kind(model.config, 10, 4, 1, dtype=model.dtype)
    text, found = PagedText(ids[:1]), []
    assert pool.begin(text)
    for more in ids[1:]:
        found.append(pool.read(model, [text], [1]))
        text.text.append(more)
        if pool.pages_for(len(text.text)) > len(text.pages):
            text.pages.append(pool.pages.take())
    return torch.cat(found)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_hybrids_in_bfloat16(seed, small, monkeypatch):
    "Their states add up what was rounded: measured against the same weights in float32."
    if not small:
        monkeypatch.setattr("qwen_nb.lean.FUSE_BELOW", 0)
    model = random_model("qwen3_5", seed, torch.bfloat16)[0]
    exact_model = random_model("qwen3_5", seed, torch.bfloat16)[0].float()
    ids = [random.Random(seed).randrange(model.config.vocab_size) for _ in range(25)]
    exact = forced(exact_model, PagedTexts, ids)
    lean, plain = (
        (forced(model, kind, ids) - exact).abs().max() / exact.std()
        for kind in (paged_step.LeanTexts, PagedTexts)
    )
    assert lean < (plain if small else 4 * plain), f"{lean:.3f} lean, {plain:.3f} plain"


@pytest.mark.parametrize("name, bits", [("", 8), ("qwen3_moe", 4)])
def test_quantised(name, bits):
    model = Qwen.from_pretrained(packaged_model(name), dtype=torch.float32)
    quantise_model(model, bits)
    assert same(model, f"{bits} bits", share=1e-3) > 0.9


class OnePosition(PageByPage):
    def __init__(self, *args):
        super().__init__(*args)
        self.position = self.position[:1].expand(len(self.position))


class NoWindow(PageByPage):
    def mask(self, window):
        return super().mask(0)


class NextSlot(PageByPage):
    def __init__(self, *args):
        super().__init__(*args)
        self.slots = (self.slots + 1) % (self.slots.max() + 1)


class LastRowOfAll(Pieces):
    def __init__(self, *args):
        super().__init__(*args)
        self.last = self.last[-1:].expand(len(self.last))


@pytest.mark.parametrize(
    "kind, mistake",
    [
        ("qwen3", OnePosition),
        ("windows", NoWindow),
        ("qwen3", NextSlot),
        ("qwen3", LastRowOfAll),
    ],
)
def test_mistakes_are_seen(kind, mistake, monkeypatch):
    right = paged_step.places_for

    def choose(new, like):
        kind = right(new, like)
        return mistake if issubclass(mistake, kind) else kind

    monkeypatch.setattr(paged_step.paged_step, "__defaults__", (choose,))
    with pytest.raises(AssertionError, match="not by a tie"):
        for seed in range(8):
            same(random_model(kind, seed)[0], f"{kind} {seed}")


def texts_in(pool, model, lengths):
    rng, texts = random.Random(0), []
    for length in lengths:
        texts.append(PagedText([rng.randrange(model.config.vocab_size) for _ in range(length)]))
        assert pool.begin(texts[-1])
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind):
    "One pass over prompts in uneven pieces, then one id each, against the model itself."
    model = random_model(kind, 3)[0]
    lengths, limit = [3, 9, 1, 30], longest_text(model.config)
    lengths = [min(length, limit) for length in lengths]
    found = []
    for pool in (paged_step.LeanTexts, PagedTexts):
        pool = pool(model.config, 60, 4, 4)
        texts, logits = texts_in(pool, model, lengths), []
        for text in texts:  # by itself, all but the last id
            if text.unread > 1:
                logits.append(pool.read(model, [text], [text.unread - 1]))
        logits.append(pool.read(model, texts, [1] * 4))
        found.append(torch.cat(logits))
    error = (found[0] - found[1]).abs().max() / found[1].std()
    assert error < 1e-4, f"{error:.1e} of the logits' scale"


def test_where_it_is_plain():
    model = random_model("qwen3", 0)[0]
    engine = Engine(model, 2, 20, 4)
    engine.add([1, 2, 3], 3, Sampling())
    engine.step()
    assert engine.lean, "nothing speaks against it"
    while not engine.idle:
        engine.step()
    hook = model.model.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="the fast way cannot be taken: hooks watch"):
        Engine(model, 2, 20, 4, fast=True)
    engine.add([1, 2, 3], 3, Sampling())
    engine.step()
    assert engine.lean is False, "the hook would see nothing"
    hook.remove()


def test_changed_weights_are_seen():
    model = random_model("qwen3", 0)[0]
    engine = Engine(model, 2, 20, 16)  # no page is ever full: nothing old is found
    for _ in range(2):
        request = engine.add([1, 2, 3], 8, Sampling())
        while not engine.idle:
            engine.step()
        plain = Engine(model, 2, 20, 4, fast=False)
        expected = plain.add([1, 2, 3], 8, Sampling())
        while not plain.idle:
            plain.step()
        assert request.ids == expected.ids
        for p in model.model.layers.parameters():
            p.data += 0.3 * torch.randn_like(p)


def test_nan_is_refused():
    model = random_model("qwen3", 0)[0]
    engine = Engine(model, 2, 20, 4)
    engine.add([1, 2, 3], 3, Sampling(temperature=1.0))
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN in torch.float32"):
        engine.step()


def test_penalties_of_texts_of_different_lengths():
    "Marks are made for all rows at once; some have written nothing yet."
    model = random_model("qwen3", 1)[0]
    sampling = Sampling(repetition_penalty=1.5, presence_penalty=0.5)
    engine = Engine(model, 4, 60, 4)
    given = [engine.add([i, 2 * i + 1][: 1 + i % 2] * 3, 6, sampling) for i in range(4)]
    while not engine.idle:
        engine.step()
    for i, request in enumerate(given):
        alone = Engine(model, 1, 60, 4, fast=False)
        other = alone.add([i, 2 * i + 1][: 1 + i % 2] * 3, 6, sampling)
        while not alone.idle:
            alone.step()
        assert request.ids == other.ids
    assert choose_each([], torch.zeros(0, 9)) == []
