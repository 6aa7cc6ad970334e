"""From documents to rows: what comes out of a PDF, a split without overlap, shards that survive kill -9, and what is refused."""

import errno
import io
import json
import os
import random
import re
import threading
import time

import numpy as np
import pytest
import torch
from kill import killed
from pypdf import PdfReader, PdfWriter
from pypdf.errors import DependencyError
from tqdm.auto import tqdm

from qwen_nb import data
from qwen_nb.prompt import encode_chat
from qwen_nb.data import (
    Packed,
    Shards,
    cut,
    divide,
    document_mask,
    drop_headers,
    join_lines,
    prepare,
    read_document,
    read_documents,
    split_documents,
    write_pdf,
    write_shards,
)
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def texts():
    return data.world_stories(60, seed=3)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, 400)


@pytest.fixture
def folder(tmp_path, texts, tokenizer):
    write_shards(tmp_path / "d", texts, tokenizer, shard_tokens=1000)
    return tmp_path / "d"


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 450


# ---- documents


@pytest.mark.parametrize("n, seed", [(12, 0), (25, 1), (40, 2), (150, 3), (400, 4)])
def test_a_book_comes_back_as_it_was(tmp_path, n, seed):
    path = data.world_pdf(tmp_path / "a.pdf", n, seed)
    assert cut(read_document(path)) == data.world_stories(n, seed)
    assert path.read_bytes() == data.world_pdf(tmp_path / "b.pdf", n, seed).read_bytes()


@pytest.mark.parametrize("seed", [34, 51])
def test_a_mark_is_no_header(tmp_path, seed):
    "With these seeds it stands at the edge of four pages in nine."
    assert cut(read_document(data.world_pdf(tmp_path / "a.pdf", 300, seed))) == data.world_stories(
        300, seed
    )


def test_a_table_of_contents_is_left_out(tmp_path):
    text = ["Mint grows in the shade...", "Wait. . . .", "It needs water."]
    contents = [
        "Mint . . . . . . . . . 3",
        "Sage ........ iv",
        "Thyme \xb7\xb7\xb7\xb7\xb7\xb7 12",
        "Name: _______",
    ]
    write_pdf(tmp_path / "a.pdf", [["Contents", *contents], text])
    assert read_document(tmp_path / "a.pdf").split("\n") == ["Contents", *text]
    write_pdf(tmp_path / "b.pdf", [contents])
    one_sentence("has no text", lambda: read_document(tmp_path / "b.pdf"))


def test_the_pdf_is_correct(tmp_path):
    lines = ["a (b) c", "back\\slash", "(", ")", "caf\xe9"]
    reader = PdfReader(
        write_pdf(tmp_path / "a.pdf", [lines, [], lines]), strict=True
    )  # strict: the xref table must be right
    assert [page.extract_text().splitlines() for page in reader.pages] == [lines, [], lines]
    raw = (tmp_path / "a.pdf").read_bytes()
    streams = re.findall(rb"/Length (\d+) >>\nstream\n(.*?)\nendstream", raw, re.S)
    assert len(streams) == 3 and all(int(length) == len(body) for length, body in streams)


def test_headers():
    def book(n, header, footer):
        return [
            [header(i), f"text {chr(97 + i % 26)}{i // 26}x", f"more {chr(97 + i % 26)}", footer(i)]
            for i in range(n)
        ]

    inside = [page[1:-1] for page in book(30, str, str)]
    for header, footer in [
        (lambda i: "Title", lambda i: f"{i + 1}"),
        (
            lambda i: f"{i + 11} Left" if i % 2 else f"Right {i + 11}",
            lambda i: f"Page {i + 1} of 30",
        ),
        (lambda i: f"Chapter {i // 6}", lambda i: f"- {i + 1} -"),
        (lambda i: "one" if i < 15 else "two", lambda i: f"| {i + 1} |"),
    ]:
        assert drop_headers(book(30, header, footer)) == inside
    for n in (4, 6, 8, 12, 20):  # the book's title on the left, the chapter's on the right
        assert drop_headers(
            book(
                5 * n,
                lambda i: "My Book" if i % 2 else f"Chapter {i // n + 1}: Herb {'abcde'[i // n]}",
                lambda i: str(i + 1),
            )
        ) == [page[1:-1] for page in book(5 * n, str, str)]
    rules = [
        [f"Rule {i} is {word}.", "text " + word, "more " + word]
        for i, word in enumerate("abcdefghijkl")
    ]
    assert drop_headers(rules) == rules  # sentences, not headers
    alone = [[f"only {chr(97 + i)}" for _ in range(1)] for i in range(9)]
    assert (
        drop_headers(alone) == alone
        and drop_headers([]) == []
        and drop_headers([[], ["x"]]) == [[], ["x"]]
    )
    assert drop_headers([["Title", "7"]] * 5) == [[]] * 5  # nothing but a header and a number
    middle = [[chr(97 + i), chr(98 + i), "same", chr(99 + i), chr(100 + i)] for i in range(12)]
    assert drop_headers(middle) == middle


