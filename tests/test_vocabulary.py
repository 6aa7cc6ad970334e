"""A tokenizer's files: the three forms, broken ones, and what the notebook's table says of the
official ones."""

import base64
import json
import os
import random
import re
from pathlib import Path

import pytest
import tokenizers

from qwen_nb.bpe import BYTE_OF, CHAR_OF, unspell
from qwen_nb.tokenizer import Tokenizer, tokenizer_json
from qwen_nb.vocabulary import QWEN_ADDED, read_tiktoken, read_vocabulary

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs/03b_vocabulary.ipynb"
DATA = Path(os.environ.get("QWEN_NB_DATA") or ROOT.parent / "shared" / "qwen") / "tokenizer"
official = pytest.mark.skipif(
    not (DATA / "qwen3_tokenizer.json").is_file(),
    reason=f"the official Qwen tokenizer is not in {DATA} (QWEN_NB_DATA may name another folder)",
)


@official
def test_three_forms_are_one_vocabulary(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(DATA / "qwen3_tokenizer.json")
    one, two, three = (
        read_vocabulary(tmp_path),
        read_vocabulary(DATA),
        read_tiktoken(DATA / "qwen.tiktoken"),
    )
    assert len(one.tokens) == 151_643 and len(one.merges) == 151_387
    assert one.tokens == two.tokens == three.tokens
    assert one.merges == two.merges == three.merges
    assert [len(v.added) for v in (one, two, three)] == [26, 3, 208]
    assert (
        [t.name for t in one.added[:3]]
        == [t.name for t in two.added]
        == [t.name for t in three.added[:3]]
        == QWEN_ADDED
    )
    assert [len(Tokenizer(v)) for v in (one, two, three)] == [151_669, 151_646, 151_851]
    assert {t.name: t.id for t in one.added}["<|im_end|>"] == 151_645
    # and the notebook's table says the same
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for name, v in (("Qwen1", three), ("Qwen2", two), ("Qwen3", one)):
        row = re.search(rf"^\| {name} \|[^|]*\|(.*)\|$", text, re.M)[1]
        numbers = [int(n.replace(",", "")) for n in row.split("|")]
        found = [len(v.tokens), len(v.merges), len(v.added), len(Tokenizer(v))]
        assert numbers == found, f"the table says {numbers} of {name}, its files {found}"


def write_forms(tok, tmp_path):
    "The same tokenizer in the three forms, each in a folder of its own."
    v, folders = tok.vocabulary, [tmp_path / name for name in ("json", "pair", "tiktoken")]
    for f in folders:
        f.mkdir()
    (folders[0] / "tokenizer.json").write_text(json.dumps(tokenizer_json(v)), encoding="utf-8")
    (folders[1] / "vocab.json").write_text(json.dumps(v.tokens), encoding="utf-8")
    (folders[1] / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in v.merges), encoding="utf-8"
    )
    (folders[2] / "qwen.tiktoken").write_text(
        "".join(f"{base64.b64encode(unspell(t)).decode()} {i}\n" for t, i in v.tokens.items())
    )
    listed = {
        str(t.id): dict(
            content=t.name,
            special=t.control,
            lstrip=False,
            rstrip=False,
            normalized=False,
            single_word=False,
        )
        for t in v.added
    }
    for f in folders[1:]:
        (f / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": listed}), encoding="utf-8"
        )
    return folders


def test_three_forms(tmp_path):
    tok = Tokenizer.from_pretrained()
    for f in write_forms(tok, tmp_path):
        again = Tokenizer.from_pretrained(f)
        assert (
            again.vocabulary == tok.vocabulary
            and again.special == tok.special
            and again.control == tok.control
        ), f


def test_saved_file_opens_elsewhere(tmp_path):
    tok = Tokenizer.train(["the cat sat on the mat"] * 3, 300, ["<|end|>", "<|end|>>"], ["<a>"])
    tok.save(tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "new/tokenizer.json"))
    text = "the<|end|> mat <a>\u0301é<|end|>>"
    assert tok.encode(text, True) == theirs.encode(text).ids and tok.decode(
        tok.encode(text, True), True
    ) == theirs.decode(theirs.encode(text).ids)
    assert Tokenizer.from_pretrained(tmp_path / "new").vocabulary == tok.vocabulary
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "new/tokenizer.json"))
    assert fast(text).input_ids == tok.encode(text, True)


