"""Several tokens of a hybrid by few calls, and back to any of them: the logits of a reader that
never saw more, the ids of `generate` whoever guesses, and what is seen when it does not go back."""

import copy
import random

import pytest
import torch
from test_fast import HYBRIDS as STATEFUL
from test_fast import KINDS, random_model
from torch.nn import functional as F

from qwen_nb import drafts, way_back
from qwen_nb.drafts import ModelDraft, speculate
from qwen_nb.generation import generate
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.quantised_model import quantise_model
from qwen_nb.sampling import Sampling
from qwen_nb.several import FEW, LeanReader
from qwen_nb.speculation import Draft, Reader, TokenChoice
from qwen_nb.way_back import (
    HybridCheck,
    HybridReader,
    LayerWrites,
    reader_for,
    rule_together,
    summed_state,
)

GREEDY = dict(temperature=0.0, stop_ids=())
ROOM = 130
HYBRIDS = [kind for kind in STATEFUL if kind != "qwen4_exp"]  # that one is read by plain passes


def walk(model, seed, vocab):
    """A text that grows and shrinks, read by ours; of each pass, its logits and all ids up to
    there. It goes back to any length, also over several passes."""
    luck, text, passes = random.Random(f"{seed} walk"), [], []
    reader = HybridReader(model, ROOM)
    for _ in range(12):
        n = luck.randint(1, 45 if not text else 9)
        if len(text) + n > ROOM:
            break
        text += [luck.randrange(vocab) for _ in range(n)]
        places = luck.randint(1, n)
        passes.append((reader.read(text[reader.length :], places), list(text)))
        del text[len(text) - luck.choice([0, 0, 1, 2, 4, 8]) :]
        reader.go_back(len(text))
        assert reader.ids == text[: reader.length], "other ids are left than were to stay"
    return passes


def worst_error(kind, seed):
    "Of the logits' scale, against a plain reader that reads each text anew."
    model, _ = random_model(kind, seed)
    worst = 0.0
    for logits, text in walk(model, seed, model.config.vocab_size):
        plain = Reader(model, ROOM).read(text, len(logits))
        assert logits.shape == plain.shape
        worst = max(worst, float((logits - plain).abs().max() / plain.std()))
    return worst


@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_logits_are_those_of_a_reader_that_never_saw_more(kind):
    for seed in range(8):
        worst = worst_error(kind, seed)
        # in some of these models even plain layers, at once and one by one, are 1e-4 apart
        assert worst < 5e-4, f"{kind}, seed {seed}: {worst:.1e} of the logits' scale"


def all_of_it(writes, n):
    return HOW_IT_IS(writes, writes.keys.shape[1])


def only_the_inputs(writes, n):
    return HOW_IT_IS(writes, n)[0], all_of_it(writes, n)[1]


def only_the_state(writes, n):
    return all_of_it(writes, n)[0], HOW_IT_IS(writes, n)[1]


def one_too_few(writes, n):
    return HOW_IT_IS(writes, max(n - 1, 0))


HOW_IT_IS = LayerWrites.after


@pytest.mark.parametrize("mistake", [all_of_it, only_the_inputs, only_the_state, one_too_few])
def test_the_comparison_sees_what_is_not_turned_back(mistake, monkeypatch):
    monkeypatch.setattr(LayerWrites, "after", mistake)
    assert max(worst_error("qwen3_5", seed) for seed in range(6)) > 1e-2


class Told(Draft):
    "Guesses from a text that is known, each wrong with some probability."

    def __init__(self, text, vocab, wrong, luck):
        self.text = [(i + 1) % vocab if luck.random() < wrong else i for i in text]

    def guess(self, ids, k, choice):
        return self.text[len(ids) : len(ids) + k], None


class Random(Draft):
    def __init__(self, vocab, luck):
        self.vocab, self.luck = vocab, luck

    def guess(self, ids, k, choice):
        return [self.luck.randrange(self.vocab) for _ in range(self.luck.randint(0, k))], None


def guessers(plain, vocab, luck):
    "Name → who guesses: never right, always, sometimes, at random, and lookup."
    text = plain[0].tolist()
    found = {f"{wrong:.0%} wrong": Told(text, vocab, wrong, luck) for wrong in (1, 0, 0.3)}
    return found | {"random": Random(vocab, luck), "lookup": "lookup"}


