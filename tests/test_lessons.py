"""The rows that the packaged model is trained on."""

import re
import types
from random import Random

import pytest
import torch

from qwen_nb.inspect import packaged_model
from qwen_nb.lessons import (
    ANSWER,
    CHATS,
    COURSE,
    LESSONS,
    STORIES,
    WorldRows,
    asked_lesson,
    cut_course,
    facts_lesson,
    list_lesson,
    talk_row,
    text_row,
)
from qwen_nb.rows import IGNORED
from qwen_nb.settings import TrainConfig, open_data
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.world import PEOPLE, PLACES, THINGS, Chooser, conversation, story

TOKENIZER = Tokenizer.from_pretrained(packaged_model())


def told(text):
    "What plain facts say, read by somebody who shares no code with the generator: name → value."
    facts = {}
    for s in re.findall(r"[^.?!\n]+\.", text):
        words = s.strip(" .").removeprefix("The ").split()
        facts[words[-1] if words[1] == "has" else words[0]] = (
            words[0] if words[1] == "has" else words[-1]
        )
    return facts


def right(question, facts):
    name = question.rstrip("?").split()[-1]
    if name not in facts:
        return "I do not know."
    who = question.startswith("Who")
    if who:
        return f"{facts[name] if facts[name] in PEOPLE else 'Nobody'}."
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
        assert all(
            f"{name}{value} " in pairs + " " for (name, _), (value, _) in zip(rest[::2], rest[1::2])
        )
    assert kinds == {"In", "I", *(f"{p}." for p in PEOPLE)}


def test_a_step_can_be_shared():
    "Row k depends on the seed and on k alone: in parts, in another order, after others."

    def rows(batches):
        return [
            (ids[:n].tolist(), labels[:n].tolist())
            for b in batches
            for ids, labels, n in zip(
                b["input_ids"], b["labels"], (b["labels"] != IGNORED).long().cumsum(1).argmax(1) + 1
            )
        ]

    data = WorldRows(TOKENIZER, 256)
    whole = rows([data.batch(k, 16, 3) for k in (4001, 4000)])
    parts = rows(
        [WorldRows(TOKENIZER, 256).batch(4 * 4001 + i, 4, 3) for i in range(4)]
        + [data.batch(4 * 4000 + i, 4, 3) for i in range(4)]
    )
    assert whole == parts and len({str(r) for r in whole}) > 30
    assert rows([data.batch(4000, 16, 4)]) != rows([data.batch(4000, 16, 3)])


def graded(weights):
    "The stretches that count twice, as (begin, end)."
    edges = [
        i
        for i in range(len(weights) + 1)
        if (i < len(weights) and weights[i] == ANSWER) != (i > 0 and weights[i - 1] == ANSWER)
    ]
    return list(zip(edges[::2], edges[1::2]))


def kind_of(ids, weights):
    "Which lesson a row is from, by its text and what counts in it."
    text, answers = TOKENIZER.decode(ids).removesuffix("<|endoftext|>"), len(graded(weights))
    if "<|im_start|>" in text:
        return (
            "chat" if answers == 1 else "talk"
        )  # one answer counts, or every one of four and more
    if 1.0 in weights:
        return "story"
    if not re.search("[.?]", text):
        return "list"
    if "." not in text.splitlines()[0]:
        return "asked"  # pairs in its first line
    asks = [line.endswith("?") or "? " in line for line in text.splitlines()]
    return (
        "facts"
        if answers == 6
        and all(asks[-6:])
        and not any(asks[:-6])
        and not re.search("went|took|dropped|gave", text)
        else "dense"
    )


def test_the_course():
    "Each part of the course has its lessons and no others, and all seven come."
    begin, seen = 0, set()
    for end, mix in COURSE:
        assert end is None or end > begin
        assert {kind_of(*WorldRows(TOKENIZER, 512).row(0, begin + k)) for k in range(100)} == set(
            mix
        )
        seen, begin = seen | set(mix), end
    assert seen == {*LESSONS, *CHATS}


