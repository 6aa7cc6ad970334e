"""From files to shards: what is read, what is refused and how, and conversations about a text."""

import json
import os
import random
import re

import pytest
from pypdf import PdfWriter
from pypdf.errors import DependencyError

from qwen_nb import documents
from qwen_nb.data import cut, split_documents, world_stories
from qwen_nb.documents import (
    ANSWER_FORM,
    NOTHING,
    QUESTIONS,
    answers_to,
    conversations,
    prepare,
    read_document,
    read_documents,
    sentences,
    talk_texts,
)
from qwen_nb.pages import world_pdf, write_pdf
from qwen_nb.prompt import encode_chat
from qwen_nb.rows import IGNORED, Packed
from qwen_nb.shards import Shards, tokenizer_hash
from qwen_nb.tokenizer import Tokenizer


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 450


@pytest.mark.parametrize("n, seed", [(12, 0), (25, 1), (40, 2), (150, 3), (400, 4)])
def test_a_book_comes_back_as_it_was(tmp_path, n, seed):
    path = world_pdf(tmp_path / "a.pdf", n, seed)
    assert cut(read_document(path)) == world_stories(n, seed)
    assert path.read_bytes() == world_pdf(tmp_path / "b.pdf", n, seed).read_bytes()


@pytest.mark.parametrize("seed", [34, 51])
def test_a_mark_is_no_header(tmp_path, seed):
    "With these seeds it stands at the edge of four pages in nine."
    assert cut(read_document(world_pdf(tmp_path / "a.pdf", 300, seed))) == world_stories(
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
            m.setattr(documents, "PdfReader", missing)
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


def test_prepare(tmp_path):
    world_pdf(tmp_path / "a.pdf", 50)
    index = prepare(tmp_path / "a.pdf", tmp_path / "d", vocab_size=340)
    assert index["vocab_size"] == 340 and len(Shards(tmp_path / "d", "held_out")) > 0
    again = prepare(tmp_path / "a.pdf", tmp_path / "e", vocab_size=340)
    assert json.dumps(index) == json.dumps(again)
    texts = world_stories(50)
    train = split_documents(texts)["train"]
    seen = train + talk_texts(conversations(train))
    assert (
        tokenizer_hash(Tokenizer.train(seen, 340, tags=("<think>", "</think>")))
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
    whole = sentences(PROSE)
    assert whole[:4] == [
        "Water is wet.",
        "Dr. Wren drank the water at 7 p.m. sharp!",
        'He said: "It is bitter."',
        "Then he slept.",
    ]
    assert whole[4:6] == ["Why did A. Quill ask him?", "Bees live in hives."] and all(
        s in PROSE for s in whole
    )
    assert sentences("") == sentences("No end") == sentences("Too short.") == []
    text = (
        "It is in vol. 2, Vol. 3 and Fig. 4, cf. Prof. Hill vs. Mr. Lee, No. 5, ca. 1900, "
        "e.g. A and i.e. B, Nr. 6, etc. Then it rained. Is it I? Yes it is."
    )
    assert sentences(text) == [
        text[: text.index(" Is")].partition("Then")[0] + "Then it rained.",
        "Is it I?",
        "Yes it is.",
    ]
    assert sentences(
        "\u6c34\u662f\u6e7f\u7684\u3002\u201c\u4ed6\u559d\u6c34\u3002\u201d\u4ed6\u7761\u4e86\uff01"
    ) == [
        "\u6c34\u662f\u6e7f\u7684\u3002",
        "\u201c\u4ed6\u559d\u6c34\u3002\u201d",
        "\u4ed6\u7761\u4e86\uff01",
    ]
    assert sentences(
        "\u092a\u093e\u0928\u0940 \u0917\u0940\u0932\u093e \u0928\u093e\u092e\u0964 "
        "\u0648 \u0647\u0644 \u0647\u0648\u061f"
    ) == [
        "\u092a\u093e\u0928\u0940 \u0917\u0940\u0932\u093e \u0928\u093e\u092e\u0964",
        "\u0648 \u0647\u0644 \u0647\u0648\u061f",
    ]


def test_a_document_answers_its_own_questions():
    texts = cut(PROSE)
    answers, whole = answers_to(texts), sentences(PROSE)
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
    talks, told, nothing = conversations(texts, times=2), [], []
    for question, answer in asked(talks):
        form, word = next(
            (form, m[1])
            for form in QUESTIONS
            if (m := re.fullmatch(re.escape(form).replace(r"\{\}", r"(\w+)"), question))
        )
        begin, answer = (
            answer[: len(ANSWER_FORM.format(word, ""))],
            answer[len(ANSWER_FORM.format(word, "")) :],
        )
        assert begin == ANSWER_FORM.format(word, "")
        if answer == NOTHING:
            assert not re.search(rf"\b{word}\b", PROSE, re.I)
            nothing.append(word)
            continue
        assert answer in whole and re.search(rf"\b{word}\b", answer, re.I)
        told.append((form, word, answer))
    assert sorted(told) == sorted(
        (form, *pair) for form in QUESTIONS for pair in answers.items() for _ in range(2)
    )  # each word, each way, twice
    assert 0 < len(nothing) <= len(told) / 2 and {len(t) // 2 for t in talks} == {1, 2, 3, 4, 5, 6}
    assert (
        conversations(texts, times=2) == talks != conversations(texts, seed=1, times=2)
        and len([*asked(conversations(texts))]) > 3 * len([*asked(talks)])
        and conversations(texts, ()) == []
    )
    for short in ([], ["A heading\n"], ["One two.\n"], ["So it is on a.\n"]):
        assert conversations(short) == []
    assert not answers_to(["A " + "very " * 60 + "long one. "])


def test_held_out_asks_what_train_does_not_answer(tmp_path):
    train = ["Water is very wet. The sea has salt.\n"]
    talks = conversations(
        ["The water was cold there. Salt, and Granite too, was sold there.\n"],
        times=1,
        taken=answers_to(train),
    )
    words = [re.search(r"(\w+)\W$", question)[1].lower() for question, _ in asked(talks)]
    assert {"cold", "granite", "sold"} <= {*words} and not {"water", "salt", "very"} & {*words}
    assert all(words.count(word) == len(QUESTIONS) for word in ("cold", "granite", "sold"))
    (tmp_path / "a.txt").write_text("\n* * *\n".join(world_stories(80)))
    parts = prepare(tmp_path / "a.txt", tmp_path / "d", 300)["parts"]
    learnt, kept = (
        answers_to(side) for side in split_documents(world_stories(80)).values()
    )
    assert (
        kept.keys() <= learnt.keys()
        and parts["train"]["conversations"] > 50
        and not parts["held_out"]["conversations"]
    )


def test_conversations_in_shards(tmp_path):
    "They follow their part's documents, are made from these alone, and encoded as a chat."
    (tmp_path / "a.txt").write_text(PROSE)
    index = prepare(tmp_path / "a.txt", tmp_path / "d", 300, held_out=0.4)
    parts, whole = split_documents(cut(PROSE), 0.4), {}
    for name, texts in parts.items():
        shards, talks = (
            Shards(tmp_path / "d", name),
            conversations(
                texts,
                **({} if name == "train" else dict(times=1, taken=answers_to(parts["train"]))),
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
        whole[name] = {a.partition(": ")[2] for _, a in asked(talks)} - {NOTHING}
        assert whole[name] <= {s for t in texts for s in sentences(t)}
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


# ---- what is named


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.txt", "Max has the ball.".encode("utf-16"), "is UTF-16, not UTF-8: save it as UTF-8"),
        ("b.md", b"\xfe\xff\0M\0a", "is UTF-16"),
        ("c.txt", "Max".encode("utf-16-le"), "NUL byte at position 1.*save it as text in UTF-8"),
        ("d.txt", b"Max has\0", "NUL byte at position 7"),
        ("e.docx", b"PK\3\4", "'.docx', a Word document: open it .* save it as .pdf, or as .txt"),
        ("f.txt", b"PK\3\4word/document.xml", "is no text but a .docx, .odt or another zip"),
        ("g.ODT", b"PK\3\4", "an OpenDocument text: open it"),
    ],
)
def test_what_looks_like_text_is_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    one_sentence(match, lambda: read_document(tmp_path / name))


def test_a_word_document_in_a_folder_is_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Max has the ball.")
    (tmp_path / "b.docx").write_bytes(b"PK")
    assert [name for name, _ in read_documents(tmp_path)] == ["a.txt"]
    said = capsys.readouterr().out
    assert said.startswith("left out: b.docx, a Word document: open it") and said.count("\n") == 1


@pytest.mark.parametrize("algorithm", ["AES-128", "AES-256", "AES-256-R5"])
def test_aes_without_a_user_password_opens(tmp_path, algorithm):
    pdf = write_pdf(tmp_path / "a.pdf", [["Max has the ball."]])
    for password in ("", "secret"):
        writer = PdfWriter(clone_from=pdf)
        writer.encrypt(password, owner_password="owner", algorithm=algorithm)
        writer.write(tmp_path / "b.pdf")
        if password:
            one_sentence("remove the password first", lambda: read_document(tmp_path / "b.pdf"))
        else:
            assert read_document(tmp_path / "b.pdf") == "Max has the ball."


# ---- a printed book

WORDS = "harbour evening sailing northward afterwards mountain remember lanterns together".split()


def written(n, seed=0):
    "n sentences of 6 to 20 words, in paragraphs of five; each is another."
    rng, found = random.Random(seed), []
    for i in range(n):
        words = [rng.choice(WORDS) for _ in range(rng.randint(5, 19))]
        found.append(f"Sentence{'abcdefghij'[i % 10]}{i} {' '.join(words)}.")
    return [" ".join(found[i : i + 5]) for i in range(0, n, 5)]


def lines_of(paragraph, width):
    "Lines of at most `width` characters; long words are divided."
    lines, now = [], ""
    for word in paragraph.split():
        room = width - len(now) - bool(now)
        if len(word) <= room:
            now = f"{now} {word}".strip()
        elif word.isalpha() and room > 4:
            k = min(room - 1, len(word) - 3)
            lines.append(f"{now} {word[:k]}-")
            now = word[k:]
        else:
            lines.append(now)
            now = word
    return [*lines, now]


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_sentences_of_a_printed_book_come_back_whole(tmp_path, two, table):
    "Headers of three lines, hyphens, and with or without columns and tables."
    paragraphs = written(300)
    lines = [line for p in paragraphs for line in lines_of(p, 38 if two else 76)]
    per_page, pages = 60 if two else 30, []
    for number, first in enumerate(range(0, len(lines), per_page), 1):
        body, y, page = lines[first : first + per_page], 730, []
        titles = ["B. Writer", "The Book" if number % 2 else f"Chapter {number // 4}", "Edition 3"]
        page += [(60, 800 - 14 * i, title) for i, title in enumerate(titles)]
        for i in range(30):
            if table and i == (0 if two else 13):
                for row in range(3):
                    page += [(60 + 130 * k, y - 14 * row, f"c{row}{k}") for k in range(3)]
                y -= 42
            page += [(60, y, line) for line in body[i : i + 1]]
            if two:
                page += [(320, y, line) for line in body[30 + i : 31 + i]]
            y -= 14
        pages.append([*page, (290, 60, f"- {number} -")])
    text = read_document(write_pdf(tmp_path / "a.pdf", pages))
    true = {s for p in paragraphs for s in sentences(p)}
    whole = len(true & set(sentences(text))) / len(true)
    assert len(true) == 300 and whole > 0.98, whole


def test_only_answers_are_graded_and_none_is_cut(tmp_path):
    "From a text to rows: what `qwen-nb data` writes and `qwen-nb train` reads."
    (tmp_path / "a.txt").write_text("\n".join(written(60)))
    index = prepare(tmp_path / "a.txt", tmp_path / "d", 400)
    assert 0.05 < index["held_out_share"] < 0.2
    shards = Shards(tmp_path / "d")
    rows, tokenizer = Packed(shards, 512), shards.tokenizer()
    answers, ends = 0, tokenizer.special["<|im_end|>"]
    for i in range(rows.text_rows, len(rows)):
        row = rows.row(i)
        graded = row["labels"][row["labels"] != IGNORED].tolist()
        said = tokenizer.decode(graded)
        assert "Tell me" not in said and "What does" not in said and "<|im_start|>" not in said
        assert "<think>" not in said
        answers += graded.count(ends)
    n = sum(
        shards.document(i).tolist().count(ends) // 2
        for i in range(shards.documents - shards.conversations, shards.documents)
        if len(shards.document(i)) <= 512
    )
    assert answers == n > 100
