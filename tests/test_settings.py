"""The settings of a run, where they are read from, and what they open and build."""

import sys
import types
from dataclasses import replace

import pytest
from runs import one_sentence

from qwen_nb import resume as resume_module
from qwen_nb import settings as settings_module
from qwen_nb.inspect import packaged_model
from qwen_nb.lessons import ANSWER, STORIES, WorldRows
from qwen_nb.model import Qwen
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig, read_run_config
from qwen_nb.tokenizer import Tokenizer

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("quiet")


def test_config(tmp_path):
    (tmp_path / "a.json").write_text('{"steps": 7, "lr": 1, "checkpointing": true, "data": "d"}')
    given = ["lr=3e-4", "seed = 5", "checkpointing=False", "out=a=b"]
    c = read_run_config(tmp_path / "a.json", given)
    assert (c.steps, c.lr, c.data, c.seed, c.checkpointing, c.out) == (
        7,
        3e-4,
        "d",
        5,
        False,
        "a=b",
    ) and read_run_config() == TrainConfig()
    for text, match in {
        "[1]": "holds a list",
        '{"steps": 1.5}': "steps is 1.5; expected a whole number",
        '{"steps": true}': "expected a whole number",
        '{"stesp": 1}': "did you mean steps",
        '{"lr": "1e-3"}': "expected a number",
        "{": "is damaged",
        '{"dtype": "int8"}': "expected 'float32', 'bfloat16' or 'auto'",
        '{"beta2": 1}': "below 1",
        '{"model": {"x": 1}}': "no setting 'model'",
        '{"num_hidden_layers": 0}': "at least 1",
        '{"lr": 0}': "above 0",
        '{"lr": NaN}': "at least 0",
        '{"seq_len": 600}': "max_position_embeddings",
    }.items():
        (tmp_path / "b.json").write_text(text)
        one_sentence(match, lambda: read_run_config(tmp_path / "b.json"))
    one_sentence("ends in .toml or .json", lambda: read_run_config(tmp_path / "b.yaml"))
    one_sentence("no config", lambda: read_run_config(tmp_path / "none.toml"), FileNotFoundError)
    one_sentence("expected a number, such as lr=0.001$", lambda: read_run_config(None, ["lr=a"]))
    one_sentence("did you mean lr", lambda: read_run_config(None, ["lrr=1"]))
    assert len(one_sentence("no setting 'x'", lambda: read_run_config(None, ["x=1"]))) < 100
    for text in ("steps", "steps=x", "checkpointing=1", "nothing=1"):
        one_sentence("config|no setting", lambda: read_run_config(None, [text]))


def test_toml(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text('steps = 7\nlr = 5e-4\nout = "x"  # here\n')
    assert read_run_config(tmp_path / "a.toml") == TrainConfig(steps=7, lr=5e-4, out="x")
    (tmp_path / "b.toml").write_text("steps = ")
    one_sentence("is damaged", lambda: read_run_config(tmp_path / "b.toml"))
    monkeypatch.setitem(sys.modules, "tomllib", None)  # as in Python 3.10
    monkeypatch.setitem(
        sys.modules, "tomli", types.SimpleNamespace(loads=lambda text: dict(steps=len(text)))
    )
    assert read_run_config(tmp_path / "a.toml") == TrainConfig(
        steps=len((tmp_path / "a.toml").read_text())
    )


def test_rows_of_the_world(config, monkeypatch):
    "Rows made up on the fly, with the packaged tokenizer; the held-out ones by another seed."
    asked = set()

    class Rows(WorldRows):
        def batch(self, step, batch_size, seed):
            asked.add((seed, self.course is STORIES, self.answer))
            return super().batch(step, batch_size, seed)

    monkeypatch.setattr(settings_module, "WorldRows", Rows)
    final = train(
        replace(config, data="world", eval_every=6, seq_len=128, max_position_embeddings=128)
    )
    assert (
        asked == {(0, False, ANSWER), (resume_module.HELD_OUT_SEED, True, 1.0)}
        and len(Tokenizer.from_pretrained(final)) <= Qwen.from_pretrained(final).config.vocab_size
    )
    assert (final / "tokenizer_config.json").read_bytes() == (
        packaged_model() / "tokenizer_config.json"
    ).read_bytes()