def test_hyphens_and_lines():
    assert join_lines(["an exam-", "ple"]) == "an example"
    assert join_lines(["self-made and self-", "made"]) == "self-made and self-made"
    assert join_lines(["selfmade and self-", "made"]) == "selfmade and selfmade"
    assert join_lines(["Baden-", "Baden"]) == "Baden-Baden"  # a capital: a name, not a divided word
    assert join_lines(["\u00c4rzte-", "\u00dcbung"]) == "\u00c4rzte-\u00dcbung"
    for word in ("and", "or", "und", "oder"):
        assert join_lines(["pre-", f"{word} postwar"]) == f"pre- {word} postwar"
    assert (
        join_lines(["pre-", "order"]) == "preorder"
        and join_lines(["fav-", "or, a favor"]) == "favor, a favor"
    )
    assert (
        join_lines(["soft\u00ad", "ware"]) == "software" and join_lines(["o\ufb03ce"]) == "office"
    )
    assert (
        join_lines(["a long line which goes on", "and ends.", "Then a new one."])
        == "a long line which goes on and ends.\nThen a new one."
    )
    assert join_lines(
        [
            "A Heading",
            *[
                "which is a much longer line, and then it",
                "goes on to its end, which is here and now.",
            ]
            * 5,
        ]
    ).startswith("A Heading\n")


def test_blanks_of_a_line(tmp_path):
    assert (
        read_document(write_pdf(tmp_path / "a.pdf", [["Max  has \xa0 the\tball. ", "* *  *"]]))
        == "Max has the ball.\n* * *"
    )


