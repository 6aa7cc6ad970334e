"""The zoo of mistakes as a whole: how many there are, what a stub is told, what help there is.

That each mistake is called by its name, and that pairs are, the pages of mistakes check themselves.
"""

import ast
import inspect
import linecache
import math
import textwrap
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch

from qwen_nb.alike import alike
from qwen_nb.build import help_steps
from qwen_nb.code_story import unread
from qwen_nb.diagnose import diagnose, exercise, with_mistakes
from qwen_nb.edition import body_lines, is_comment
from qwen_nb.mine import ZOO, all_pieces
from qwen_nb.pieces import Probe, edited
from qwen_nb.values import asked_text, value_story
from qwen_nb.verify import try_answer

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


@pytest.mark.slow
@each_piece
def test_something_is_said_of_any_two_mistakes(piece):
    "The pages of mistakes only look whether pairs are named."
    for first, second in combinations(piece.mistakes, 2):
        both = with_mistakes(piece, (first.name, second.name))
        assert both is None or diagnose(piece, both).text


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
    "keepdim": (f"    h = h * {ROOT.replace(', keepdim=True', '')}", ": `keepdim` forgotten."),
    "axis 0": (f"    h = h * {ROOT.replace('-1', '0')}", "mistake: the mean taken over the batch"),
    "axis 1": (f"    h = h * {ROOT.replace('-1', '1')}", "mistake: the mean taken over axis 1"),
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


METHOD = "class {}(nn.Module):\n    def forward(self, x):\n        {}\n"


def _told(name, source, **names):
    "What is said of an answer, written as in a notebook."
    path = f"<learner {len(linecache.cache)}>"
    names = dict(torch=torch, nn=torch.nn, F=torch.nn.functional, **names)
    linecache.cache[path] = len(source), None, source.splitlines(True), path
    exec(compile(source, path, "exec"), names)
    return diagnose(all_pieces()[name], names[name.split(".")[0]]).text


GATED = "return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))"
TOLD = {
    "raise left": ("RMSNorm", "raise NotImplementedError('!')\n        return x", "Delete that"),
    "raise below": ("RMSNorm", "y = x\n        raise NotImplementedError('!')", "Delete that"),
    "itself": ("RMSNorm", "return self.forward(x)", "It calls itself"),
    "called": ("RMSNorm", "return self(x)", "It calls itself"),
    "modules": ("SwiGLU", "return nn.ModuleList()(x)", "`for layer in"),
    "endless": ("RMSNorm", "while True: x = x + 0", "still running after"),
    "float": ("RMSNorm", "h = x.float()\n        h *= 2\n        return h", "x itself"),
    "silu": ("SwiGLU", "return torch.silu(x)", "`F.silu` has it"),
    "part": ("SwiGLU", "return self.down(x)", "Did you mean `self.down_proj`?"),
    "if": ("RMSNorm", "return x if x > 0 else -x", "`x is not None`"),
    "view": ("RMSNorm", "return x.view(3, -1, 7)", "must multiply to"),
    "weights": ("SwiGLU", GATED.replace("self.gate_proj(x)", "(x @ self.gate_proj.weight.T)"),
                "never calls `self.gate_proj`"),
    "forward": ("SwiGLU", GATED.replace("up_proj(", "up_proj.forward("), "calls `self.up_proj`"),
    "outside": ("RMSNorm", "return x * one + two", "they are no arguments"),
    "rounded": ("RMSNorm", "h = x.double()\n        h = h / (h.pow(2).mean(-1, keepdim=True) + "
                "self.eps) ** 0.5\n        return self.weight * h.to(x.dtype)", "Not every bit"),
}


@pytest.mark.parametrize("kind, body, said", TOLD.values(), ids=list(TOLD))
def test_what_is_said_of_a_method(kind, body, said):
    text = _told(f"{kind}.forward", METHOD.format(kind, body), one=1, two=2)
    assert said in text, text
    assert "still to be written" not in text, text


def test_a_method_without_self_is_told_how_it_is_called():
    text = _told("RMSNorm.forward", METHOD.format("RMSNorm", "return x").replace("self, x", "x"))
    assert "It is called with (self, x)." in text and "Nothing came back" not in text, text


