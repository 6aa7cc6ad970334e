"""Files of ids: they come back, survive kill -9 and a full disk, and damage is refused."""

import io
import json
import os
import random
import re
import threading
import time

import pytest
from kill import killed
from tqdm.auto import tqdm

from qwen_nb.data import split_documents, world_stories
from qwen_nb.shards import Shards, write_file, write_shards
from qwen_nb.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def texts():
    return world_stories(60, seed=3)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, 400)


@pytest.fixture
def folder(tmp_path, texts, tokenizer):
    write_shards(tmp_path / "d", texts, tokenizer, shard_tokens=1000)
    return tmp_path / "d"


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 450


@pytest.mark.parametrize("shard_tokens", [1, 7, 1000, 10**6])
def test_round_trip(tmp_path, texts, tokenizer, shard_tokens):
    some, rng = texts[:4] if shard_tokens < 10 else texts, random.Random(0)
    index = write_shards(tmp_path, some, tokenizer, 0.3, shard_tokens)
    parts, names = split_documents(some, 0.3), set()
    for name in parts:
        shards, whole = Shards(tmp_path, name, tokenizer, vocab_size=400), []
        for i, text in enumerate(parts[name]):
            want = tokenizer.encode(text) + [tokenizer.special["<|endoftext|>"]]
            assert shards.document(i).tolist() == want
            whole += want
        assert (
            len(shards) == len(whole)
            and shards[:].tolist() == whole
            and shards.documents == len(parts[name])
        )
        for _ in range(50):
            a, b = (rng.randrange(-len(whole) - 3, len(whole) + 4) for _ in range(2))
            assert shards[a:b].tolist() == whole[a:b]
        assert all(s["count"] == shard_tokens for s in index["parts"][name]["shards"][:-1])
        names |= {
            s["file"] for s in [*index["parts"][name]["shards"], index["parts"][name]["starts"]]
        }
        with pytest.raises(IndexError):
            shards.document(len(parts[name]))
        with pytest.raises(TypeError):
            shards[3]
    assert {p.name for p in tmp_path.iterdir()} == names | {"index.json", index["tokenizer"]}
    assert Shards(tmp_path).tokenizer().encode(texts[0]) == tokenizer.encode(texts[0])


def test_wide_ids(tmp_path, texts):
    "Over 65,536 ids: four bytes each, little-endian."
    big = Tokenizer.train(
        texts, 70_400, special_tokens=["<|endoftext|>", *(f"<|{i}|>" for i in range(70_000))]
    )
    index = write_shards(tmp_path, texts[:3], big, 0)
    big_end = len(big) - 1
    assert (
        index["dtype"] == "<u4"
        and big_end > 2**16
        and Shards(tmp_path).document(0)[-1] == big.special["<|endoftext|>"]
    )
    assert (tmp_path / index["parts"]["train"]["shards"][0]["file"]).stat().st_size == 4 * len(
        Shards(tmp_path)
    )
    assert len(Shards(tmp_path, "held_out")) == 0


def test_nothing_in_a_text_is_special(tmp_path, tokenizer):
    "A document that spells <|endoftext|> does not end there."
    write_shards(tmp_path, ["a <|endoftext|> b\n", "c\n"], tokenizer, 0)
    ids = Shards(tmp_path)[:].tolist()
    assert ids.count(tokenizer.special["<|endoftext|>"]) == 2 and Shards(tmp_path).documents == 2


