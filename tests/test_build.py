"""The building edition and the learner's own folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_nb import build, mine
from qwen_nb.diagnose import diagnose
from qwen_nb.edition import build_lesson, keep_work, key_of, lessons_with_pieces, text_of
from qwen_nb.mine import all_pieces, keep_cell, load_mine, pieces_of, use_mine, use_package
from qwen_nb.pieces import IN_USE, edited

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted(path.stem for path in (ROOT / "building").glob("*.ipynb"))
LONG = "14b_balance", "22_finetune", "22a_lora", "22b_preference", "22c_rewards"  # they train
RUN = [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in LESSONS]


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


def test_there_are_enough_lessons_and_it_is_small():
    assert len(LESSONS) >= 28 and LESSONS == list(lessons_with_pieces())
    sizes = [path.stat().st_size for path in (ROOT / "building").glob("*.ipynb")]
    assert max(sizes) < 100_000 and sum(sizes) < 2_000_000


@pytest.mark.parametrize("name", RUN)
def test_a_lesson_runs_to_its_end_with_nothing_filled_in(name):
    said = run("tools/building.py", "--run", name, MPLBACKEND="agg", OMP_NUM_THREADS="1")
    pieces = lessons_with_pieces()[name]
    for piece in pieces:
        assert f"… {piece.name} is still to be written" in said, said
    assert "✗" not in said


@pytest.mark.parametrize("name", ["04_rmsnorm", "06a_gqa", "09a_cache"])
def test_a_lesson_runs_with_everything_filled_in(name):
    said = run("tools/building.py", "--run", name, "--solved", OMP_NUM_THREADS="1")
    for piece in lessons_with_pieces()[name]:
        assert f"✓ {piece.name} is right" in said, said
    assert "who has the ball" in said.lower() and "Anna" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_every_lesson_runs_with_everything_filled_in(name):
    said = run("tools/building.py", "--run", name, "--solved", OMP_NUM_THREADS="1")
    assert said.count("is right") == len(lessons_with_pieces()[name]), said


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
    for number in (1, 2, 3, 4, 4):
        build.hint("rotate_half")
        assert f"({number} of 4)" in capsys.readouterr().out
    assert build.read_progress()["rotate_half"]["hints"] == 4
    build.hint("nothing of that name")
    assert "there is no piece called" in capsys.readouterr().out


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