def test_older_spellings_of_merges(tmp_path):
    'Merges as "a b", the way files were written until 2024; and Windows line ends in merges.txt.'
    tok = Tokenizer.from_pretrained()
    one, two, _ = write_forms(tok, tmp_path)
    file = tokenizer_json(tok.vocabulary)
    file["model"]["merges"] = [" ".join(pair) for pair in tok.vocabulary.merges]
    (one / "tokenizer.json").write_text(json.dumps(file))
    (two / "merges.txt").write_bytes(
        (two / "merges.txt").read_text(encoding="utf-8").replace("\n", "\r\n").encode()
    )
    assert read_vocabulary(one) == read_vocabulary(two) == tok.vocabulary


def change(**kw):
    def f(file):
        for path, value in kw.items():
            *parents, last = path.split("__")
            at = file
            for p in parents:
                at = at[int(p) if p.isdigit() else p]
            at[last] = value
        return file

    return f


BROKEN = {
    "no model": lambda f: {k: v for k, v in f.items() if k != "model"},
    "a list": lambda f: [f],
    "other model": change(model__type="Unigram"),
    "dropout": change(model__dropout=0.1),
    "ignore_merges": change(model__ignore_merges=True),
    "byte_fallback": change(model__byte_fallback=True),
    "no normalizer": change(normalizer=None),
    "NFKC": change(normalizer={"type": "NFKC"}),
    "other split": change(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"\w+|\s+"}),
    "split given as text": change(pre_tokenizer__pretokenizers__0__pattern={"String": " "}),
    "inverted": change(pre_tokenizer__pretokenizers__0__invert=True),
    "prefix space": change(pre_tokenizer__pretokenizers__1__add_prefix_space=True),
    "GPT-2's split": change(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    ),
    "other decoder": change(decoder={"type": "Metaspace"}),
    "tokens as a list": change(model__vocab=[["a", 0]]),
    "id as text": change(model__vocab__Max="7"),
    "fractional id": change(model__vocab__Max=7.5),
    "id true": change(model__vocab__Max=True),
    "negative id": change(model__vocab__Max=-1),
    "huge id": change(model__vocab__Max=2**40),
    "two with one id": change(model__vocab__Max=300),
    "no stand-in": change(model__vocab={"Max ": 0}),
    "merge of nothing": change(model__merges=[["Max", "imum"]]),
    "merge of three": change(model__merges=[["a", "b", "c"]]),
    "merge of numbers": change(model__merges=[[1, 2]]),
    "merge twice": change(model__merges=[["h", "e"], ["h", "e"]]),
    "merges missing": lambda f: change(
        model={k: v for k, v in f["model"].items() if k != "merges"}
    )(f),
    "added without id": change(added_tokens=[{"content": "<x>"}]),
    "added without name": change(added_tokens=[{"id": 448, "content": None}]),
    "added empty": change(added_tokens=[{"id": 448, "content": ""}]),
    "added twice": change(
        added_tokens=[{"id": 448, "content": "<x>"}, {"id": 449, "content": "<x>"}]
    ),
    "added on a token": change(added_tokens=[{"id": 7, "content": "<x>"}]),
    "added with a fractional id": change(added_tokens=[{"id": 448.5, "content": "<x>"}]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizer_json(name, tmp_path):
    file = json.loads(json.dumps(tokenizer_json(Tokenizer.from_pretrained().vocabulary)))
    (tmp_path / "tokenizer.json").write_text(json.dumps(BROKEN[name](file)))
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(tmp_path)
    message = str(error.value)
    assert "tokenizer.json" in message and "\n" not in message and len(message) < 300


def test_mutated_files_are_refused_or_work(tmp_path):
    """A thousand damaged files: each is refused in one sentence, or what it gives encodes and
    decodes."""
    raw, rng, refused = (
        json.dumps(tokenizer_json(learned().vocabulary), ensure_ascii=False).encode(),
        random.Random(0),
        0,
    )
    for i in range(1000):
        bad = bytearray(raw)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(bad))
            rng.choice(
                [
                    lambda: bad.__delitem__(slice(at, at + rng.randint(1, 9))),
                    lambda: bad.__setitem__(at, rng.randrange(256)),
                    lambda: bad.insert(at, rng.choice(b'0"[]{},x')),
                    lambda: bad.__delitem__(slice(at, None)),
                ]
            )()
        (tmp_path / "tokenizer.json").write_bytes(bad)
        try:
            tok = Tokenizer.from_pretrained(tmp_path)
        except ValueError as e:
            refused += 1
            assert "tokenizer.json" in str(e) and "\n" not in str(e)
        else:
            assert tok.decode(tok.encode("Max is here.\n")) == "Max is here.\n"
    assert refused > 500


