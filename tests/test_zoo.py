"""The zoo of mistakes as a whole: how many there are, what a stub is told, what help there is.

That each mistake is called by its name, and that pairs are, the pages of mistakes check themselves.
"""

import ast
import inspect
import textwrap

import pytest

from qwen_nb.build import help_steps
from qwen_nb.diagnose import diagnose
from qwen_nb.edition import body_lines, is_comment
from qwen_nb.mine import ZOO, all_pieces

PIECES = list(all_pieces().values())
each_piece = pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)


def test_how_many_there_are():
    mistakes = [mistake for piece in PIECES for mistake in piece.mistakes]
    public = [mistake for mistake in mistakes if mistake.public]
    assert len(PIECES) >= 95 and len({piece.lesson for piece in PIECES}) >= 32
    assert len(mistakes) > 700 and len(public) >= 280   # as the README says
    assert all(len(piece.mistakes) >= 4 for piece in PIECES)


def test_every_page_is_in_the_list():
    from test_reading import NOTEBOOKS

    exports = "".join(path.read_text(encoding="utf-8") for path in NOTEBOOKS)
    assert all(f"default_exp {module}\"" in exports for module in ZOO)
    assert exports.count("default_exp zoo_") == len(ZOO), "a page of mistakes is not in mine.ZOO"


@each_piece
def test_a_stub_is_told_what_to_do(piece):
    def stub(*args, **kw):
        raise NotImplementedError("still to be written")

    verdict = diagnose(piece, stub)
    assert not verdict.right and verdict.kind == "empty"
    assert verdict.text == f"{piece.name} is still to be written. {piece.task}"
    assert len(piece.task) >= 30


@each_piece
def test_nothing_and_nonsense_are_refused(piece):
    def nothing(*args, **kw):
        pass

    def nonsense(*args, **kw):
        return "nonsense"

    for answer in (nothing, nonsense, None, ..., 3):
        verdict = diagnose(piece, answer)
        assert not verdict.right and verdict.text, answer


@each_piece
def test_the_package_passes(piece):
    verdict = diagnose(piece, piece.right)
    assert verdict.right, verdict.text


@each_piece
def test_help_comes_in_four_steps(piece):
    steps = help_steps(piece)
    texts = [text for _, text in steps]
    assert len(texts) == 4 and all(len(text) >= 20 for text in texts[:3]), texts
    assert inspect.getsource(piece.right).splitlines()[-1].strip() in texts[3]
    assert len(set(texts)) == 4


@each_piece
def test_what_is_said_of_a_mistake(piece):
    names = [mistake.name for mistake in piece.mistakes]
    assert len(set(names)) == len(names)
    for mistake in piece.mistakes:
        for text in (mistake.why, mistake.does):
            assert text.endswith((".", ")")) and len(text) >= 15, (mistake.name, text)
        if mistake.public:
            assert "#" in mistake.public, mistake.public


@each_piece
def test_it_is_small(piece):
    assert 1 <= piece.minutes <= 60 and piece.level in (1, 2, 3)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(piece.right)))
    (node,), lines = ast.parse(source).body, source.split("\n")
    first, last = body_lines(node, lines)
    code = [line for line in lines[first - 1 : last] if line.strip() and not is_comment(line)]
    assert 1 <= len(code) <= 18, "the README says one to eighteen lines"