TOLD_OF_FUNCTIONS = [
    ("attend_explicit", "s = q @ k.T\n    return s, s", "`.mT` exchanges the last two"),
    ("attend_explicit", "return q.double() @ q.mT, q", "cast it back"),
    ("attend_explicit", "return all_pieces()['repeat_kv'].right(2, k), k",
     "inside `repeat_kv`, which takes (x, n)"),
    ("keep_top_p", "return 0.5 * logits.max(-1, keepdim=True)", "`.values` are the numbers"),
    ("keep_top_p", "return all_pieces()['keep_top_p'].right(logits, p).sort(-1).values",
     "but sorted"),
    ("greedy", "for _ in range(max_new_tokens):\n        new = model(input_ids)[:, -1].argmax(-1)"
     "\n        if (new == stop_id).all(): break\n    return input_ids", "`stop_id` may be None"),
    ("visible_keys", "return all_pieces()['visible_keys'].right(q_len, k_len, is_real).int()",
     "`.bool()` or a comparison"),
    ("longer_mask", "return mask if mask is None else F.pad(mask, (0, length - mask.shape[1]))"
     ".float()[:, :length]", "First wrong at"),
]


@pytest.mark.parametrize("name, body, said", TOLD_OF_FUNCTIONS)
def test_what_is_said_of_a_function(name, body, said):
    taken = inspect.signature(all_pieces()[name].right).parameters
    taken = ", ".join(f"{n}=None" if p.default is None else n for n, p in taken.items())
    text = _told(name, f"def {name}({taken}):\n    {body}\n", all_pieces=all_pieces)
    assert said in text, text


def test_a_loop_that_does_not_end_is_tried_once():
    tries = []

    def endless(x, y):
        tries.append(x)
        while True:
            pass

    text = _graded(add_solution, *[lambda f: f(1, 2)] * 3)(endless).text
    assert len(tries) == 1 and "did not come to its end" in text, text


def test_ids_have_no_factor_and_no_order_by_chance():
    right = torch.tensor([[0, 1, 2, 3, 4, 8], [0, 1, 2, 3, 4, 9]])
    for wrong in (torch.tensor([[0, 1, 2, 3, 4, 4]] * 2), right * torch.tensor([1, 1, 1, 1, 1, 3])):
        said = " ".join(value_story(wrong, right))
        assert "factor" not in said and "come from" not in said, said


def test_an_answer_that_is_mostly_wrong_is_right_on_nothing():
    said = _graded(add_solution, *[partial(lambda n, f: f(1, n), n) for n in (1, 2, 3)])
    assert "Right on:" not in said(lambda x, y: 2).text


def test_a_cache_that_comes_back_is_not_moody():
    def wrong(*args, **kw):
        return all_pieces()["Block.forward"].right(*args, **kw), object()

    assert "Yours is a tuple" in diagnose(all_pieces()["Block.forward"], wrong).text


def test_in_place_on_a_copy_is_right_with_a_remark():
    source = f"{HEAD}    h = h.clone()\n    h *= {ROOT}\n    return self.weight * h.to(x.dtype)\n"
    verdict = diagnose(all_pieces()["RMSNorm.forward"], _norm(source))
    assert verdict.right and "training will stop there" in verdict.text, verdict.text