def learned():
    return Tokenizer.train(["Max is here. Anna is there.\n"] * 5, 290)


@pytest.mark.parametrize(
    "files, error, what",
    [
        ({}, FileNotFoundError, "no tokenizer in"),
        ({"config.json": "{}"}, FileNotFoundError, "config.json"),
        ({"vocab.json": "{}"}, FileNotFoundError, "merges.txt"),
        ({"merges.txt": "a b"}, FileNotFoundError, "vocab.json"),
        ({"vocab.json": "{}", "merges.txt": ""}, ValueError, "256 of the 256 bytes"),
        ({"vocab.json": '{"a": [1]}', "merges.txt": ""}, ValueError, "id"),
        ({"vocab.json": "[]", "merges.txt": ""}, ValueError, "list"),
        (
            {
                "vocab.json": json.dumps({c: i for i, c in enumerate(BYTE_OF)}),
                "merges.txt": "a b c",
            },
            ValueError,
            "merge 'a b c'",
        ),
        (
            {"vocab.json": json.dumps({c: i for i, c in enumerate(BYTE_OF)}), "merges.txt": "a b"},
            ValueError,
            "merge 'a b'",
        ),
        (
            {
                "vocab.json": json.dumps({c: i for i, c in enumerate(BYTE_OF)}),
                "merges.txt": "",
                "tokenizer_config.json": '{"added_tokens_decoder": {"x": {}}}',
            },
            ValueError,
            "tokenizer_config.json",
        ),
        (
            {
                "vocab.json": json.dumps({c: i for i, c in enumerate(BYTE_OF)}),
                "merges.txt": "",
                "tokenizer_config.json": '{"added_tokens_decoder": {"3": {"content": "<x>"}}}',
            },
            ValueError,
            "<x>",
        ),
        ({"qwen.tiktoken": "x"}, ValueError, "line 'x'"),
        ({"qwen.tiktoken": "IQ== a"}, ValueError, "IQ== a"),
        ({"qwen.tiktoken": "IQ== 0"}, ValueError, "255 of the 256 bytes"),
        (
            {
                "qwen.tiktoken": "".join(
                    f"{base64.b64encode(bytes([b])).decode()} {i}\n" for i, b in enumerate(CHAR_OF)
                )
                + "YWJj 256"
            },
            ValueError,
            "abc",
        ),
        ({"tokenizer.json": "{" * 100_000}, ValueError, "JSON"),
    ],
)
def test_broken_folders(files, error, what, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(error) as raised:
        Tokenizer.from_pretrained(tmp_path)
    assert (
        what in str(raised.value)
        and str(tmp_path) in str(raised.value)
        and "\n" not in str(raised.value)
    )


def test_merges_that_are_no_text(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(BYTE_OF)}))
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match="UTF-8"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Tokenizer.from_pretrained("./nowhere")


def test_added_tokens_of_other_makes(tmp_path):
    """An added token that swallows blanks is refused where it would be looked for; ordinary text
    is encoded all the same."""
    file = tokenizer_json(Tokenizer.from_pretrained().vocabulary)
    file["added_tokens"].append(
        dict(
            id=457,
            content="<mask>",
            special=True,
            lstrip=True,
            rstrip=False,
            normalized=False,
            single_word=False,
        )
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert (
        tok.encode("a <mask>") == Tokenizer.from_pretrained().encode("a <mask>")
        and tok.special["<mask>"] == 457
    )
    with pytest.raises(ValueError, match="<mask>"):
        tok.encode("a <mask>", allow_special=True)
