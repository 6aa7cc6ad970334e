"""Log-likelihoods, answers and their errors; the file of questions; the harness's interface."""

import json
import sys
import types

import pytest
import torch

from qwen_nb import evaluate as ev
from qwen_nb.cli import main
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.tokenizer import Tokenizer

STORY = "Max is in the kitchen.\nAnna is in the garden.\nMax has the ball.\nWho has the ball?"
PAIRS = [(STORY, " Max"), (STORY + " ", "Anna"), ("Who", " has the ball?"), ("", "Max is in the")]


@pytest.fixture(scope="module", params=["qwen1", "qwen3", "qwen3_moe", "qwen3_5"])
def made(request):
    folder = None if request.param == "qwen3" else packaged_model(request.param)
    return Qwen.from_pretrained(folder, torch.float32), Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def small():
    return Qwen.from_pretrained(dtype=torch.float32), Tokenizer.from_pretrained()


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_batch_gives_what_single_texts_give(made, batch_size):
    model, tokenizer = made
    rows = [ev.split_ids(tokenizer, *pair) for pair in PAIRS]
    found = ev.log_likelihoods(model, rows, batch_size)
    for (context, continuation), (total, is_greedy) in zip(rows, found):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
        wanted = torch.tensor(continuation)
        each = logits.double().log_softmax(-1)[range(len(wanted)), wanted]
        assert abs(each.sum().item() - total) <= 1e-5 * max(1, abs(total))
        assert is_greedy == bool((logits.argmax(-1) == wanted).all())


def test_transformers_agrees(small):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = small
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        packaged_model(), dtype=torch.float32
    )
    rows = [ev.split_ids(tokenizer, *pair) for pair in PAIRS]
    for row, (total, _) in zip(rows, ev.log_likelihoods(model, rows)):
        ids = torch.tensor([row[0] + row[1]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(row[0]), -100)
        with torch.no_grad():
            loss = theirs(ids, labels=labels).loss.item()
        assert abs(-loss * len(row[1]) - total) < 1e-4


def test_blanks_go_to_the_continuation(small):
    tokenizer = small[1]
    assert ev.split_ids(tokenizer, "a b ", "c") == ev.split_ids(tokenizer, "a b", " c")
    assert ev.split_ids(tokenizer, "", "c")[0] == [tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="continuation is empty"):
        ev.split_ids(tokenizer, "a", "")


def test_rows_that_do_not_fit_are_refused(small):
    model, _ = small
    room = ev.max_positions(model.config)
    ev.log_likelihoods(model, [([1] * room, [2])])
    for row in (([1] * room, [2, 3]), ([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="row 0 has"):
            ev.log_likelihoods(model, [row])


@pytest.mark.parametrize("room", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 6, 7, 8, 15])
def test_windows_judge_each_token_once(room, n):
    windows = ev.text_windows(list(range(1, n + 1)), 0, room)
    assert [i for _, continuation in windows for i in continuation] == list(range(1, n + 1))
    for context, continuation in windows:
        assert len(context) + len(continuation) <= room + 1 and context
        assert context[-1] == continuation[0] - 1


def test_answers_end_where_they_end(made):
    model, tokenizer = made
    prompts = [STORY, "Max is in the attic.\nWhere is Max?", "Anna"]
    for settings in (dict(stop=["\n"]), dict(stop=[" in", "the"]), dict()):
        together = ev.write_answers(model, tokenizer, prompts, 9, batch_size=3, **settings)
        for prompt, answer in zip(prompts, together):
            assert ev.write_answers(model, tokenizer, [prompt], 9, **settings) == [answer]
            assert not any(stop in answer.text for stop in settings.get("stop", ()))
            assert tokenizer.pad_token_id not in answer.ids
            assert answer.ended in ("stop token", "stop string", "length")
            assert answer.ended != "length" or len(answer.ids) == 9


def test_how_a_row_ended(small):
    tokenizer = small[1]
    ids = tokenizer.encode("a b c")
    assert ev.end_answer(tokenizer, ids, [7]) == ("a b c", ids, "length")
    assert ev.end_answer(tokenizer, [*ids, 9999, 5], [9999]) == ("a b c", ids, "stop token")
    cut = ev.end_answer(tokenizer, ids, [], [" b"])
    assert (cut.text, cut.ended) == ("a", "stop string")


def test_errors_and_choices():
    right = [True] * 3 + [False]
    share, error = ev.score(right)[1:]
    assert share == 0.75 and abs(error - torch.tensor(right).float().std().item() / 2) < 1e-7
    assert ev.score([True]).error != ev.score([True]).error  # NaN
    assert ev.best_choice([-3.0, -3.0], ["a", "b"]) == 0
    assert ev.best_choice([-3.0, -4.0], ["a", "bb"], by_length=True) == 1


def lines(path, *items):
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n\n")
    return path


def test_the_command(tmp_path, capsys):
    choices = ["Here.", "In the attic."]
    question = dict(question="Max is in the attic.\nWhere is Max?", choices=choices)
    path = lines(
        tmp_path / "q.jsonl",
        question | dict(answer=1),
        question | dict(answer="In the attic."),
        question | dict(answer=0),
        dict(prompt="Anna is in the garden.\nWhere is Anna?", answer="In the garden."),
    )
    with pytest.raises(SystemExit) as end:
        main(["eval", str(path), "--dtype", "float32"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "66.67% ± 33.33% of 3 questions" in out and "100.00%" in out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1 is no JSON"),
        ("3", "expected an object"),
        ('{"question": "a", "choices": [], "answer": 0}', "expected question"),
        ('{"question": "a", "choices": ["b"], "answer": 1}', "the answer is 1"),
        ('{"question": "a", "choices": ["b"], "answer": "c"}', "the answer is 'c'"),
        ("", "holds no question"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path, capsys, text, says):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["eval", str(tmp_path / "q.jsonl")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and says in error and error.count("\n") == 1


def test_the_harness(small, monkeypatch):
    "A stub of its interface: a base class, and requests with `args`."
    model, tokenizer = small
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"qwen_nb\[eval\]"):
        ev.harness_model(model, tokenizer)
    stub = types.ModuleType("lm_eval.api.model")
    stub.LM = type("LM", (), {})
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", stub)
    harness = ev.harness_model(model, tokenizer, 2)

    def ask(*args):
        return types.SimpleNamespace(args=args)

    found = harness.loglikelihood([ask(*pair) for pair in PAIRS])
    rows = [ev.split_ids(tokenizer, *pair) for pair in PAIRS]
    for (total, is_greedy), (want, want_greedy) in zip(found, ev.log_likelihoods(model, rows, 1)):
        assert abs(total - want) < 1e-3 and is_greedy == want_greedy
    whole = harness.loglikelihood_rolling([ask(STORY)])[0]
    row = [tokenizer.eos_token_id], tokenizer.encode(STORY)
    assert abs(whole - ev.log_likelihoods(model, [row])[0][0]) < 1e-3
    until = dict(until=["\n"], max_gen_toks=8)
    assert harness.generate_until([ask(STORY, until)]) == [" Max."]
