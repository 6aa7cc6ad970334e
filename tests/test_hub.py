"""`find_model` against a hub on this machine: what it fetches, what it keeps, and what it says when
something is wrong."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from hub import Hub
from huggingface_hub import constants, utils
from safetensors.torch import save

from qwen_nb.hub import find_model, open_weights, read_json

torch.manual_seed(0)
WEIGHTS = {f"model.layers.{i}.weight": torch.randn(64, 256).bfloat16() for i in range(3)}
CONFIG = b'{"model_type": "qwen3"}'
SHARDS = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
INDEX = {name: shard for name, shard in zip(WEIGHTS, SHARDS)}


def whole():
    return {"config.json": CONFIG, "model.safetensors": save(WEIGHTS)}


def sharded():
    import json

    files = {
        "config.json": CONFIG,
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": INDEX}).encode(),
    }
    return files | {shard: save({name: WEIGHTS[name]}) for name, shard in INDEX.items()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub on the loopback interface, an empty cache, no token, no proxy, no long waits."
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
    ):
        monkeypatch.delenv(name, raising=False)
    with Hub() as hub:
        point_at(hub.url, tmp_path / "cache", monkeypatch)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield hub


def point_at(url, cache, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if hasattr(utils, "close_session"):
        utils.close_session()


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def says(error, *words):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400, text
    for word in words:
        assert word in text, (word, text)


def is_ours(folder):
    found = open_weights(folder)
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[k], WEIGHTS[k]) for k in found)
    return True


def left_behind(tmp_path):
    "The weights and half-weights in the cache, by size."
    return sorted(
        p.stat().st_size
        for p in (tmp_path / "cache").rglob("*")
        if p.is_file() and "blobs" in p.parts and p.stat().st_size > 10_000
    )


def test_a_good_model_is_fetched_once(hub):
    hub.add("org/good", whole() | {"README.md": b"# hello", "pytorch_model.bin": b"a pickle"})
    folder = find_model("org/good")
    assert is_ours(folder) and read_json(folder, "config.json") == {"model_type": "qwen3"}
    assert hub.fetched() == ["config.json", "model.safetensors"]  # neither the pickle nor the text
    assert find_model("org/good") == folder
    assert hub.fetched() == [] and not any("/tree/" in path for _, path, _ in hub.log)


def test_what_was_fetched_is_there_without_network(hub, tmp_path, monkeypatch):
    hub.add("org/good", whole())
    folder = find_model("org/good")
    point_at(closed_port(), tmp_path / "cache", monkeypatch)
    assert find_model("org/good") == folder and is_ours(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("org/good") == folder


def test_a_sharded_model(hub):
    hub.add("org/shards", sharded())
    assert is_ours(find_model("org/shards"))
    assert hub.fetched() == sorted(["config.json", "model.safetensors.index.json", *SHARDS])


def test_no_such_model(hub, tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        find_model("org/nothing")
    says(e, "org/nothing", hub.url, "spelling")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("name", ["no spaces", "-dash/name", "a--b/c", "x" * 200, "a/b\0"])
def test_names_that_cannot_be(hub, name):
    with pytest.raises(FileNotFoundError) as e:
        find_model(name)
    says(e, name[:20])
    assert hub.log == []  # nobody was asked


def test_a_file_that_is_listed_but_missing(hub, tmp_path):
    hub.add("org/hole", sharded(), missing={SHARDS[1]})
    with pytest.raises(FileNotFoundError) as e:
        find_model("org/hole")
    says(e, "org/hole", SHARDS[1])
    assert all(
        size == len(save({"model.layers.0.weight": WEIGHTS["model.layers.0.weight"]}))
        for size in left_behind(tmp_path)
    )


def test_a_shard_that_is_not_even_listed(hub):
    files = sharded()
    del files[SHARDS[2]]
    hub.add("org/unlisted", files)
    with pytest.raises(FileNotFoundError) as e:
        open_weights(find_model("org/unlisted"))
    says(e, SHARDS[2])


def test_no_config_and_no_weights(hub):
    hub.add("org/bare", {"tokenizer.json": b"{}"})
    folder = find_model("org/bare")
    with pytest.raises(FileNotFoundError) as e:
        read_json(folder, "config.json")
    says(e, "config.json", "tokenizer.json")
    with pytest.raises(FileNotFoundError) as e:
        open_weights(folder)
    says(e, "model.safetensors", "tokenizer.json")


def test_a_repository_that_is_no_model(hub):
    hub.add("org/data", {"table.csv": b"1,2"})
    with pytest.raises(FileNotFoundError) as e:
        find_model("org/data")
    says(e, "org/data", "config.json")


def test_a_gated_model(hub, tmp_path, monkeypatch):
    hub.add("org/gated", whole(), gated=True)
    with pytest.raises(PermissionError) as e:
        find_model("org/gated")
    says(e, "org/gated", "hf auth login", hub.url + "/org/gated")
    assert left_behind(tmp_path) == []
    monkeypatch.setenv("HF_TOKEN", "good")
    assert is_ours(find_model("org/gated"))


def test_a_dropped_connection_is_picked_up_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1024
    )  # what has arrived is kept in steps of 10 MB: less, for our small file
    repo = hub.add("org/drop", whole(), drops={"model.safetensors": 2})
    assert is_ours(find_model("org/drop")) and repo.drops == {"model.safetensors": 0}
    first, second, third = [
        span for command, path, span in hub.log if command == "GET" and "/store/" in path
    ]
    assert first is None and 0 < int(second[6:-1]) < int(third[6:-1]), (second, third)


def test_a_connection_that_keeps_dropping(hub, tmp_path):
    files = sharded()
    repo = hub.add("org/drop", files, drops={SHARDS[2]: 1000})
    with pytest.raises(ConnectionError) as e:
        find_model("org/drop")
    says(e, "org/drop", hub.url, "call again")
    assert set(left_behind(tmp_path)) <= {len(files[s]) for s in SHARDS[:2]} and not list(
        tmp_path.rglob("*.incomplete")
    )
    hub.fetched()
    repo.drops.clear()
    assert is_ours(find_model("org/drop"))
    again = hub.fetched()
    assert SHARDS[2] in again and len(again) < len(files)  # what had arrived whole was kept


def test_a_corrupted_shard_is_seen_deleted_and_fetched_again(hub, tmp_path):
    repo = hub.add("org/flipped", sharded(), corrupt={SHARDS[1]})
    with pytest.raises(ValueError) as e:
        find_model("org/flipped")
    says(e, "org/flipped", SHARDS[1], "checksum")
    assert len(left_behind(tmp_path)) == 2
    hub.fetched()
    with pytest.raises(ValueError):
        find_model("org/flipped")  # still corrupt
    assert hub.fetched() == [SHARDS[1]]
    repo.corrupt.clear()
    assert is_ours(find_model("org/flipped"))
    assert hub.fetched() == [SHARDS[1]]


def test_without_our_check_nobody_sees_it(hub, monkeypatch):
    hub.add("org/flipped", sharded(), corrupt={SHARDS[1]})
    monkeypatch.setattr("qwen_nb.hub.verify_download", lambda *_: None)
    found = open_weights(
        find_model("org/flipped")
    )  # huggingface_hub compares lengths, not contents
    assert [k for k in WEIGHTS if not torch.equal(found[k], WEIGHTS[k])] == [
        "model.layers.1.weight"
    ]


def test_corruption_is_seen_although_the_first_call_broke_off(hub):
    repo = hub.add("org/both", sharded(), corrupt={SHARDS[0]}, missing={SHARDS[2]})
    with pytest.raises(FileNotFoundError):
        find_model("org/both")
    repo.missing.clear()
    with pytest.raises(ValueError) as e:
        find_model("org/both")
    says(e, SHARDS[0], "checksum")


def test_a_corrupted_config(hub):
    hub.add("org/config", whole(), corrupt={"config.json"})
    with pytest.raises(ValueError) as e:
        find_model("org/config")
    says(e, "config.json", "checksum")


def test_no_network(hub, tmp_path, monkeypatch):
    url = closed_port()
    point_at(url, tmp_path / "cache", monkeypatch)
    with pytest.raises(ConnectionError) as e:
        find_model("Qwen/Qwen3-0.6B")
    says(e, "Qwen/Qwen3-0.6B", url, "cache")
    assert left_behind(tmp_path) == []


def test_offline_by_choice(hub, monkeypatch):
    hub.add("org/good", whole())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError) as e:
        find_model("org/good")
    says(e, "org/good", "HF_HUB_OFFLINE")
    assert hub.log == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_down(hub, status):
    hub.status = status
    with pytest.raises(ConnectionError) as e:
        find_model("org/good")
    says(e, "org/good", str(status))


def test_a_hub_that_refuses(hub):
    hub.status = 403
    with pytest.raises(PermissionError) as e:
        find_model("org/good")
    says(e, "org/good", "403")


def test_a_login_page_instead_of_a_hub(hub):
    hub.page = b"<html>Welcome to the hotel's network</html>"
    with pytest.raises(ConnectionError) as e:
        find_model("org/good")
    says(e, "org/good", hub.url)


def test_HF_ENDPOINT_in_a_fresh_process(hub, tmp_path):
    hub.add("org/shards", sharded())
    code = "from qwen_nb.hub import *; print(len(open_weights(find_model('org/shards'))))"
    env = os.environ | dict(
        HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "3\n", done.stderr


def test_the_notes_of_a_file(tmp_path):
    import torch
    from safetensors.torch import save_file

    from qwen_nb.files import read_metadata

    path = tmp_path / "a.safetensors"
    for notes in (None, {}, {"format": "pt", "é": "\n"}):
        save_file({"a": torch.ones(2)}, path, notes)
        assert read_metadata(path) == (notes or {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut off"):
        read_metadata(path)