def test_a_shorter_course():
    "The same order, cut; and a run's setting decides."
    for rows, wants in (
        (64_000, COURSE),
        (18_000, [(16_000, COURSE[0][1]), (18_000, COURSE[1][1]), COURSE[3]]),
        (0, [COURSE[3]]),
    ):
        parts = cut_course(rows)
        for k in (0, 15_999, 16_000, 17_999, 18_000, 63_999, 64_000):
            assert next(mix for end, mix in parts if end is None or k < end) == next(
                mix for end, mix in wants if end is None or k < end
            )
        assert open_data(TrainConfig(lesson_rows=rows))[1].course == parts
    with pytest.raises(ValueError, match="lesson_rows is -1"):
        TrainConfig(lesson_rows=-1)


def test_what_counts_in_a_talk():
    """Of each turn the thought, the answer and the mark of its end, and nothing else.

    In the rows that answer at once the thought is empty, and belongs to the prompt."""
    kinds = set()
    for seed in range(100):
        ids, weights = talk_row(Chooser(Random(seed)), TOKENIZER)
        said = conversation(Chooser(Random(seed)), range(4, 9))
        thinks = "<think>\n\n</think>" not in TOKENIZER.decode(ids)
        turns = [
            (
                user["content"],
                f"<think>\n{m['reasoning_content']}\n</think>\n\n" * thinks
                + f"{m['content']}<|im_end|>",
            )
            for user, m in zip(said[::2], said[1::2])
        ]
        assert [TOKENIZER.decode(ids[a:b]) for a, b in graded(weights)] == [
            answer for _, answer in turns
        ]
        empty = "<think>\n\n</think>\n\n" * (not thinks)
        assert TOKENIZER.decode(ids) == "".join(
            f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{empty}{answer}\n"
            for asked, answer in turns
        )
        assert 4 <= len(turns) <= 8 and set(weights) == {0.0, ANSWER} and len(ids) == len(weights)
        kinds.add(thinks)
    assert kinds == {True, False}


def test_held_out_stories_are_weighed_alike():
    batch = WorldRows(TOKENIZER, 512, STORIES, answer=1.0).batch(0, 32, 1)
    counts = batch["labels"] != IGNORED
    assert (batch["weights"][counts] == 1).all() and (batch["weights"][~counts] == 0).all()
    assert {1.0, ANSWER} == set(
        WorldRows(TOKENIZER, 512, STORIES).batch(0, 32, 1)["weights"].unique().tolist()
    ) - {0.0}
    first = WorldRows(TOKENIZER, 512, STORIES).row(1, 0)[0]
    assert TOKENIZER.decode(first[-1:]) == "<|endoftext|>" and not {TOKENIZER.decode(first)} & {
        TOKENIZER.decode(WorldRows(TOKENIZER, 512, STORIES).row(0, k)[0]) for k in range(200)
    }


def test_padding_never_counts():
    batch = WorldRows(TOKENIZER, 512).batch(2500, 32)
    end = TOKENIZER.special["<|endoftext|>"]
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        last = (labels != IGNORED).nonzero().max()
        assert (ids[last + 2 :] == end).all() and end not in ids[:last].tolist()
    assert batch["input_ids"].shape[1] % 16 == 0 and batch["input_ids"].shape[1] <= 512


def test_a_tokenizer_without_chat_tokens_is_refused():
    plain = types.SimpleNamespace(special={"<|endoftext|>": 0}, encode=list)
    with pytest.raises(ValueError, match=r"no <\|im_end\|>, <\|im_start\|>"):
        WorldRows(plain, 256)
    with pytest.raises(ValueError, match="seq_len is 8; .* at least 128"):
        WorldRows(TOKENIZER, 8)


def test_names_are_one_token():
    "The lists are only so easy because a name is one token."
    assert all(len(TOKENIZER.encode(f" {name}")) == 1 for name in [*PEOPLE, *PLACES, *THINGS])


def test_a_line_end_is_encoded_with_its_sentence():
    "One by one other tokens would come out, and the model would learn a text that nobody writes."
    lines = story(Chooser(Random(0)))
    ids, _ = text_row(Chooser(Random(0)), "story", TOKENIZER.encode, 0)
    together = "".join(line.text + "\n" for line in lines)
    apart = [i for line in lines for text in (line.text, "\n") for i in TOKENIZER.encode(text)]
    assert ids[:-1] == TOKENIZER.encode(together) != apart


def test_another_seed_gives_other_rows():
    rows = WorldRows(TOKENIZER, 512)
    a, b = rows.batch(2000, 32), rows.batch(2000, 32, seed=1)
    assert not torch.equal(a["labels"][0, :9], b["labels"][0, :9])
