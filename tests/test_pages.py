"""What on a page is text, and in which order: headers, columns, tables, divided words."""

import errno
import os
import re

import pytest
from pypdf import PdfReader

from qwen_nb.pages import drop_headers, join_lines, page_lines, world_pdf, write_pdf


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 450


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
        one_sentence(match, lambda: world_pdf(tmp_path / "a.pdf"), OSError)
        assert (tmp_path / "a.pdf").read_bytes() == before and [
            p.name for p in tmp_path.iterdir()
        ] == ["a.pdf"]
    one_sentence("check the rights", lambda: write_pdf(tmp_path / "a.pdf/b.pdf", []), OSError)


def read_pages(path):
    "The lines of each page, as `read_pdf` gets them."
    pages = []
    for page in PdfReader(path).pages:
        wide = page.extract_text(extraction_mode="layout", layout_mode_space_vertically=False)
        pages.append(page_lines(page.extract_text(), wide))
    return pages


LEFT = ["The ship left the har-", "bour in the evening and", "went north for a week. On",
        "the third day the wind", "turned against her and", "she lost her masts. All"]  # fmt: skip
RIGHT = ["of them rowed to a small", "island. There was water", "on it, and a tree with",
         "sweet fruit. Nobody has", "ever told where it is,", "and nobody asked them."]  # fmt: skip


def columns(left, right, top=700, gap=250):
    rows = []
    for i, (a, b) in enumerate(zip(left, right)):
        rows += [(60, top - 14 * i, a), (60 + gap, top - 14 * i, b)]
    return rows


@pytest.mark.parametrize("by_row", [True, False])
def test_two_columns(tmp_path, by_row):
    "Painted line by line across the page, or one column after the other."
    page = columns(LEFT, RIGHT)
    if not by_row:
        page = page[::2] + page[1::2]
    page = [(60, 760, "The Wreck of the Swallow, by one who saw it"), *page]
    (lines,) = read_pages(write_pdf(tmp_path / "a.pdf", [page]))
    assert lines[1:] == LEFT + RIGHT
    text = join_lines(lines[1:])
    assert "left the harbour in the evening and went north for a week. On the third" in text
    assert "she lost her masts. All of them rowed to a small island. There" in text


def test_columns_of_different_length(tmp_path):
    page = columns(LEFT, RIGHT)
    page = [*page, (60, 616, "left alone here"), (60, 602, "and here.")]
    (lines,) = read_pages(write_pdf(tmp_path / "a.pdf", [page]))
    assert lines == [*LEFT, "left alone here", "and here.", *RIGHT]


def test_a_header_of_three_lines_over_columns(tmp_path):
    pages = []
    for n in range(1, 7):
        titles = ["A. Quill", ("The Swallow", "Part Two")[n % 2], "Second edition"]
        header = [(60, 800 - 14 * i, title) for i, title in enumerate(titles)]
        left = [f"{line} {'abcdef'[n - 1]}" for line in LEFT]
        body = columns(left, RIGHT[n - 1 :] + RIGHT[: n - 1])
        pages.append([*header, *body, (300, 60, f"- {n} -")])
    found = drop_headers(read_pages(write_pdf(tmp_path / "a.pdf", pages)))
    for n, page in enumerate(found, 1):
        assert page[0].startswith(LEFT[0]) and len(page) == 12, page


def test_a_table_is_rows(tmp_path):
    page = [(60, 780, "Of the metals that are listed below, the heavier one is")]
    cells = [("Metal", "Density", "Melts at"), ("Iron", "7.87", "1538"), ("Lead", "11.34", "327")]
    for i, row in enumerate(cells):
        page += [(60 + 120 * k, 760 - 14 * i, cell) for k, cell in enumerate(row)]
    page += [(60, 710, "also the one that melts first."), (60, 696, "Both are old.")]
    (lines,) = read_pages(write_pdf(tmp_path / "a.pdf", [page]))
    assert join_lines(lines).split("\n") == [
        "Of the metals that are listed below, the heavier one is also the one that melts first.",
        "Metal | Density | Melts at",
        "Iron | 7.87 | 1538",
        "Lead | 11.34 | 327",
        "Both are old.",
    ]


def test_a_table_of_contents_is_no_table():
    wide = ["1      The sea . . . . . . . .      3", "2      The land . . . . . . .      9"]
    plain = "1 The sea . . . . . . . . 3\n2 The land . . . . . . . 9"
    assert page_lines(plain, "\n".join(wide)) == plain.split("\n")


def test_a_list_of_names_and_numbers_is_no_two_columns(tmp_path):
    page = []
    for i in range(12):
        page += [(60, 700 - 14 * i, f"Name {i}"), (310, 700 - 14 * i, str(100 + i))]
    (lines,) = read_pages(write_pdf(tmp_path / "a.pdf", [page]))
    assert lines == [f"Name {i} {100 + i}" for i in range(12)]


def test_lines_go_on():
    long = "a line that is as long as the paper is wide, with"
    for before, after, joined in [
        (f"{long} Dr.", "Wren at the helm.", " "),  # no sentence ends there
        (f"{long} him;", "nobody knew.", " "),
        (f"{long} him:", "The list.", "\n"),
        (f"{long} him.", "nobody knew.", "\n"),
        (f"{long} him\u2014", "and her.", ""),
        ("a shorter line of", "small letters", " "),
        ("A heading", "The text begins", "\n"),
    ]:
        lines = [before, after, *[f"{long} text."] * 8]
        assert join_lines(lines).startswith(f"{before}{joined}{after}\n"), (before, after)


def test_words_divided_around_a_table():
    lines = ["a line that is as long as the paper with an exam-", "A | B | C", "1 | 2 | 3",
             "ple in it, which is a word that was divided here."]  # fmt: skip
    assert join_lines(lines).split("\n")[0].endswith("paper with an example in it, which is a word "
                                                     "that was divided here.")