def test_refused_documents(tmp_path, monkeypatch):
    pdf = write_pdf(tmp_path / "good.pdf", [["Max has the ball."]])
    for algorithm, password, opens in [("RC4-128", "secret", False), ("RC4-40", "", True)]:
        writer = PdfWriter(clone_from=pdf)
        writer.encrypt(password, owner_password="owner", algorithm=algorithm)
        writer.write(tmp_path / "locked.pdf")
        if opens:
            assert read_document(tmp_path / "locked.pdf") == "Max has the ball."
        else:
            one_sentence(
                "is encrypted: remove the password", lambda: read_document(tmp_path / "locked.pdf")
            )
    for cause, match in [
        (
            "cryptography>=3.1 is required for AES algorithm",
            "encrypted with AES; install cryptography",
        ),
        ("brotli is required", "cannot be read: brotli"),
    ]:

        def missing(path):
            raise DependencyError(cause)

        with monkeypatch.context() as m:
            m.setattr(data, "PdfReader", missing)
            one_sentence(match, lambda: read_document(pdf))
    blank = PdfWriter()
    blank.write(tmp_path / "nothing.pdf")
    one_sentence("has no pages", lambda: read_document(tmp_path / "nothing.pdf"))
    blank.add_blank_page(200, 200)
    blank.write(tmp_path / "scan.pdf")
    one_sentence("no text on its 1 page.*OCR", lambda: read_document(tmp_path / "scan.pdf"))
    raw = pdf.read_bytes()
    for name, content, match in [
        ("a.pdf", b"", "is empty"),
        ("b.pdf", b"hello", "not a PDF"),
        ("c.pdf", raw[:60], "damaged"),
        ("d.txt", b"", "is empty"),
        ("e.md", b" \n\t", "is empty"),
        ("f.txt", b"caf\xe9", "not UTF-8: the byte 0xe9 at position 3"),
        ("g.docx", b"PK", "suffix is '.docx'"),
        ("h", b"x", "suffix is 'missing'"),
    ]:
        (tmp_path / name).write_bytes(content)
        one_sentence(match, lambda: read_document(tmp_path / name))
    (tmp_path / "none").mkdir()
    one_sentence("there is no document in", lambda: read_documents(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "absent.pdf")


def test_damaged_pdfs_raise_value_errors_only(tmp_path):
    raw, rng = (
        write_pdf(tmp_path / "a.pdf", [["Max has the ball."]] * 3).read_bytes(),
        random.Random(0),
    )
    for _ in range(150):
        bad = bytearray(raw[: rng.randrange(20, len(raw))] if rng.random() < 0.5 else raw)
        for _ in range(rng.randrange(6)):
            bad[rng.randrange(9, len(bad))] = rng.randrange(256)
        (tmp_path / "bad.pdf").write_bytes(bad)
        try:
            assert isinstance(read_document(tmp_path / "bad.pdf"), str)
        except ValueError as e:
            assert len(str(e).splitlines()) == 1


def test_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.TXT").write_bytes("\ufeffzw\u00f6lf\r\n".encode())
    (tmp_path / "a.md").write_text("one")
    (tmp_path / ".DS_Store").write_bytes(b"\xff")
    assert read_documents(tmp_path) == [("a.md", "one"), ("sub/b.TXT", "zw\u00f6lf\n")]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.md").write_text("one")
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    one_sentence("cannot read a folder.*locked", lambda: read_documents(tmp_path), OSError)


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


# ---- the split


def test_split(texts):
    for share in (0.05, 0.1, 0.5, 0.9):
        many = data.world_stories(400, seed=11)
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


def test_a_page_will_do(tmp_path):
    "A PDF of one page: its text is one short document, or one line."
    lines = [
        f"On day {i} the ship sailed {i * 7} miles and"
        if i % 2
        else f"rested {i} hours. It was fine."
        for i in range(40)
    ]
    index = prepare(write_pdf(tmp_path / "a.pdf", [lines]), tmp_path / "d", 300)
    assert (
        all(part["documents"] - part["conversations"] > 0 for part in index["parts"].values())
        and index["parts"]["train"]["documents"] > 5
    )
    one = " ".join(lines)
    for text, at_most in [(one, 4000), (one, 150), (one[:450], 4000)]:
        assert all(divide([text], 0.1, at_most=at_most).values())
    one_sentence("--at-most N.*--held-out 0", lambda: divide(["One page. Few words."]))
    assert all(divide(["One page. Few words."], at_most=12).values()) and divide(["One page."], 0)[
        "train"
    ] == ["One page.\n"]
    for at_most in (0, -5):
        one_sentence("at_most is", lambda: divide([one], at_most=at_most))
    one_sentence("held_out is", lambda: divide([one], 1.5))


# ---- shards


@pytest.mark.parametrize("shard_tokens", [1, 7, 1000, 10**6])
def test_round_trip(tmp_path, texts, tokenizer, shard_tokens):
    some, rng = texts[:4] if shard_tokens < 10 else texts, random.Random(0)
    index = write_shards(tmp_path, some, tokenizer, 0.3, shard_tokens)
    parts, names = split_documents(some, 0.3), set()
    for name in parts:
        shards, whole = Shards(tmp_path, name, tokenizer, vocab_size=400), []
        for i, text in enumerate(parts[name]):
            want = tokenizer.encode(text) + [tokenizer.special["<|endoftext|>"]]
            assert shards.document(i).tolist() == want
            whole += want
        assert (
            len(shards) == len(whole)
            and shards[:].tolist() == whole
            and shards.documents == len(parts[name])
        )
        for _ in range(50):
            a, b = (rng.randrange(-len(whole) - 3, len(whole) + 4) for _ in range(2))
            assert shards[a:b].tolist() == whole[a:b]
        assert all(s["count"] == shard_tokens for s in index["parts"][name]["shards"][:-1])
        names |= {
            s["file"] for s in [*index["parts"][name]["shards"], index["parts"][name]["starts"]]
        }
        with pytest.raises(IndexError):
            shards.document(len(parts[name]))
        with pytest.raises(TypeError):
            shards[3]
    assert {p.name for p in tmp_path.iterdir()} == names | {"index.json", index["tokenizer"]}
    assert Shards(tmp_path).tokenizer().encode(texts[0]) == tokenizer.encode(texts[0])


def test_wide_ids(tmp_path, texts):
    "Over 65,536 ids: four bytes each, little-endian."
    big = Tokenizer.train(
        texts, 70_400, special_tokens=["<|endoftext|>", *(f"<|{i}|>" for i in range(70_000))]
    )
    index = write_shards(tmp_path, texts[:3], big, 0)
    big_end = len(big) - 1
    assert (
        index["dtype"] == "<u4"
        and big_end > 2**16
        and Shards(tmp_path).document(0)[-1] == big.special["<|endoftext|>"]
    )
    assert (tmp_path / index["parts"]["train"]["shards"][0]["file"]).stat().st_size == 4 * len(
        Shards(tmp_path)
    )
    assert len(Shards(tmp_path, "held_out")) == 0


def test_nothing_in_a_text_is_special(tmp_path, tokenizer):
    "A document that spells <|endoftext|> does not end there."
    write_shards(tmp_path, ["a <|endoftext|> b\n", "c\n"], tokenizer, 0)
    ids = Shards(tmp_path)[:].tolist()
    assert ids.count(tokenizer.special["<|endoftext|>"]) == 2 and Shards(tmp_path).documents == 2


def test_damage_is_refused(folder, tokenizer):
    files = sorted(folder.glob("*.bin"))
    assert len(files) >= 5
    for file in files:
        part, good = file.name.rsplit("-", 2)[0], file.read_bytes()
        for bad in (good[:-1], good + b"\0\0", good[:7] + bytes([good[7] ^ 4]) + good[8:]):
            file.write_bytes(bad)
            one_sentence("corrupted|bytes; expected", lambda: Shards(folder, part))
        file.unlink()
        one_sentence("is missing", lambda: Shards(folder, part))
        file.write_bytes(good)
        Shards(folder, part)
    one_sentence("no part 'test'", lambda: Shards(folder, "test"))
    index = (folder / "index.json").read_bytes()
    for bad in (
        b"",
        index[:100],
        b"[]",
        b"{}",
        b"3",
        index.replace(b"<u2", b"<u3"),
        index.replace(b'"count"', b'"size"'),
        b"\xff",
        index.replace(b'"documents"', b'"texts"'),
        *(
            re.sub(
                rb'("%s": )("[^"]*"|\d+)' % name,
                lambda m, value=value: m[1] + value,
                index,
                count=1,
            )
            for name, value in [
                (b"tokenizer", b"null"),
                (b"tokenizer_sha256", b"7"),
                (b"vocab_size", b'"x"'),
                (b"documents", b"[]"),
                (b"count", b'"x"'),
                (b"count", b"-1"),
                (b"tokens", b"null"),
                (b"file", b"7"),
                (b"sha256", b"{}"),
            ]
        ),
    ):
        assert bad != index
        (folder / "index.json").write_bytes(bad)
        one_sentence("no index of shards, or damaged", lambda: Shards(folder))
    (folder / "index.json").unlink()
    one_sentence("no prepared data", lambda: Shards(folder), FileNotFoundError)


def test_a_damaged_tokenizer_is_refused(folder, texts):
    path = next(folder.glob("tokenizer-*")) / "tokenizer.json"
    good, whole = path.read_bytes(), Shards(folder)
    Tokenizer.train(texts[::-1] + ["other words"], 400).save(
        path.parent
    )  # as many ids, with other meanings
    for bad in (path.read_bytes(), good[:-9], b"{}", None):
        if bad is None:
            path.unlink()
        else:
            path.write_bytes(bad)
        one_sentence("not the tokenizer that the ids", whole.tokenizer)
        one_sentence("not the tokenizer that the ids", lambda: Shards(folder))
    path.parent.rmdir()
    one_sentence("not the tokenizer that the ids", whole.tokenizer)
    Shards(folder, verify=False)


def test_what_does_not_fit(folder, texts, tokenizer):
    one_sentence(
        "another tokenizer",
        lambda: Shards(folder, tokenizer=Tokenizer.train(texts[::-1] + ["other words"], 400)),
    )
    one_sentence("another tokenizer", lambda: Shards(folder, tokenizer=Tokenizer.train(texts, 300)))
    one_sentence(
        f"{len(tokenizer)} ids, the model only {len(tokenizer) - 1}",
        lambda: Shards(folder, vocab_size=len(tokenizer) - 1),
    )
    one_sentence(
        "no <|endoftext|>",
        lambda: write_shards(folder, texts, Tokenizer.train(texts, 300, special_tokens=())),
    )
    Shards(folder, tokenizer=tokenizer, vocab_size=len(tokenizer))


def test_a_full_disk_loses_nothing(folder, texts, tokenizer, monkeypatch):
    before, calls, real = Shards(folder)[:].tolist(), [0], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(fd))
    write_shards(
        folder.parent / "elsewhere", data.world_stories(60, seed=8), tokenizer, shard_tokens=1000
    )
    n = len(calls) - 1
    assert n == len(
        [p for p in (folder.parent / "elsewhere").rglob("*") if p.is_file()]
    )  # every file is safe from a power cut
    for fail_at in range(1, n + 1):
        calls[0] = 0

        def fsync(fd):
            calls[0] += 1
            if calls[0] == fail_at:
                raise OSError(28, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        one_sentence(
            "No space left.*free some space",
            lambda: write_shards(
                folder, data.world_stories(60, seed=8), tokenizer, shard_tokens=1000
            ),
            OSError,
        )
        monkeypatch.setattr(os, "fsync", real)
        assert Shards(folder)[:].tolist() == before and not list(folder.glob("*.tmp"))
    index = write_shards(folder, texts, tokenizer)
    assert len(list(folder.glob("*.bin"))) == sum(
        len(p["shards"]) + 1 for p in index["parts"].values()
    )  # what the failures left is gone


def test_an_older_pdf_survives(tmp_path, monkeypatch):
    before = write_pdf(tmp_path / "a.pdf", [["old"]]).read_bytes()
    for code, match in [
        (28, "free some space"),
        (errno.EFBIG, "free some space"),
        (errno.EACCES, "check the rights of that folder"),
        (errno.EROFS, "check the rights of that folder"),
    ]:

        def fsync(fd):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)
        one_sentence(match, lambda: data.world_pdf(tmp_path / "a.pdf"), OSError)
        assert (tmp_path / "a.pdf").read_bytes() == before and [
            p.name for p in tmp_path.iterdir()
        ] == ["a.pdf"]
    one_sentence("check the rights", lambda: write_pdf(tmp_path / "a.pdf/b.pdf", []), OSError)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be replaced there")