def test_damage_is_refused(folder, tokenizer):
    files = sorted(folder.glob("*.bin"))
    assert len(files) >= 5
    for file in files:
        part, good = file.name.rsplit("-", 2)[0], file.read_bytes()
        for bad in (good[:-1], good + b"\0\0", good[:7] + bytes([good[7] ^ 4]) + good[8:]):
            file.write_bytes(bad)
            one_sentence("corrupted|bytes; expected", lambda: Shards(folder, part))
        file.unlink()
        one_sentence("is missing", lambda: Shards(folder, part))
        file.write_bytes(good)
        Shards(folder, part)
    one_sentence("no part 'test'", lambda: Shards(folder, "test"))
    index = (folder / "index.json").read_bytes()
    for bad in (
        b"",
        index[:100],
        b"[]",
        b"{}",
        b"3",
        index.replace(b"<u2", b"<u3"),
        index.replace(b'"count"', b'"size"'),
        b"\xff",
        index.replace(b'"documents"', b'"texts"'),
        *(
            re.sub(
                rb'("%s": )("[^"]*"|\d+)' % name,
                lambda m, value=value: m[1] + value,
                index,
                count=1,
            )
            for name, value in [
                (b"tokenizer", b"null"),
                (b"tokenizer_sha256", b"7"),
                (b"vocab_size", b'"x"'),
                (b"documents", b"[]"),
                (b"count", b'"x"'),
                (b"count", b"-1"),
                (b"tokens", b"null"),
                (b"file", b"7"),
                (b"sha256", b"{}"),
            ]
        ),
    ):
        assert bad != index
        (folder / "index.json").write_bytes(bad)
        one_sentence("no index of shards, or damaged", lambda: Shards(folder))
    (folder / "index.json").unlink()
    one_sentence("no prepared data", lambda: Shards(folder), FileNotFoundError)


def test_a_damaged_tokenizer_is_refused(folder, texts):
    path = next(folder.glob("tokenizer-*")) / "tokenizer.json"
    good, whole = path.read_bytes(), Shards(folder)
    Tokenizer.train(texts[::-1] + ["other words"], 400).save(
        path.parent
    )  # as many ids, with other meanings
    for bad in (path.read_bytes(), good[:-9], b"{}", None):
        if bad is None:
            path.unlink()
        else:
            path.write_bytes(bad)
        one_sentence("not the tokenizer that the ids", whole.tokenizer)
        one_sentence("not the tokenizer that the ids", lambda: Shards(folder))
    path.parent.rmdir()
    one_sentence("not the tokenizer that the ids", whole.tokenizer)
    Shards(folder, verify=False)


def test_what_does_not_fit(folder, texts, tokenizer):
    one_sentence(
        "another tokenizer",
        lambda: Shards(folder, tokenizer=Tokenizer.train(texts[::-1] + ["other words"], 400)),
    )
    one_sentence("another tokenizer", lambda: Shards(folder, tokenizer=Tokenizer.train(texts, 300)))
    one_sentence(
        f"{len(tokenizer)} ids, the model only {len(tokenizer) - 1}",
        lambda: Shards(folder, vocab_size=len(tokenizer) - 1),
    )
    one_sentence(
        "no <|endoftext|>",
        lambda: write_shards(folder, texts, Tokenizer.train(texts, 300, special_tokens=())),
    )
    Shards(folder, tokenizer=tokenizer, vocab_size=len(tokenizer))