def same_ids(model, kind, seed):
    luck, vocab = random.Random(f"{kind} {seed} ids"), model.config.vocab_size
    prompt = torch.randint(0, vocab, (1, luck.choice([1, 2, 9, 31, 32, 33, 34, 60])))
    new, k = luck.randint(1, 40), luck.choice([1, 2, 6, 10, 40])
    plain = generate(model, prompt, new, fast=False, **GREEDY)
    chunk = luck.choice([None, None, 5, 40])
    for name, draft in guessers(plain, vocab, luck).items():
        trace = []
        found = speculate(model, prompt, new, draft, k, None, chunk, trace, **GREEDY)
        about = f"{kind}, seed {seed}, {name}, k {k}, prompt {prompt.shape[1]}"
        assert torch.equal(found, plain), f"{about}: {found.tolist()}, expected {plain.tolist()}"
        assert sum(number + 1 for _, number in trace) == new, about
        if name == "0% wrong":
            most = -(-new // (k + 1))
            assert len(trace) == most, f"{about}: {len(trace)} passes, expected {most}"


@pytest.mark.parametrize("kind", HYBRIDS)
def test_ids_are_those_of_generate(kind):
    for seed in range(10):
        same_ids(random_model(kind, seed)[0], kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HYBRIDS)
def test_ids_are_those_of_generate_for_many_more(kind):
    for seed in range(10, 40):
        same_ids(random_model(kind, seed)[0], kind, seed)


def test_the_ids_see_a_state_that_is_not_turned_back(monkeypatch):
    monkeypatch.setattr(LayerWrites, "after", all_of_it)
    with pytest.raises(AssertionError, match="expected"):
        for seed in range(10):
            same_ids(random_model("qwen3_5", seed)[0], "qwen3_5", seed)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_small_model_in_bfloat16_writes_as_in_float32(kind):
    for seed in range(4):
        model, luck = random_model(kind, seed, torch.bfloat16)
        vocab = model.config.vocab_size
        prompt = torch.randint(0, vocab, (1, luck.randint(1, 60)))
        plain = generate(copy.deepcopy(model).float(), prompt, 25, fast=False, **GREEDY)
        for name, draft in guessers(plain, vocab, luck).items():
            found = speculate(model, prompt, 25, draft, 5, **GREEDY)
            assert torch.equal(found, plain), f"{kind}, seed {seed}, {name}"
        assert model.dtype == torch.bfloat16


def error_in_bfloat16(make, kind, seeds=range(8)):
    "How far logits after a rejected guess are from those in float32, on average, of their scale."
    errors = []
    for seed in seeds:
        model, luck = random_model(kind, seed, torch.bfloat16)
        text = [luck.randrange(model.config.vocab_size) for _ in range(40)]
        reader = make(model, ROOM)
        reader.read(text[:30])
        reader.read(text[30:33] + [1, 2, 3])
        reader.go_back(33)
        logits = reader.read(text[reader.length :], 7)
        exact = Reader(copy.deepcopy(model).float(), ROOM).read(text, 7)
        errors.append(((logits - exact).square().mean().sqrt() / exact.std()).item())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_large_model_in_bfloat16_is_as_exact_as_the_plain_one(kind, monkeypatch):
    monkeypatch.setattr("qwen_nb.lean.FUSE_BELOW", 0)  # as if it were large: no copy in float32
    ours, plain = error_in_bfloat16(HybridReader, kind), error_in_bfloat16(Reader, kind)
    assert ours < 1.5 * plain, f"{kind}: off by {ours:.3f}, plain {plain:.3f}"
    monkeypatch.setattr(LayerWrites, "after", all_of_it)
    wrong = error_in_bfloat16(HybridReader, kind)
    assert wrong > 1.5 * plain, f"{kind}: a state that stays is off by {wrong:.3f} only"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_quantised_hybrids(kind, bits):
    for seed in range(3):
        model = quantise_model(random_model(kind, seed)[0], bits)
        assert type(reader_for(model, 20)) is HybridReader
        same_ids(model, kind, seed)


def test_packaged_hybrid_writes_the_same_story():
    model = Qwen.from_pretrained(packaged_model("qwen3_5"), dtype=torch.float32)
    prompt = torch.randint(0, 500, (1, 40), generator=torch.Generator().manual_seed(1))
    plain = generate(model, prompt, 120, **GREEDY)
    assert torch.equal(speculate(model, prompt, 120, "lookup", 10, **GREEDY), plain)


def test_who_gets_which_reader():
    for kind in KINDS:
        expected = HybridReader if kind in HYBRIDS else LeanReader
        expected = Reader if kind == "qwen4_exp" else expected
        model = random_model(kind, 0)[0]
        assert type(reader_for(model, 20)) is expected, kind
    model = random_model("qwen3_5", 0)[0]
    handle = model.model.register_forward_hook(lambda *args: None)
    assert type(reader_for(model, 20)) is Reader, "a hook would see nothing"
    handle.remove()


def test_a_hybrid_that_guesses_reads_nothing_again(monkeypatch):
    "Its guesses are read one by one, and it goes back over several of them."
    model, other = random_model("qwen3_5", 0)[0], random_model("qwen3_5", 2)[0]
    vocab = min(model.config.vocab_size, other.config.vocab_size)
    text, read = [5, 6, 7, 8], []
    kept = HybridReader.read

    def counted(self, ids, places=1):
        read.append(len(ids))
        return kept(self, ids, places)

    monkeypatch.setattr(HybridReader, "read", counted)
    draft, choice = ModelDraft(other), TokenChoice(Sampling(), 4)
    draft.begin(model, 90)
    luck = random.Random(0)
    for _ in range(10):
        before = draft.reader.length
        read.clear()
        guessed, _ = draft.guess(text, 6, choice)
        accepted = luck.randint(0, len(guessed))
        again = before - len(text)  # below 0: the new tokens
        assert sum(read) <= max(0, -again) + 6, "tokens that it had read were read again"
        text = text + guessed[:accepted] + [luck.randrange(vocab)]


def test_a_long_text_in_the_middle():
    "Read by the model itself; what was rejected before is not in it."
    model, _ = random_model("qwen3_5", 1)
    luck, vocab = random.Random(1), model.config.vocab_size
    text = [luck.randrange(vocab) for _ in range(90)]
    reader = HybridReader(model, ROOM)
    reader.read(text[:40])
    reader.read(text[40:45] + [1, 2, 3], 4)
    reader.go_back(45)
    found = reader.read(text[45 : 45 + FEW + 5])  # long
    expected = Reader(model, ROOM).read(text[: 45 + FEW + 5])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    reader.go_back(reader.length - 3)  # into the long one: nothing tells of it
    assert reader.length == 0 and reader.ids == []
    found, expected = (r.read(text[:50], 3) for r in (reader, Reader(model, ROOM)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_only_so_many_passes_are_kept():
    model, _ = random_model("qwen3_5", 1)
    reader = HybridReader(model, ROOM)
    for i in range(FEW + 20):
        reader.read([i % 30])
    assert len(reader.check.checks) <= FEW + 1
    reader.go_back(FEW + 10)
    assert reader.length == FEW + 10 and len(reader.check.checks) == 1


def test_nan_is_refused():
    model, _ = random_model("qwen3_5", 0)
    reader = HybridReader(model, 20)
    reader.read([1, 2, 3])
    model.model.norm.weight.data.fill_(torch.nan)
    reader = HybridReader(model, 20)
    with pytest.raises(ValueError, match="NaN"):
        reader.read([4, 5])


def test_strong_decay_stays_finite():
    "Decays that forget all at once: sums of logs far below zero, and nothing is divided by them."
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, 2, 20, 6), dim=-1)
    v, beta, state = torch.randn(2, 20, 5), torch.rand(2, 20), torch.randn(2, 6, 5)
    g = -100 * torch.rand(2, 20)
    read, fading, changes = rule_together(q, k, v, g, beta, state)
    expected = state
    for i in range(20):
        torch.testing.assert_close(summed_state(i, state, fading, k, changes), expected)
        expected = expected * g[:, i, None, None].exp()
        change = beta[:, i, None, None] * (v[:, i, None] - k[:, i, None] @ expected)
        expected = expected + k[:, i, :, None] @ change
        torch.testing.assert_close(read[:, i, None], q[:, i, None] @ expected)


def test_speculation_takes_it():
    assert drafts.reader_for is way_back.reader_for
    assert HybridReader.check_kind is HybridCheck


def test_what_keeps_more_than_a_state_is_read_by_plain_passes():
    from test_speculate import random_model as family_model

    assert type(reader_for(family_model("Qwen4ExpForCausalLM", 0), 20)) is Reader