def test_whoever_reads_the_old_file_keeps_it(tmp_path):
    "Replaced by a rename, not written over."
    data.write_file(tmp_path / "a", b"old")
    with open(tmp_path / "a", "rb") as old:
        data.write_file(tmp_path / "a", b"new!")
        assert old.read() == b"old" and (tmp_path / "a").read_bytes() == b"new!"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_whoever_is_killed_takes_no_lock_with_him(tmp_path):
    "Of the progress bars: their usual lock is shared with every child of a fork, and whoever came after would wait for ever."
    tqdm.get_lock()  # from now on there is one to share
    assert killed(lambda: (tqdm.get_lock().acquire(), time.sleep(60)), tmp_path, after=0.5)
    after = threading.Thread(
        target=lambda: list(tqdm(range(2), disable=False, file=io.StringIO())), daemon=True
    )
    after.start()
    after.join(20)
    assert not after.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kill_9_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    "Killed before each single file operation, then at random moments, while one data set replaces another: what opens is one of the two, whole."
    monkeypatch.setenv("TQDM_DISABLE", "1")
    both = [
        (texts, Tokenizer.train(texts, 320 + n))
        for n in (0, 1)
        for texts in [data.world_stories(30, n)]
    ]
    want, seen, rng, folder = (
        [split_documents(texts) for texts, _ in both],
        [],
        random.Random(0),
        tmp_path / "d",
    )

    def write(n):
        write_shards(folder, *both[n], shard_tokens=600)

    def found():
        got = {}
        for part in ("train", "held_out"):
            tokenizer = Shards(folder, part).tokenizer()
            shards = Shards(folder, part, tokenizer)  # the tokenizer beside the shards is theirs
            got[part] = [tokenizer.decode(shards.document(i)[:-1]) for i in range(shards.documents)]
        return want.index(got)

    at = 1
    while (
        killed(lambda: write(0), folder, at) and not (folder / "index.json").exists()
    ):  # the first time: nothing, until there is all
        one_sentence("no prepared data", lambda: Shards(folder), FileNotFoundError)
        at += 1
    assert at > 10 and found() == 0
    (folder / "mine.bin").write_bytes(b"keep")
    at = 1
    while killed(lambda: write(1), folder, at):
        seen.append(found())
        write(0)
        at += 1
    assert found() == 1 and set(seen) == {0, 1} and seen == sorted(seen) and at > 20
    for k in range(15):

        def for_ever():
            while True:
                write(0)
                write(1)

        assert killed(for_ever, folder, after=rng.random() * 0.2)
        found()
    write(0)
    index = json.loads((folder / "index.json").read_text())
    named = {s["file"] for p in index["parts"].values() for s in [*p["shards"], p["starts"]]}
    assert {p.name for p in folder.iterdir()} == named | {
        "index.json",
        "mine.bin",
        index["tokenizer"],
    }  # the dead left nothing behind


