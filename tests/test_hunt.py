"""The bug hunt: every case looks healthy, has one right verdict, and leaves the package whole."""

import importlib
import random

import pytest
import torch

from qwen_nb import cases, hunt
from qwen_nb.model import Qwen
from qwen_nb.pieces import IN_USE, edited, original, put_in, take_out
from qwen_nb.tokenizer import PlainTokenizer
from qwen_nb.zoo_decoder import decoder_piece

NUMBERS = range(1, 11)
each_case = pytest.mark.parametrize("number", NUMBERS)
TEXT = "Max is in the garden.\nAnna has the ball.\nWho has the ball? Anna.\n"


@pytest.fixture(autouse=True)
def nothing_left():
    "Before and after each test the package is its own."
    assert not IN_USE and not hunt.OPEN_CASES
    yield
    for bug in cases.BUGS:
        found = where(bug.piece.path)
        assert found is original(bug.piece.path), f"{bug.piece.path} is still planted"
    assert not IN_USE and not hunt.OPEN_CASES


def where(path):
    module, *names = path.split(".")
    thing = importlib.import_module(f"qwen_nb.{module}")
    for name in names:
        thing = getattr(thing, name)
    return thing


def loss_of(dtype):
    ids = torch.tensor([PlainTokenizer.from_pretrained().encode(TEXT)])
    with torch.no_grad():
        logits = Qwen.from_pretrained(dtype=dtype)(ids).float()
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


def test_there_are_ten_each_with_one_mistake_and_a_reference():
    assert len(cases.BUGS) == len(NUMBERS)
    assert len({bug.piece.path for bug in cases.BUGS}) == len(NUMBERS)
    for bug in cases.BUGS:
        named = [m for m in bug.piece.mistakes if m.public == bug.public]
        assert len(named) == 1, f"{bug.public} names {len(named)} mistakes of {bug.piece.path}"
        assert bug.url.split("/")[-1] == bug.public.split("#")[1]
        assert bug.url.split("/")[4] == bug.public.split("#")[0].split("/")[-1]
        assert bug.story.count(".") >= 2 and len(bug.hints) == 2


@each_case
def test_it_looks_healthy(number):
    bug = cases.BUGS[number - 1]
    before = loss_of(bug.dtype)
    with hunt.hunt(number) as case:
        assert where(bug.piece.path) is not original(bug.piece.path)
        assert abs(loss_of(bug.dtype) / before - 1) < 0.01
        text = cases.written_text(case, new=7)
        assert text.endswith("Where is Max? In the garden.\nMax went to"), text
        assert bug.sample(case) in str(case)


def test_the_loss_of_the_training_case_falls():
    with hunt.hunt(9) as case:
        falling = cases.training_losses(case)
    assert falling[-1] < falling[0] / 2
    assert all(b < a for a, b in zip(falling, falling[1:]))


@each_case
def test_the_verdict_accepts_the_one_and_refuses_the_others(number):
    with hunt.hunt(number) as case:
        path, name = case.bug.piece.path, case.mistake.name
        assert len(set(case.suspects)) == len(case.suspects) >= 5
        for suspect in case.suspects:
            verdict = case.verdict(path, suspect)
            assert verdict.right == (suspect == name), verdict
            if not verdict.right:
                assert "place is right" in str(verdict) and "did not" in str(verdict)
        for place in (path, path.partition(".")[2], path.partition(".")[0]):
            verdict = case.verdict(place, name)
            assert verdict.right and case.bug.url in str(verdict), (place, str(verdict))
        for other in hunt.all_places():
            if other != path:
                verdict = case.verdict(other, name)
                assert not verdict.right and "The suspect did it" in str(verdict)
                near = "module is right, the piece is not" in str(verdict)
                assert near == (other.split(".")[0] == path.split(".")[0])


def test_tries_are_counted_and_typing_mistakes_are_not():
    with hunt.hunt(1) as case:
        assert case.verdict("", "").kind == "no try" == case.verdict("model", "a ghost").kind
        assert case.tries == 0
        said = str(case.verdict("sampling.keep_top_p", case.mistake.name))
        assert said.startswith("Try 1.") and "earlier than `sampling`" in said
        assert "later than `tokenizer`" in str(case.verdict("tokenizer", case.suspects[0]))
        assert "try 3" in str(case.verdict("Decoder.forward", case.mistake.name))


def test_a_place_without_its_module_is_as_good():
    with hunt.hunt(8) as case:
        full = case.verdict("attention.repeat_kv", case.mistake.name)
        short = case.verdict("repeat_kv", case.mistake.name)
    assert "the piece is not" in str(full) and "the piece is not" in str(short)


@each_case
def test_hints_get_sharper_and_end(number):
    with hunt.hunt(number) as case:
        first, second, third = case.hint(), case.hint(), case.hint()
        assert first != second == third
        assert case.mistake.name not in first + second


def test_an_exception_gives_the_package_back():
    with pytest.raises(RuntimeError, match="in the middle"):
        with hunt.hunt(3):
            raise RuntimeError("in the middle")


def test_a_second_case_closes_the_first_and_close_may_come_twice():
    first, second = hunt.hunt(2), hunt.hunt(4)
    assert hunt.OPEN_CASES == [second]
    first.close()
    assert hunt.OPEN_CASES == [second]
    second.close()
    second.close()


def test_a_case_can_be_opened_again():
    with hunt.hunt(2) as case:
        pass
    assert not hunt.OPEN_CASES
    with case:
        assert hunt.OPEN_CASES == [case]


def test_a_learners_own_piece_comes_back():
    own = edited(decoder_piece.right)
    put_in(decoder_piece, own)
    try:
        with hunt.hunt(1):
            assert where("model.Decoder.forward") is not own
        assert where("model.Decoder.forward") is own
    finally:
        take_out(decoder_piece)


def test_by_chance_and_by_number():
    with hunt.hunt(seed=5) as case, hunt.hunt(seed=5) as again:
        assert case.number == again.number
        assert case.suspects == again.suspects
    state = random.getstate()
    hunt.hunt(6).close()
    assert random.getstate() == state, "the suspects' order should not touch the global generator"
    for number in (0, 11, -1, "1", True, 1.5):
        with pytest.raises(ValueError, match="cases 1 to 10"):
            hunt.hunt(number)


def test_a_case_that_cannot_load_its_model_leaves_nothing(monkeypatch):
    def broken(*args, **kw):
        raise OSError("no such file")

    monkeypatch.setattr(hunt.Qwen, "from_pretrained", broken)
    with pytest.raises(OSError):
        hunt.hunt(1)


def test_row_labels():
    ids, mask = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1] * 4])
    assert cases.row_labels(ids, mask).tolist() == [[-100, -100, 6], [2, 3, 4]]
    right = torch.tensor([[5, 6, 0, 0]]), torch.tensor([[1, 1, 0, 0]])
    assert cases.row_labels(*right).tolist() == [[6, -100, -100]]
