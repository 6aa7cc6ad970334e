"""The building edition and the learner's own folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lessons_built import LESSONS, check_empty, check_solved, run_lessons

from qwen_nb import build, mine
from qwen_nb.diagnose import diagnose
from qwen_nb.edition import build_lesson, keep_work, key_of, seal, text_of, unsealed
from qwen_nb.inspect import packaged_model
from qwen_nb.mine import (
    all_pieces,
    keep_cell,
    lessons_with_pieces,
    load_mine,
    pieces_of,
    use_mine,
    use_package,
)
from qwen_nb.pieces import IN_USE, edited

ROOT = Path(__file__).resolve().parents[1]


def run(*command, status=0, **env):
    "What a command prints on both streams."
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def restored():
    "The package's own functions are back in their places, whatever a test did."
    yield
    use_package()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A learner's folder with every piece of the course, written as the package has it."
    import inspect

    folder = tmp_path_factory.mktemp("home") / "my_qwen"
    written = set()
    for piece in all_pieces().values():
        module, name = piece.path.split(".")[:2]
        if (module, name) not in written:
            known = vars(sys.modules[f"qwen_nb.{module}"])
            keep_cell(piece, inspect.getsource(known[name]), known, folder)
            written.add((module, name))
    return folder


# the edition


def test_it_is_up_to_date_and_tells_no_solution():
    run("tools/building.py", "--check")


def test_a_solution_that_can_be_read_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import building

    editions = building.make()
    assert building.leaks(editions) == []
    lesson = json.loads(editions["04_rmsnorm"])
    lesson["cells"][5]["source"] = ["x = 1\n", "h = h*torch.rsqrt(ms + self.eps)  # by hand\n"]
    found = building.leaks(editions | {"04_rmsnorm": json.dumps(lesson)})
    (line,) = found
    assert line.startswith("04_rmsnorm, cell 5, RMSNorm.forward: h = h*"), line


def test_solutions_are_sealed_and_run(monkeypatch, capsys):
    for name in LESSONS:
        text = (ROOT / f"building/{name}.ipynb").read_text(encoding="utf-8")
        assert not re.search(r"(def|class) \w+_solution", text), name
    closed = seal("def half_solution(x):\n    return x / 2", ())
    notebook = {"unsealed": unsealed}
    exec(closed, notebook)
    assert "return" not in closed and notebook["half_solution"](3) == 1.5
    tells = seal("y = 5", ("rotate_half", "apply_rope"))
    exec(tells, notebook)
    assert notebook["y"] == 5 and capsys.readouterr().out == ""
    for piece in ("rotate_half", "apply_rope"):
        monkeypatch.setitem(IN_USE, piece, None)
    exec(tells, notebook)
    assert "y = 5" in capsys.readouterr().out, "its text should be shown to whoever has the pieces"


def test_there_are_enough_lessons_and_it_is_small():
    assert len(LESSONS) >= 28 and LESSONS == list(lessons_with_pieces())
    sizes = [path.stat().st_size for path in (ROOT / "building").glob("*.ipynb")]
    assert max(sizes) < 100_000 and sum(sizes) < 2_500_000


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="no copies of a process there")
def test_a_lesson_that_fails_is_named_and_leaves_the_others_alone(tmp_path, monkeypatch, capfd):
    "Each lesson in a process of its own: no names, settings or changes of the package are left."
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import building

    def lesson(*texts):
        cells = [{"cell_type": "code", "source": text, "metadata": {}} for text in texts]
        return json.dumps({"cells": cells})

    spoils = "import os, qwen_nb.norm; x = 1; os.environ['SPOILT'] = '1'; qwen_nb.norm.RMSNorm = 2"
    looks = "import os, qwen_nb.norm\nassert 'x' not in globals() and 'SPOILT' not in os.environ"
    for name, nb in {
        "a_spoils": lesson(spoils),
        "b_fails": lesson("y = 1", "1 / 0"),
        "c_looks": lesson(looks, "qwen_nb.norm.RMSNorm(3)", "print(1)  # grade()"),
    }.items():
        (tmp_path / f"{name}.ipynb").write_text(nb, encoding="utf-8")
    monkeypatch.setattr(building, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="do not run to their end: b_fails$"):
        building.run_all(["a_spoils", "b_fails", "c_looks"], solved=False)
    said = capfd.readouterr().out
    assert "building/b_fails, cell 1" in said and "ZeroDivisionError" in said
    assert said.count("FAILED") == 1 and said.index("== c_looks") > said.index("FAILED")


SOME = "04_rmsnorm", "06a_gqa", "09a_cache"


@pytest.fixture(scope="module")
def solved():
    return run_lessons(*SOME, solved=True)


@pytest.mark.parametrize("name", SOME)
def test_a_lesson_runs_with_everything_filled_in(name, solved):
    check_solved(name, solved[name])
    assert "Anna" in solved[name], solved[name]


@pytest.mark.slow
def test_every_lesson_runs_with_everything_filled_in():
    for name, said in run_lessons(*LESSONS, solved=True).items():
        check_solved(name, said)


def small_qwen3(folder):
    "A random Qwen3 with other numbers than the packaged one, and its tokenizer."
    import shutil

    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    rope = dict(rope_type="default", rope_theta=1e6)
    sizes = dict(vocab_size=512, hidden_size=96, intermediate_size=160, num_hidden_layers=3)
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=24)
    config = Qwen3Config(**sizes, **heads, rope_parameters=rope, tie_word_embeddings=False)
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    for path in packaged_model().glob("*token*.json"):
        shutil.copy(path, folder)
    return folder


def run_on(model, *names):
    "Lessons on another model, as they stand and solved."
    for solved in (False, True):
        for name, said in run_lessons(*names, solved=solved, QWEN_NB_MODEL=str(model)).items():
            check = check_solved if solved else check_empty
            check(name, said)


def test_it_runs_on_another_model(tmp_path):
    run_on(small_qwen3(tmp_path / "qwen3"), "06a_gqa")


@pytest.mark.slow
def test_more_of_it_runs_on_other_models(tmp_path):
    names = "02_weights", "05_rope", "06a_gqa", "07_swiglu", "08_model", "08a_loading"
    run_on(small_qwen3(tmp_path / "qwen3"), *names)
    run_on(packaged_model("qwen2"), *names, "04_rmsnorm", "09_generate", "09a_cache")


def test_what_was_written_is_kept():
    name = "06_attention"
    reading = json.loads((ROOT / f"nbs/{name}.ipynb").read_text(encoding="utf-8"))
    made, old = build_lesson(reading, name), build_lesson(reading, name)
    names = [key_of(cell) for cell in old["cells"]]
    place = names.index(("repeat_kv",))
    old["cells"][place]["source"] = "def repeat_kv(x, n):\n    return x"
    own = {"cell_type": "code", "id": "own", "metadata": {}, "outputs": [], "source": "x = 1"}
    own_text = {"cell_type": "markdown", "id": "note", "metadata": {}, "source": "A note of mine."}
    old["cells"][place + 1 : place + 1] = [own, own_text]
    old["cells"][0]["source"] = "an old title"       # ours: made anew
    made["cells"][place]["id"] = "another"           # found by its name all the same
    kept = keep_work(made, old)["cells"]
    texts = [text_of(cell) for cell in kept]
    assert "def repeat_kv(x, n):\n    return x" in texts and "x = 1" in texts
    assert "A note of mine." in texts and "an old title" not in texts
    assert texts.index("x = 1") == place + 1 and len(kept) == len(made["cells"]) + 2


# the learner's folder


def test_every_piece_in_one_folder(folder):
    names = use_mine(folder)
    assert sorted(names) == sorted(all_pieces())
    assert (folder / "__init__.py").exists()


def test_it_is_a_qwen(folder):
    code = """
