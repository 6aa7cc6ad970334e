"""A text becomes documents on two sides: what is cut where, and that nothing is on both."""

import numpy as np
import pytest

from qwen_nb.data import cut, divide, fingerprint, held_out_share, split_documents, world_stories


@pytest.fixture(scope="module")
def texts():
    return world_stories(60, seed=3)


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 450


def test_cut():
    assert cut("a\n* * *\n\n b\n  * * *  \n* * *\nc * * * d") == ["a\n", "b\n", "c * * * d\n"]
    text = "".join(f"line {i}\n" for i in range(500))
    pieces = cut(text, at_most=100)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 100 and len(pieces) > 40


@pytest.mark.parametrize(
    "text, end",
    [
        ("a b c. " * 2000, "."),
        ("word " * 3000, "d"),
        ("x" * 20_000, "x"),
        ("\u6c34\u662f\u6e7f\u7684\u3002" * 3000, "\u3002"),
        ("a \u0939\u0948\u0964 " * 3000, "\u0964"),
    ],
)
def test_a_long_line_is_cut(text, end):
    "At the ends of sentences, or else at blanks, or else anywhere; nothing is lost."
    for at_most in (2, 37, 400, 4000):
        pieces = cut(text, at_most=at_most)
        assert max(map(len, pieces)) <= at_most and "".join("".join(pieces).split()) == "".join(
            text.split()
        )
        if at_most > 30:
            assert (
                all(piece[-2] == end for piece in pieces)
                and np.mean([*map(len, pieces)]) > 0.7 * at_most
            )
    assert cut("One.  Two three.", at_most=8) == ["One.\n", "Two\n", "three.\n"]


def test_split(texts):
    for share in (0.05, 0.1, 0.5, 0.9):
        many = world_stories(400, seed=11)
        parts = split_documents(many + [t.replace("\n", "\r\n") for t in many[:50]], share)
        assert not set(parts["train"]) & set(parts["held_out"]) and sorted(
            parts["train"] + parts["held_out"]
        ) == sorted(set(many))
        assert abs(len(parts["held_out"]) / 400 - share) < 0.08
        fewer = split_documents(many[100:300], share)
        assert set(fewer["held_out"]) <= set(parts["held_out"]) and set(fewer["train"]) <= set(
            parts["train"]
        )
    for n in range(2, 12):
        for share in (0.01, 0.99):
            assert all(split_documents(texts[:n], share).values())
    assert split_documents(texts[:1], 0) == dict(train=texts[:1], held_out=[])
    one_sentence(
        "one document.*--at-most N.*--held-out 0",
        lambda: split_documents([texts[0], " " + texts[0]]),
    )
    one_sentence("no documents", lambda: split_documents([]))
    for bad in (1, -0.1, 7):
        one_sentence("held_out is", lambda: split_documents(texts, bad))


def test_no_file_is_on_both_sides():
    files = ["".join(f"File {n}, line {i}.\n" for i in range(400)) for n in range(12)]

    def of(side):
        return {int(piece.split()[1][:-1]) for piece in side}

    parts = divide(files, 0.2)
    assert not of(parts["train"]) & of(parts["held_out"]) and of(parts["train"]) | of(
        parts["held_out"]
    ) == {*range(12)}
    assert (
        "".join(sorted(parts["train"] + parts["held_out"]))
        == "".join(sorted(p for f in files for p in cut(f)))
        and len(parts["held_out"]) > 2
    )
    shared = "".join(f"Licence, line {i}.\n" for i in range(200))
    parts = divide(
        [shared + "* * *\n" + f for f in files], 0.2, mark="", at_most=len(shared)
    )  # pieces that are the same stay on one side, once
    assert (
        not set(parts["train"]) & set(parts["held_out"])
        and (parts["train"] + parts["held_out"]).count(shared) == 1
    )
    for few in (
        files[:9],
        files[:1] * 12,
        [files[0] * 3] + files,
        [shared + f for f in files[:3]],
    ):  # few, copies, a very long one: cut first
        parts = divide(few, 0.2)
        assert (
            parts["train"]
            and parts["held_out"]
            and not set(parts["train"]) & set(parts["held_out"])
        )
    assert sum(map(len, divide([files[0] * 3] + files, 0.2)["train"])) > 0.6 * sum(map(len, files))
    assert divide(files[:1], 0) == dict(train=cut(files[0]), held_out=[])


def test_a_short_text_is_divided():
    lines = [
        f"On day {i} the ship sailed {i * 7} miles and"
        if i % 2
        else f"rested {i} hours. It was fine."
        for i in range(40)
    ]
    one = " ".join(lines)
    for text, at_most in [(one, 4000), (one, 150), (one[:450], 4000)]:
        assert all(divide([text], 0.1, at_most=at_most).values())
    one_sentence("--at-most N.*--held-out 0", lambda: divide(["One page. Few words."]))
    assert all(divide(["One page. Few words."], at_most=12).values())
    assert divide(["One page."], 0)["train"] == ["One page.\n"]
    for at_most in (0, -5):
        one_sentence("at_most is", lambda: divide([one], at_most=at_most))
    one_sentence("held_out is", lambda: divide([one], 1.5))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.5])
def test_of_one_book_the_share_that_was_asked_for_is_held_out(share):
    "By hashes alone a tenth could be nothing, or four tenths of a book."
    found = []
    for seed in range(60):
        book = "".join(world_stories(8 + seed, seed))
        parts = divide([book], share, mark="")
        n = sum(map(len, parts.values()))
        assert len(parts["held_out"]) == np.ceil(n * share - 1e-9)
        codes = sorted(fingerprint(text) for part in parts.values() for text in part)
        assert {fingerprint(text) for text in parts["held_out"]} == {
            *codes[: len(parts["held_out"])]
        }
        found.append(held_out_share(parts))
    assert max(found) < max(0.15, share + 0.08), max(found)
    assert np.median(found) > 0.8 * share


def test_the_share_is_one_of_the_text():
    assert held_out_share(dict(train=["x" * 30], held_out=["y" * 10])) == 0.25
    assert held_out_share(dict(train=["a"], held_out=[])) == 0
    assert held_out_share(dict(train=[], held_out=[])) == 0


def test_exactly_a_tenth_of_thirty():
    "0.1 * 30 is a little over 3 in float64."
    parts = split_documents([f"text number {i}" for i in range(30)], 0.1, exact=True)
    assert len(parts["held_out"]) == 3
