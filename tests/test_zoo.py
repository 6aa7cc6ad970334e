"""The zoo of mistakes as a whole: how many there are, what a stub is told, what help there is.

That each mistake is called by its name, and that pairs are, the pages of mistakes check themselves.
"""

import ast
import inspect
import linecache
import textwrap

import pytest
import torch

from qwen_nb.build import help_steps
from qwen_nb.diagnose import diagnose
from qwen_nb.edition import body_lines, is_comment
from qwen_nb.mine import ZOO, all_pieces
from qwen_nb.pieces import edited

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


def _norm(source, **outside):
    "An RMSNorm.forward as a learner would write it, from its source."
    path = f"<learner {len(linecache.cache)}>"
    names = dict(torch=torch, **outside)
    linecache.cache[path] = len(source), None, source.splitlines(True), path
    exec(compile(source, path, "exec"), names)
    return names["forward"]


HEAD = "def forward(self, x):\n    h = x.float()\n"
ROOT = "torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)"
SAID = {
    "keepdim": (f"    h = h * {ROOT.replace(', keepdim=True', '')}", "This is `keepdim` forgotten"),
    "axis 0": (f"    h = h * {ROOT.replace('-1', '0')}", "This is the mean taken over the batch"),
    "axis 1": (f"    h = h * {ROOT.replace('-1', '1')}", "This is the mean taken over axis 1"),
    "outside": (f"    h = h * {ROOT.replace('self.eps', 'eps')}", "Your code reads `eps` (0.1)"),
    "unknown": (f"    h = h * {ROOT.replace('self.eps', 'EPS')}", "Did you mean `self.eps`?"),
    "print": (f"    print(h * {ROOT})\n    return", "`print` only shows a value"),
    "detach": (f"    h = (h * {ROOT}).detach()", "The way back is cut at `h = (h * torch"),
    "no_grad": (f"    with torch.no_grad():\n        h = h * {ROOT}", "way back is cut at `with"),
    "partly": (f"    h = h * {ROOT}.detach()", "But the gradient of `x` is lost or wrong"),
}


@pytest.mark.parametrize("body, said", SAID.values(), ids=list(SAID))
def test_what_is_said_of_a_norm(body, said, capsys):
    source = f"{HEAD}{body}\n    return self.weight * h.to(x.dtype)\n"
    verdict = diagnose(all_pieces()["RMSNorm.forward"], _norm(source, eps=0.1))
    assert not verdict.right and said in verdict.text, verdict.text
    assert not capsys.readouterr().out, "what the answer prints floods the page"


def test_in_place_on_a_copy_is_right_with_a_remark():
    source = f"{HEAD}    h = h.clone()\n    h *= {ROOT}\n    return self.weight * h.to(x.dtype)\n"
    verdict = diagnose(all_pieces()["RMSNorm.forward"], _norm(source))
    assert verdict.right and "training will stop there" in verdict.text, verdict.text


NAMED = [
    ("Block.forward", "the two norms exchanged"),
    ("Block.forward", "the second addition made to the block's input"),
    ("Block.forward", "norms on what the branches give, not on what they read"),
    ("Block.forward", "an addition in place, `x += …`"),
    ("Decoder.forward", "what the layers give not kept"),
    ("Qwen.head", "the condition the wrong way round"),
    ("Qwen.head", "`lm_head` always"),
    ("greedy", "new tokens never added"),
    ("rotate_half", "halves not exchanged, and the other sign"),
]


@pytest.mark.parametrize("name, mistake", NAMED)
def test_a_learners_mistake_is_known(name, mistake):
    piece = all_pieces()[name]
    (known,) = [m for m in piece.mistakes if m.name == mistake]
    assert diagnose(piece, edited(piece.right, known.edits)).named == (mistake,)


def test_heads_in_another_order_are_located():
    piece = all_pieces()["Attention.forward"]
    for edit, said in (("mix.flip(1).transpose(1, 2)", "blocks of 8 (heads?) stand in this order"),
                       ("mix.permute(0, 2, 3, 1)", "laid out as 8 × 6: a transpose is missing")):
        answer = edited(piece.right, {"mix.transpose(1, 2)": edit})
        assert said in diagnose(piece, answer).text, diagnose(piece, answer).text


TRAINED_PIECES = ["rotate_half", "apply_rope", "attend_explicit", "Attention.qkv", "SwiGLU.forward",
                  "Block.forward", "Decoder.forward", "Qwen.head", "next_token_loss", "pair_loss"]


@pytest.mark.parametrize("name", TRAINED_PIECES)
def test_a_lost_gradient_is_refused(name):
    piece = all_pieces()[name]

    @torch.no_grad()
    def cut(*args, **kw):
        return piece.right(*args, **kw)

    verdict = diagnose(piece, cut)
    assert verdict.kind == "cut" and "gradient" in verdict.text, verdict.text