import torch
from qwen_nb import Qwen, Tokenizer
ids = torch.tensor([Tokenizer.from_pretrained().encode("Max is in the attic. Where is Max?")])
with torch.no_grad():
    package = Qwen.from_pretrained()(ids)
import my_qwen
from qwen_nb.pieces import IN_USE
with torch.no_grad():
    own = my_qwen.Qwen.from_pretrained()(ids)
print(len(IN_USE), torch.equal(own, package))
from inspect import getfile, unwrap
from pathlib import Path
print({str(Path(getfile(unwrap(f))).parent) for f in IN_USE.values()})
from qwen_nb import attention, gqa, model, norm
at_work = norm.RMSNorm.forward, gqa.Attention.qkv, model.Decoder.forward, attention.visible_keys
print({str(Path(getfile(f)).parent) for f in at_work})
"""
    said = run("-c", code, PYTHONPATH=f"{folder.parent}{os.pathsep}{ROOT}").splitlines()
    assert said == [f"{len(all_pieces())} True", *[str({str(folder)})] * 2], said


def test_chat_mine(folder):
    main = "from qwen_nb.cli import main; main()"
    question = "Max is in the attic. Where is Max?\n"
    done = subprocess.run(
        [sys.executable, "-c", main, "chat", "--mine", str(folder), "--no-think"],
        input=question,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "attic" in done.stdout and "pieces are yours" not in done.stdout
    assert f"{len(all_pieces())} of {len(all_pieces())} pieces are yours" in done.stderr


def test_chat_mine_without_a_folder(tmp_path):
    main = "from qwen_nb.cli import main; main()"
    said = run("-c", main, "chat", "--mine", tmp_path / "none", status=2)
    assert "qwen-nb build begins one" in said and "Traceback" not in said


def test_a_broken_file_is_told_and_the_package_stands_in(folder, tmp_path, capsys):
    import shutil

    broken = shutil.copytree(folder, tmp_path / "my_qwen")
    (broken / "norm.py").write_text("def RMSNorm(:\n", encoding="utf-8")
    rope = (broken / "rope.py").read_text(encoding="utf-8")
    (broken / "rope.py").write_text(rope.replace("[-b, a]", "[b, -a]"), encoding="utf-8")
    names = use_mine(broken)
    said = capsys.readouterr().err
    assert "RMSNorm.forward" not in names and "rotate_half" not in names
    assert "rotate_half, not yet. The mistake:" in said and "package's stands in" in said
    assert "Attention.forward" in names


def test_a_mixture_answers(folder):
    "One's own norm inside the package's decoder: the model still answers."
    answers, complaints = load_mine(folder)
    assert not complaints
    (piece,) = pieces_of("RMSNorm")
    mine.place_answer(piece, answers[piece.name])
    assert list(IN_USE) == ["RMSNorm.forward"]
    from qwen_nb.norm import RMSNorm

    assert Path(RMSNorm.forward.__code__.co_filename) == folder / "norm.py"
    assert "Anna" in build.one_answer()


# grading


def test_grade_gives_what_to_go_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_QWEN", str(tmp_path / "my_qwen"))
    (piece,) = pieces_of("rotate_half")
    wrong = edited(piece.right, {"[-b, a]": "[b, -a]"})
    given = build.grade(wrong)
    x = torch.arange(4.0)
    assert given is not wrong and torch.equal(given(x), piece.right(x))
    assert not IN_USE and "The mistake:" in capsys.readouterr().out
    build.grade(given)
    assert "This is the package's own rotate_half" in capsys.readouterr().out
    assert build.read_progress()["rotate_half"] == {"hints": 0, "tries": 1, "right": False}


def test_hints_are_remembered(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_QWEN", str(tmp_path / "my_qwen"))
    for number in (1, 2, 1, 4, 3, 5):
        build.hint("rotate_half", number)
        assert f"({min(number, 4)} of 4)" in capsys.readouterr().out
    assert build.read_progress()["rotate_half"]["hints"] == 4
    for _ in range(2):                     # its cell runs again when the notebook is opened
        build.hint("rotate_half")
        said = capsys.readouterr().out
        assert "(1 of 4)" in said and 'Not enough? hint("rotate_half", 2)' in said
    build.hint("nothing of that name")
    assert "there is no piece called" in capsys.readouterr().out


def test_without_a_piece_those_of_the_lesson_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_QWEN", str(tmp_path / "my_qwen"))
    build.begin("06_attention")
    for call in (build.hint, build.grade):
        capsys.readouterr()
        call()
        assert "attend_one_head, attend_explicit, repeat_kv" in capsys.readouterr().out


def test_what_is_no_class_is_told(tmp_path, monkeypatch, capsys):
    from qwen_nb.norm import RMSNorm as packaged

    monkeypatch.setenv("MY_QWEN", str(tmp_path / "my_qwen"))

    def RMSNorm(x, weight, eps):
        return x

    assert build.grade(RMSNorm) is packaged
    assert "Expected is `class RMSNorm`" in capsys.readouterr().out
    assert build.grade(packaged(8)) is packaged
    assert "Give the class itself: grade(RMSNorm)" in capsys.readouterr().out


def test_an_interrupt_takes_one_line(ctrl_c, tmp_path, monkeypatch, capsys):
    import _thread

    monkeypatch.setenv("MY_QWEN", str(tmp_path / "my_qwen"))

    def rotate_half(x):
        _thread.interrupt_main()
        return sum(range(10**7))

    given = build.grade(rotate_half)
    assert capsys.readouterr().out.startswith("… Stopped by you.")
    x = torch.arange(4.0)
    assert torch.equal(given(x), pieces_of("rotate_half")[0].right(x))


def test_a_damaged_progress_file_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_QWEN", str(tmp_path))
    (tmp_path / "progress.json").write_text("{", encoding="utf-8")
    assert build.read_progress() == {}
    build.note_progress(pieces_of("rotate_half")[0], hints=1)
    assert build.read_progress()["rotate_half"]["hints"] == 1


def test_build_begins_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_QWEN", str(tmp_path / "my_qwen"))
    following = build.build()
    said = capsys.readouterr().out
    assert following.exists() and following.stem == LESSONS[0]
    assert f"0 of {len(all_pieces())} pieces are yours" in said
    notebook = json.loads(following.read_text(encoding="utf-8"))
    notebook["cells"].append({"cell_type": "code", "id": "m", "metadata": {}, "source": "mine = 1"})
    following.write_text(json.dumps(notebook), encoding="utf-8")
    build.build()
    assert "mine = 1" in following.read_text(encoding="utf-8")
    following.write_text("{", encoding="utf-8")
    build.build()
    assert "cannot be read and is left as it is" in capsys.readouterr().out
    assert following.read_text(encoding="utf-8") == "{"


def test_build_goes_on_where_one_was(tmp_path, monkeypatch, capsys):
    "The last lesson worked in comes next, and the first open one is named too."
    monkeypatch.setenv("MY_QWEN", str(tmp_path / "my_qwen"))
    build.note_progress(pieces_of("rotate_half")[0], hints=1)
    build.note_progress(pieces_of("attend_one_head")[0], tries=1)
    assert build.build().stem == "06_attention"
    assert "Go on with 06_attention. The first that is still open: 02_weights" in (
        capsys.readouterr().out
    )
    build.note_progress(pieces_of("rotate_half")[0], hints=2)
    assert build.build().stem == "05_rope", "the piece that was worked on last decides"
    assert list(build.read_progress()) == ["attend_one_head", "rotate_half"]
    still_open = ["02_weights", "06_attention"]
    assert build.lesson_to_go_on_with(still_open) == "06_attention", "05 is done: the next one"
    assert build.lesson_to_go_on_with(["02_weights"]) == "02_weights", "all later ones are done"


def test_super_and_new_methods_in_a_learners_class():
    from qwen_nb.deltanet import GatedRMSNorm  # noqa: F401
    from qwen_nb.norm import RMSNorm

    class Mine(RMSNorm):
        def size(self, h):
            return h.pow(2).mean(-1, keepdim=True)

        def forward(self, x):
            h = x.float()
            h = h * torch.rsqrt(self.size(h) + self.eps)
            super().extra_repr()
            return self.weight * h.to(x.dtype)

    (piece,) = pieces_of("RMSNorm")
    verdict = diagnose(piece, Mine)
    assert verdict.right, verdict.text
    mine.place_answer(piece, Mine)
    assert RMSNorm(3)(torch.ones(3)).shape == (3,)


def test_a_saved_piece_is_not_lost_to_an_empty_stub(folder, tmp_path, monkeypatch, capsys):
    "A class with three pieces is saved; then one is written anew and the two others are stubs."
    import shutil

    own = shutil.copytree(folder, tmp_path / "my_qwen")
    monkeypatch.setenv("MY_QWEN", str(own))
    build.begin("06a_gqa")
    saved = (own / "gqa.py").read_text(encoding="utf-8")

    class Attention:
        def split_heads(self, x):
            return x.unflatten(-1, (-1, self.head_dim))

        def qkv(self, x, cos, sin):
            raise NotImplementedError("still to be written")

        def forward(self, x, cos, sin, mask=None, cache=None):
            raise NotImplementedError("still to be written")

    for name in ("split_heads", "qkv", "forward"):
        getattr(Attention, name).__module__ = "__main__"
    given = build.grade(Attention)
    said = capsys.readouterr().out
    assert "Attention.qkv: yours, from my_qwen, is at work" in said
    assert "Not saved: what was saved before has Attention.qkv, Attention.forward too" in said
    assert (own / "gqa.py").read_text(encoding="utf-8") == saved
    assert given.qkv is IN_USE["Attention.qkv"]
