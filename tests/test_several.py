"""A check of several tokens by few calls: the logits of the plain reader, forth and back."""

import random

import pytest
import torch
from test_fast import HYBRIDS, KINDS, random_model

from qwen_nb import several
from qwen_nb.drafts import pieces_limit
from qwen_nb.model import Qwen
from qwen_nb.several import LeanReader, check_mask
from qwen_nb.speculation import Reader


def walk(model, seed):
    "Two readers read and go back alike, at random. The worst error, of the logits' scale."
    luck, vocab = random.Random(f"{seed} walk"), model.config.vocab_size
    limit = pieces_limit(model.config) or 90
    readers, worst = [LeanReader(model, 90), Reader(model, 90)], 0.0
    for _ in range(12):
        length = readers[0].length
        n = luck.randint(1, 40 if length == 0 else 9)
        if length + n > limit:
            break
        ids, places = [luck.randrange(vocab) for _ in range(n)], luck.randint(1, n)
        ours, plain = (reader.read(ids, places) for reader in readers)
        assert ours.shape == plain.shape == (places, vocab)
        worst = max(worst, float((ours - plain).abs().max() / plain.std()))
        back = readers[0].length - luck.choice([0, 0, 1, 4, 8])
        for reader in readers:
            reader.go_back(max(back, 1))
        assert readers[0].ids == readers[1].ids
    return worst


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HYBRIDS])
def test_the_logits_are_the_plain_readers(kind):
    for seed in range(6):
        worst = walk(random_model(kind, seed)[0], seed)
        assert worst < 1e-4, f"{kind}, seed {seed}: {worst:.1e} of the logits' scale"


def open_behind(cache, first, n, window=0):
    return check_mask(cache, first + 3, n, window)


def no_window(cache, first, n, window=0):
    return check_mask(cache, first, n)


def nothing_new(cache, first, n, window=0):
    return check_mask(cache, first - 1, n, window).index_fill_(1, torch.tensor([0]), 0)


@pytest.mark.parametrize(
    "kind, mistake", [("qwen3", open_behind), ("windows", no_window), ("qwen3", nothing_new)]
)
def test_a_wrong_mask_is_seen(kind, mistake, monkeypatch):
    monkeypatch.setattr(several, "check_mask", mistake)
    assert max(walk(random_model(kind, seed)[0], seed) for seed in range(6)) > 1e-2


def test_positions_of_the_first_for_all_are_seen(monkeypatch):
    right = several.look_up_each

    def one_place(q, k, v, view, first, mask):
        return right(q, k, v, view, max(first - 1, 0), mask)

    monkeypatch.setattr(several, "look_up_each", one_place)
    assert max(walk(random_model("qwen3", seed)[0], seed) for seed in range(6)) > 1e-2


def test_nan_is_refused():
    model = Qwen.from_pretrained(None, dtype=torch.float32)
    reader = LeanReader(model, 20)
    reader.read([1, 2, 3])
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        reader.read([4, 5])