def test_prepare(tmp_path):
    data.world_pdf(tmp_path / "a.pdf", 50)
    index = prepare(tmp_path / "a.pdf", tmp_path / "d", vocab_size=340)
    assert index["vocab_size"] == 340 and len(Shards(tmp_path / "d", "held_out")) > 0
    again = prepare(tmp_path / "a.pdf", tmp_path / "e", vocab_size=340)
    assert json.dumps(index) == json.dumps(again)
    texts = data.world_stories(50)
    train = split_documents(texts)["train"]
    seen = train + data.spoken(data.conversations(train))
    assert (
        data.tokenizer_hash(Tokenizer.train(seen, 340, tags=("<think>", "</think>")))
        == index["tokenizer_sha256"]
    )  # held-out text teaches it nothing
    kept = prepare(tmp_path / "a.pdf", tmp_path / "f", tokenizer=Shards(tmp_path / "d").tokenizer())
    assert kept["parts"] == index["parts"]


# ---- conversations

PROSE = """The Sea
Water is wet. Dr. Wren drank the water at 7 p.m. sharp! He said: "It is bitter." Then he slept.
and this begins in the middle of a sentence. Why did A. Quill ask him? Nobody
* * *
Bees live in hives. A queen lays two thousand eggs a day. Honey never spoils.
* * *
Granite is a hard stone. Masons split it with wedges of dry wood. The wood swells when it gets wet.
* * *
Glass is made from sand. Sand melts at a great heat. Potash makes it melt sooner.
"""