def test_a_full_disk_loses_nothing(folder, texts, tokenizer, monkeypatch):
    before, calls, real = Shards(folder)[:].tolist(), [0], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(fd))
    write_shards(
        folder.parent / "elsewhere", world_stories(60, seed=8), tokenizer, shard_tokens=1000
    )
    n = len(calls) - 1
    assert n == len(
        [p for p in (folder.parent / "elsewhere").rglob("*") if p.is_file()]
    )  # every file is safe from a power cut
    for fail_at in range(1, n + 1):
        calls[0] = 0

        def fsync(fd):
            calls[0] += 1
            if calls[0] == fail_at:
                raise OSError(28, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        one_sentence(
            "No space left.*free some space",
            lambda: write_shards(
                folder, world_stories(60, seed=8), tokenizer, shard_tokens=1000
            ),
            OSError,
        )
        monkeypatch.setattr(os, "fsync", real)
        assert Shards(folder)[:].tolist() == before and not list(folder.glob("*.tmp"))
    index = write_shards(folder, texts, tokenizer)
    assert len(list(folder.glob("*.bin"))) == sum(
        len(p["shards"]) + 1 for p in index["parts"].values()
    )  # what the failures left is gone


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be replaced there")
def test_whoever_reads_the_old_file_keeps_it(tmp_path):
    "Replaced by a rename, not written over."
    write_file(tmp_path / "a", b"old")
    with open(tmp_path / "a", "rb") as old:
        write_file(tmp_path / "a", b"new!")
        assert old.read() == b"old" and (tmp_path / "a").read_bytes() == b"new!"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_whoever_is_killed_takes_no_lock_with_him(tmp_path):
    """Of the progress bars: their usual lock is shared with every child of a fork.

    Whoever came after would wait for ever."""
    tqdm.get_lock()  # from now on there is one to share
    assert killed(lambda: (tqdm.get_lock().acquire(), time.sleep(60)), tmp_path, after=0.5)
    after = threading.Thread(
        target=lambda: list(tqdm(range(2), disable=False, file=io.StringIO())), daemon=True
    )
    after.start()
    after.join(20)
    assert not after.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kill_9_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    """Killed before each single file operation, then at random moments, while one data set
    replaces another: what opens is one of the two, whole."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    both = [
        (texts, Tokenizer.train(texts, 320 + n))
        for n in (0, 1)
        for texts in [world_stories(30, n)]
    ]
    want, seen, rng, folder = (
        [split_documents(texts) for texts, _ in both],
        [],
        random.Random(0),
        tmp_path / "d",
    )

    def write(n):
        write_shards(folder, *both[n], shard_tokens=600)

    def found():
        got = {}
        for part in ("train", "held_out"):
            tokenizer = Shards(folder, part).tokenizer()
            shards = Shards(folder, part, tokenizer)  # the tokenizer beside the shards is theirs
            got[part] = [tokenizer.decode(shards.document(i)[:-1]) for i in range(shards.documents)]
        return want.index(got)

    at = 1
    while (
        killed(lambda: write(0), folder, at) and not (folder / "index.json").exists()
    ):  # the first time: nothing, until there is all
        one_sentence("no prepared data", lambda: Shards(folder), FileNotFoundError)
        at += 1
    assert at > 10 and found() == 0
    (folder / "mine.bin").write_bytes(b"keep")
    at = 1
    while killed(lambda: write(1), folder, at):
        seen.append(found())
        write(0)
        at += 1
    assert found() == 1 and set(seen) == {0, 1} and seen == sorted(seen) and at > 20
    for k in range(15):

        def for_ever():
            while True:
                write(0)
                write(1)

        assert killed(for_ever, folder, after=rng.random() * 0.2)
        found()
    write(0)
    index = json.loads((folder / "index.json").read_text())
    named = {s["file"] for p in index["parts"].values() for s in [*p["shards"], p["starts"]]}
    assert {p.name for p in folder.iterdir()} == named | {
        "index.json",
        "mine.bin",
        index["tokenizer"],
    }  # the dead left nothing behind


def test_the_index_says_which_share_of_the_text_is_held_out(tmp_path, tokenizer):
    talk = [dict(role="user", content="x" * 99), dict(role="assistant", content="y" * 99)]
    parts = dict(train=["a" * 30, talk], held_out=["b" * 10])
    index = write_shards(tmp_path, parts, tokenizer)
    assert index["held_out_share"] == 0.25  # conversations are no text
    older = json.loads((tmp_path / "index.json").read_text())
    del older["held_out_share"]
    (tmp_path / "index.json").write_text(json.dumps(older))
    Shards(tmp_path)  # an index that was written before is read


def test_conversations_come_last(tmp_path, tokenizer):
    talk = [dict(role="user", content="Who?"), dict(role="assistant", content="Max.")]
    write_shards(tmp_path, dict(train=["a\n", talk, "b\n"], held_out=[]), tokenizer)
    shards = Shards(tmp_path)
    assert (shards.documents, shards.conversations) == (3, 1)
    assert tokenizer.decode(shards.document(1)[:-1]) == "b\n"
    assert shards.document(2)[0] == tokenizer.special["<|im_start|>"]
