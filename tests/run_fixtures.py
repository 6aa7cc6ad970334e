"""A small run and its data, for the tests of training: a plugin of pytest."""

import pytest
from runs import QUICK

from qwen_nb import data
from qwen_nb.settings import TrainConfig
from qwen_nb.shards import write_shards
from qwen_nb.tokenizer import Tokenizer


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(data.world_stories(60, seed=3), 400)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder, data.world_stories(60, seed=3), tokenizer)
    return folder


@pytest.fixture
def config(tmp_path, shards):
    return TrainConfig(out=str(tmp_path / "out"), data=str(shards), **QUICK)