NAMED = [
    ("Block.forward", "the two norms exchanged"),
    ("Block.forward", "the second addition made to the block's input"),
    ("Block.forward", "what attention gives thrown away"),
    ("Block.forward", "an addition in place, `x += …`"),
    ("Decoder.forward", "what the layers give not kept"),
    ("Qwen.head", "the condition the wrong way round"),
    ("Qwen.head", "`lm_head` always"),
    ("greedy", "the prompt read each time, not the text so far"),
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


def _graded(solution, *probes, **known):
    "What the grader says of answers to a small exercise, by name; with wrong answers it knows."
    graded = exercise(solution, "A small exercise, for this test alone.")
    for number, run in enumerate(probes):
        graded.probe(f"input {number}, of {len(probes)}")(run)
    for name, wrong in known.items():
        graded.knows(name.replace("_", " "), wrong, "It is.")
    return lambda answer: diagnose(graded, answer)


def add_solution(x, y):
    return x + y


def _caught(f):
    try:
        return f(5, 6)
    except Exception:
        return "it raised something"


def _wrapped(f):
    try:
        return f(7, 8)
    except Exception as error:
        raise AssertionError("your file cannot be read") from error


def _raising(error):
    def stops(x, y):
        raise error
    return stops


@pytest.mark.parametrize("run", [lambda f: f(1, 2), _caught, _wrapped], ids=["", "kept", "other"])
@pytest.mark.parametrize("error", [ValueError("oh"), AssertionError("oh"), KeyboardInterrupt("oh"),
                                   SystemExit("oh")], ids=lambda e: type(e).__name__)
def test_the_real_error_is_told(run, error):
    said = _graded(add_solution, run)(_raising(error)).text
    assert f"stopped at `raise error` with {type(error).__name__}: oh" in said, said
    assert "Nothing came back" not in said, said
    is_kept = run is not _wrapped or not isinstance(error, Exception)
    assert is_kept or "your file cannot be read." in said, said


def test_an_error_inside_a_generator_is_told():
    def letters_solution(text):
        yield from text

    def letters(text):
        yield from text[:1]
        raise KeyError("b")

    def run(f):
        try:
            return list(f("ab"))
        except KeyError:
            return []

    assert "KeyError: 'b'" in _graded(letters_solution, run)(letters).text


def test_ctrl_c_stops_the_grader(ctrl_c):
    import _thread

    def interrupted(x, y):
        _thread.interrupt_main()
        return sum(range(10**7))

    with pytest.raises(KeyboardInterrupt):
        _graded(add_solution, lambda f: f(1, 2))(interrupted)


def test_ctrl_c_takes_one_line_in_an_exercise(ctrl_c, capsys):
    import _thread

    def interrupted(x, y):
        _thread.interrupt_main()
        return sum(range(10**7))

    graded = exercise(add_solution, "A small exercise, for this test alone.")
    graded.probe("two numbers")(lambda f: f(1, 2))
    assert not try_answer(graded, interrupted)
    assert capsys.readouterr().out == "not yet: stopped by you\n"


def test_not_yet_is_said_once(capsys):
    graded = exercise(add_solution, "A small exercise, for this test alone.")
    graded.probe("two numbers")(lambda f: f(1, 2))
    graded.knows("subtracted", lambda x, y: x - y, "It is.")
    for answer in (lambda x, y: x - y, lambda x, y: x, _raising(ValueError("oh"))):
        try_answer(graded, answer)
        assert capsys.readouterr().out.count("not yet") == 1


def test_what_was_seen_of_a_known_mistake_is_told_whole():
    def parts_solution(x):
        return {"w": (x, [x, x])}

    def wrong(x):
        return {"w": (x, [x, 2 * x])}

    said = _graded(parts_solution, lambda f: f(torch.randn(3, 5)), the_second_doubled=wrong)(wrong)
    assert "The mistake: the second doubled." in said.text, said
    assert "At 'w': 1 of 2 entries are right.\nEntry 1: " in said.text, said
    assert "Every value is 2 times the right one." in said.text, said
    assert not any(line.endswith(":") for line in said.text.splitlines()), said


@pytest.mark.parametrize("answer", [len, math.log, partial(max, 1), max, Probe("", None), print])
def test_an_answer_without_code_is_graded(answer):
    assert not _graded(add_solution, lambda f: f(5, 6))(answer).right


def test_a_solution_without_source_is_enough():
    names = {}
    exec("def add_solution(x, y):\n    return x + y", names)
    graded = _graded(names["add_solution"], lambda f: f(5, 6), lambda f: f(7, 8))
    assert graded(add_solution).right and graded(partial(add_solution)).right
    for wrong in (lambda x, y: x, _raising(NameError("name 'X' is not")), 3):
        assert not graded(wrong).right
    assert not _graded(max, lambda f: f(5, 6))(min).right


@pytest.mark.parametrize("right, same", [
    (3, np.int64(3)), (3, torch.tensor(3)), (6, 6.0), (0.5, np.float32(0.5)), (True, np.True_),
    (0.5, torch.tensor(0.5)), ([3, 4], (3.0, np.int64(4))), ({"a": (1, 2)}, {"a": [1.0, 2]})])
def test_the_same_number_of_another_type_is_right(right, same):
    assert alike(same, right)


@pytest.mark.parametrize("right, other", [
    (1, True), (True, 1), (3, "3"), (6, 6.5), (3, torch.tensor([3])), (0, None), (0, False),
    (torch.tensor(0.5), 0.5), (torch.zeros(2), torch.zeros(2).double()), ([1, 0], [True, False])])
def test_another_value_is_not(right, other):
    assert not alike(other, right)


@dataclass
class _Config:
    width: int = 64
    words: tuple = ("a", "b")


WORDS = [
    (torch.zeros(2, dtype=torch.int64), 3, "Yours is an int64 tensor (2,), expected 3."),
    (torch.zeros(2, 0, 3), torch.zeros(2, 3), "The shape is (2, 0, 3), expected (2, 3)."),
    ([torch.zeros(2, 0)], [3], "Entry 0: Yours is a float32 tensor (2, 0), expected 3."),
    (595_991_552, 596_049_920, "595,991,552, expected 596,049,920. That is 58,368 too low."),
    ((True, 0.5), (True, 2.0), "Entry 1 is 0.25 times the right one, that is 1/4."),
    ([[301, 67], [1]], [[304], [1]], "Yours is [[301, 67], [1]], expected [[304], [1]]."),
    ([301, 67], [304], "The length is 2, expected 1. Yours is [301, 67], expected [304]."),
    (_Config(63), _Config(64), "At 'width': The number is 63, expected 64."),
    ({1, 2}, {1}, "Yours is {1, 2}, expected {1}."),
    ({"a": 1, "c": 2}, {"a": 1, "b": 2}, "The keys differ: missing ['b'], too many ['c']."),
    ([*"abcdefghijklmno", ("<end>", False)], ["abcdef", ("ghiJklmno", True), ("<end>", False)],
     "The length is 16, expected 3. They part at character 9"),
]


@pytest.mark.parametrize("ours, theirs, words", WORDS)
def test_words_for_a_difference(ours, theirs, words):
    assert words in " ".join(value_story(ours, theirs))


def test_an_argument_is_shown_shortly():
    many = {f"x{i}": torch.zeros(2, 70) for i in range(12)}
    asked = asked_text({"c": {"width": 64, "depth": 4}, "w": _Config(), "x": torch.zeros(0)})
    assert asked == ("c {'width': 64, 'depth': 4}, w _Config(width=64, words=('a', 'b')), "
                     "x a float32 tensor (0,)")
    assert asked_text(many).startswith("x0 (2, 70), x1 (2, 70)") and len(asked_text(many)) < 105


def test_of_several_calls_the_wrong_one_is_named():
    def run(f):
        return [f(1, 1), f(2, 5), f(3, 1)]

    graded = _graded(add_solution, run, lambda f: f(0, 0), lambda f: f(1, 0))
    said = graded(lambda x, y: x + y + (y == 5)).text
    assert "with x 2, y 5.\nThe number is 8, expected 7." in said, said
    assert "Right on: input 1, of 3 · input 2, of 3." in said, said
    said = graded(lambda x, y: None if x < 3 else x + y).text
    assert "with x 1, y 1.\nNothing came back, expected 2" in said, said


def test_what_a_probe_says_keeps_its_first_letter():
    def run(f):
        if f(1, 2) != 3:
            raise AssertionError("embed.weight is missing")

    assert "\nembed.weight is missing." in _graded(add_solution, run)(lambda x, y: 4).text


def test_small_errors_here_and_there_are_sized():
    right = torch.linspace(1, 2, 40).view(20, 2)
    wrong = right.clone()
    wrong[[0, 3, 4, 7, 9, 12, 13, 16, 18]] *= 1.02
    said = " ".join(value_story(wrong, right))
    assert "only entries" not in said and "The largest error is 0.0" in said, said


def test_two_values_tell_no_factor():
    said = " ".join(value_story(torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 3.0]])))
    assert "factor of its own" not in said, said


class _Scaled:
    def half(self, x):
        return x / 2 * self.scale

    def right(self, x):
        return self.half(x) + self.bias

    def by_hand(self, x):
        return x * self.scale / 2 + self.bias + 1

    def helped(self, x):
        return other(self, x)                                              # noqa: F821

    def forgetful(self, x):
        return self.half(x)


@pytest.mark.parametrize("name, missing", [("by_hand", []), ("helped", []), ("forgetful", [])])
def test_what_may_be_done_in_another_way_is_not_missed(name, missing):
    assert unread(getattr(_Scaled, name), _Scaled.right, _Scaled) == missing


def test_a_part_that_nothing_reads_is_missed():
    assert unread(lambda self, x: x, _Scaled.right, _Scaled) == ["self.bias"]