def asked(talks):
    "Every (question, answer) in them."
    for talk in talks:
        assert [m["role"] for m in talk] == ["user", "assistant"] * (len(talk) // 2) and 1 <= len(
            talk
        ) // 2 <= 6
        yield from ((a["content"], b["content"]) for a, b in zip(talk[::2], talk[1::2]))


def test_sentences():
    whole = data.sentences(PROSE)
    assert whole[:4] == [
        "Water is wet.",
        "Dr. Wren drank the water at 7 p.m. sharp!",
        'He said: "It is bitter."',
        "Then he slept.",
    ]
    assert whole[4:6] == ["Why did A. Quill ask him?", "Bees live in hives."] and all(
        s in PROSE for s in whole
    )
    assert data.sentences("") == data.sentences("No end") == data.sentences("Too short.") == []
    text = "It is in vol. 2, Vol. 3 and Fig. 4, cf. Prof. Hill vs. Mr. Lee, No. 5, ca. 1900, e.g. A and i.e. B, Nr. 6, etc. Then it rained. Is it I? Yes it is."
    assert data.sentences(text) == [
        text[: text.index(" Is")].partition("Then")[0] + "Then it rained.",
        "Is it I?",
        "Yes it is.",
    ]
    assert data.sentences(
        "\u6c34\u662f\u6e7f\u7684\u3002\u201c\u4ed6\u559d\u6c34\u3002\u201d\u4ed6\u7761\u4e86\uff01"
    ) == [
        "\u6c34\u662f\u6e7f\u7684\u3002",
        "\u201c\u4ed6\u559d\u6c34\u3002\u201d",
        "\u4ed6\u7761\u4e86\uff01",
    ]
    assert data.sentences(
        "\u092a\u093e\u0928\u0940 \u0917\u0940\u0932\u093e \u0928\u093e\u092e\u0964 \u0648 \u0647\u0644 \u0647\u0648\u061f"
    ) == [
        "\u092a\u093e\u0928\u0940 \u0917\u0940\u0932\u093e \u0928\u093e\u092e\u0964",
        "\u0648 \u0647\u0644 \u0647\u0648\u061f",
    ]


