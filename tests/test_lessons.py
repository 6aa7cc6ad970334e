"""The rows that the packaged model is trained on."""
import re
import types
from random import Random

import pytest
import torch

from qwen_nb.data import IGNORED
from qwen_nb.inspect import packaged_model
from qwen_nb.lessons import ANSWER, COURSE, LESSONS, STORIES, WorldRows, asked_lesson, facts_lesson, list_lesson
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.world import PEOPLE, PLACES, THINGS, Chooser

TOKENIZER = Tokenizer.from_pretrained(packaged_model())


def told(text):
    "What plain facts say, read by somebody who shares no code with the generator: name → value."
    facts = {}
    for s in re.findall(r"[^.?!\n]+\.", text):
        words = s.strip(" .").removeprefix("The ").split()
        facts[words[-1] if words[1] == "has" else words[0]] = words[0] if words[1] == "has" else words[-1]
    return facts


def right(question, facts):
    name = question.rstrip("?").split()[-1]
    if name not in facts: return "I do not know."
    who = question.startswith("Who")
    if who: return f"{facts[name] if facts[name] in PEOPLE else 'Nobody'}."
    return f"In the {facts[name]}."


def test_answers_are_true():
    kinds = set()
    for seed in range(300):
        (facts, _), *rest = facts_lesson(Chooser(Random(seed)))
        for (question, _), (answer, counts) in zip(rest[::2], rest[1::2]):
            assert counts and answer == f" {right(question, told(facts))}\n"
            kinds.add(answer.split()[0])
        (pairs, _), *rest = asked_lesson(Chooser(Random(seed)))
        words = pairs.split()
        for (question, _), (answer, counts) in zip(rest[::2], rest[1::2]):
            assert counts and answer == f" {right(question, dict(zip(words[::2], words[1::2])))}\n"
        (pairs, _), *rest = list_lesson(Chooser(Random(seed)))
        assert [counts for _, counts in rest] == [False, True] * 6
        assert all(f"{name}{value} " in pairs + " " for (name, _), (value, _) in zip(rest[::2], rest[1::2]))
    assert kinds == {"In", "I", *(f"{p}." for p in PEOPLE)}


def test_a_step_can_be_shared():
    "Row k depends on the seed and on k alone: in parts, in another order, after others."
    def rows(batches): return [(ids[:n].tolist(), labels[:n].tolist()) for b in batches for ids, labels, n in zip(b["input_ids"], b["labels"], (b["labels"] != IGNORED).long().cumsum(1).argmax(1) + 1)]
    data = WorldRows(TOKENIZER, 256)
    whole = rows([data.batch(k, 16, 3) for k in (4001, 4000)])
    parts = rows([WorldRows(TOKENIZER, 256).batch(4 * 4001 + i, 4, 3) for i in range(4)] + [data.batch(4 * 4000 + i, 4, 3) for i in range(4)])
    assert whole == parts and len({str(r) for r in whole}) > 30
    assert rows([data.batch(4000, 16, 4)]) != rows([data.batch(4000, 16, 3)])


def test_the_course():
    "Each part of the course has its lessons and no others, and all six come."
    begin, seen = 0, set()
    for end, mix in COURSE:
        assert set(mix) <= {*LESSONS, "chat"} and (end is None or end > begin)
        texts = [TOKENIZER.decode(WorldRows(TOKENIZER, 512).row(0, begin + k)[0]) for k in range(60)]
        chats = sum("<|im_start|>" in t for t in texts)
        assert (chats > 0) == ("chat" in mix) and ("list" in mix) == any(not re.search(r"[.?]", t) for t in texts)
        seen, begin = seen | set(mix), end
    assert seen == {*LESSONS, "chat"}


def test_held_out_stories_are_weighed_alike():
    batch = WorldRows(TOKENIZER, 512, STORIES, answer=1.0).batch(0, 32, 1)
    counts = batch["labels"] != IGNORED
    assert (batch["weights"][counts] == 1).all() and (batch["weights"][~counts] == 0).all()
    assert {1.0, ANSWER} == set(WorldRows(TOKENIZER, 512, STORIES).batch(0, 32, 1)["weights"].unique().tolist()) - {0.0}
    first = WorldRows(TOKENIZER, 512, STORIES).row(1, 0)[0]
    assert TOKENIZER.decode(first[-1:]) == "<|endoftext|>" and not {TOKENIZER.decode(first)} & {TOKENIZER.decode(WorldRows(TOKENIZER, 512, STORIES).row(0, k)[0]) for k in range(200)}


def test_padding_never_counts():
    batch = WorldRows(TOKENIZER, 512).batch(2500, 32)
    end = TOKENIZER.special["<|endoftext|>"]
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        last = (labels != IGNORED).nonzero().max()
        assert (ids[last + 2:] == end).all() and end not in ids[:last].tolist()
    assert batch["input_ids"].shape[1] % 16 == 0 and batch["input_ids"].shape[1] <= 512


def test_a_tokenizer_without_chat_tokens_is_refused():
    plain = types.SimpleNamespace(special={"<|endoftext|>": 0}, encode=list)
    with pytest.raises(ValueError, match=r"no <\|im_end\|>, <\|im_start\|>"): WorldRows(plain, 256)
    with pytest.raises(ValueError, match="seq_len is 8; .* at least 128"): WorldRows(TOKENIZER, 8)


def test_names_are_one_token():
    "The lists are only so easy because a name is one token."
    assert all(len(TOKENIZER.encode(f" {name}")) == 1 for name in [*PEOPLE, *PLACES, *THINGS])
    assert isinstance(WorldRows(TOKENIZER, 128).batch(0, 2)["labels"], torch.Tensor)