def test_a_document_answers_its_own_questions():
    texts = cut(PROSE)
    answers, whole = data.answers_to(texts), data.sentences(PROSE)
    assert (
        answers["water"] == "Water is wet."
        and answers["Wren"] == whole[1]
        and answers["wood"] == "The wood swells when it gets wet."
    )  # it begins with the word; another one, before it, only has it
    assert (
        "Sand" not in answers
        and answers["sand"] == "Sand melts at a great heat."
        and "said" in answers
        and "the" not in answers
    )
    talks, told, nothing = data.conversations(texts, times=2), [], []
    for question, answer in asked(talks):
        form, word = next(
            (form, m[1])
            for form in data.QUESTIONS
            if (m := re.fullmatch(re.escape(form).replace(r"\{\}", r"(\w+)"), question))
        )
        begin, answer = (
            answer[: len(data.ANSWER.format(word, ""))],
            answer[len(data.ANSWER.format(word, "")) :],
        )
        assert begin == data.ANSWER.format(word, "")
        if answer == data.NOTHING:
            assert not re.search(rf"\b{word}\b", PROSE, re.I)
            nothing.append(word)
            continue
        assert answer in whole and re.search(rf"\b{word}\b", answer, re.I)
        told.append((form, word, answer))
    assert sorted(told) == sorted(
        (form, *pair) for form in data.QUESTIONS for pair in answers.items() for _ in range(2)
    )  # each word, each way, twice
    assert 0 < len(nothing) <= len(told) / 2 and {len(t) // 2 for t in talks} == {1, 2, 3, 4, 5, 6}
    assert (
        data.conversations(texts, times=2) == talks != data.conversations(texts, seed=1, times=2)
        and len([*asked(data.conversations(texts))]) > 3 * len([*asked(talks)])
        and data.conversations(texts, ()) == []
    )
    for short in ([], ["A heading\n"], ["One two.\n"], ["So it is on a.\n"]):
        assert data.conversations(short) == []
    assert not data.answers_to(["A " + "very " * 60 + "long one. "])


def test_held_out_asks_what_train_does_not_answer(tmp_path):
    train = ["Water is very wet. The sea has salt.\n"]
    talks = data.conversations(
        ["The water was cold there. Salt, and Granite too, was sold there.\n"],
        times=1,
        taken=data.answers_to(train),
    )
    words = [re.search(r"(\w+)\W$", question)[1].lower() for question, _ in asked(talks)]
    assert {"cold", "granite", "sold"} <= {*words} and not {"water", "salt", "very"} & {*words}
    assert all(words.count(word) == len(data.QUESTIONS) for word in ("cold", "granite", "sold"))
    (tmp_path / "a.txt").write_text("\n* * *\n".join(data.world_stories(80)))
    parts = prepare(tmp_path / "a.txt", tmp_path / "d", 300)["parts"]
    learnt, kept = (
        data.answers_to(side) for side in split_documents(data.world_stories(80)).values()
    )
    assert (
        kept.keys() <= learnt.keys()
        and parts["train"]["conversations"] > 50
        and not parts["held_out"]["conversations"]
    )


def test_conversations_in_shards(tmp_path):
    "They follow the documents of their part, are made from these alone, and are the ids that `encode_chat` gives."
    (tmp_path / "a.txt").write_text(PROSE)
    index = prepare(tmp_path / "a.txt", tmp_path / "d", 300, held_out=0.4)
    parts, whole = split_documents(cut(PROSE), 0.4), {}
    for name, texts in parts.items():
        shards, talks = (
            Shards(tmp_path / "d", name),
            data.conversations(
                texts,
                **({} if name == "train" else dict(times=1, taken=data.answers_to(parts["train"]))),
            ),
        )
        tokenizer = shards.tokenizer()
        assert (
            {"<think>", "</think>"} <= tokenizer.special.keys()
            and len(talks) > 5
            and index["parts"][name]["conversations"] == len(talks)
        )
        want = [tokenizer.encode(t) for t in texts] + [
            encode_chat(tokenizer, t, "qwen3", add_generation_prompt=False) for t in talks
        ]
        assert [shards.document(i).tolist() for i in range(shards.documents)] == [
            ids + [tokenizer.special["<|endoftext|>"]] for ids in want
        ]
        end = tokenizer.special["<|im_end|>"]
        assert shards[:].tolist().count(end) == 2 * len([*asked(talks)])
        whole[name] = {a.partition(": ")[2] for _, a in asked(talks)} - {data.NOTHING}
        assert whole[name] <= {s for t in texts for s in data.sentences(t)}
    assert whole["train"] and whole["held_out"] and not whole["train"] & whole["held_out"]
    assert json.dumps(prepare(tmp_path / "a.txt", tmp_path / "e", 300, held_out=0.4)) == json.dumps(
        index
    )
    none = prepare(tmp_path / "a.txt", tmp_path / "f", 300, held_out=0.4, questions=())
    assert [p["conversations"] for p in none["parts"].values()] == [0, 0] and Shards(
        tmp_path / "f"
    ).documents == len(parts["train"])
    assert "<think>" not in Shards(tmp_path / "f").tokenizer().special
    plain = Tokenizer.train(cut(PROSE), 300, special_tokens=["<|endoftext|>"])
    one_sentence(
        "no <|im_end|>, <|im_start|>, which conversations need",
        lambda: prepare(tmp_path / "a.txt", tmp_path / "g", tokenizer=plain),
    )
    prepare(tmp_path / "a.txt", tmp_path / "g", tokenizer=plain, questions=())
    (tmp_path / "b.txt").write_text("one\n* * *\ntwo\n")
    assert [
        p["conversations"]
        for p in prepare(tmp_path / "b.txt", tmp_path / "h", 300)["parts"].values()
    ] == [0, 0]  # nothing to ask about


@pytest.mark.parametrize(
    "text, words, said",
    [
        ("one\n* * *\ntwo\n", [], True),
        ("one\n* * *\ntwo\n", ["--no-questions"], False),
        (PROSE, [], False),
    ],
)
def test_no_conversations_is_said(tmp_path, capsys, monkeypatch, text, words, said):
    from qwen_nb import cli

    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with pytest.raises(SystemExit) as e:
        cli.main(["data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "d"), *words])
    assert (
        not e.value.code and ("No conversations could be made" in capsys.readouterr().out) == said
    )


# ---- rows


@pytest.mark.parametrize("seq_len", [1, 5, 64, 700])
def test_rows(folder, seq_len):
    shards = Shards(folder)
    rows, ends = Packed(shards, seq_len), set(shards.starts[1:].tolist())
    ids = shards[:].tolist()
    assert len(rows) == (len(ids) - 1) // seq_len
    for i in range(len(rows)):
        row, document, position = rows.row(i), 0, 0
        for t in range(seq_len):
            k = i * seq_len + t
            if k in ends and t:
                document, position = document + 1, 0
            assert (
                row["input_ids"][t] == ids[k]
                and row["document_ids"][t] == document
                and row["position_ids"][t] == position
            )
            assert row["labels"][t] == (-100 if k + 1 in ends else ids[k + 1])
            position += 1
    one_sentence("use a shorter seq_len", lambda: Packed(shards, len(ids)))
    for bad in (0, -3):
        one_sentence("seq_len is", lambda: Packed(shards, bad))
    assert len(Packed(shards, len(ids) - 1)) == 1


def test_a_step_has_its_batch(folder):
    rows = Packed(Shards(folder), 64)
    steps, fresh = [rows.batch(s, 6, seed=1) for s in range(20)], Packed(Shards(folder), 64)
    for s in (13, 2, 19):
        assert all(torch.equal(fresh.batch(s, 6, seed=1)[k], steps[s][k]) for k in steps[s])
    numbers = np.concatenate([rows.order(1, e) for e in range(3)])
    assert (
        all(sorted(rows.order(1, e)) == list(range(len(rows))) for e in range(3))
        and len({tuple(rows.order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    )
    assert torch.equal(
        torch.cat([s["input_ids"] for s in steps]),
        torch.stack([rows.row(i)["input_ids"] for i in numbers[:120]]),
    )


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_no_document_sees_another(folder, dtype, close):
    torch.manual_seed(0)
    model = Qwen(QwenConfig(400, 64, 96, 3, 4, 2, 16)).to(dtype)
    batch = Packed(Shards(folder), 300).rows([0, 1, 2])
    ids, documents, mask = (
        batch["input_ids"],
        batch["document_ids"],
        document_mask(batch["document_ids"]),
    )
    with torch.no_grad():
        got = model.head(model.model(ids, batch["position_ids"], mask))
        open_ = model.head(model.model(ids, batch["position_ids"], None))
        for b in range(3):
            assert documents[b].max() > 0
            for d in documents[b].unique():
                mine = documents[b] == d
                alone = model(ids[b : b + 1, mine])[0]
                assert (got[b, mine] - alone).abs().max() < close
                if d:
                    assert (open_[b, mine] - alone).abs().max() > 1e-3
