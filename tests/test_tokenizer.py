"""The tokenizer against the official one and against the `tokenizers` library, and the things a notebook is too short for.

The official files are not part of this project. They are looked for in ../shared/qwen beside the repository, or in the folder that
QWEN_NB_DATA names (it holds `tokenizer/qwen3_tokenizer.json` and so on). Without them those tests are skipped, and the packaged
tokenizer, made in the same way, stands in for the rest."""

import base64
import copy
import json
import os
import pickle
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import Regex, normalizers, pre_tokenizers

import qwen_nb.tokenizer as module
from qwen_nb.inspect import packaged_model
from qwen_nb.tokenizer import (
    BYTE_OF,
    CHAR_OF,
    KINDS,
    QWEN_ADDED,
    SPLIT,
    SPLIT_MARKS,
    CharKinds,
    PlainTokenizer,
    Tokenizer,
    check_text,
    draw_tokens,
    learn,
    learn_with_library,
    merge_piece,
    nfc,
    read_tiktoken,
    read_vocabulary,
    spell,
    split,
    tokenizer_json,
    unspell,
)
from qwen_nb.world import SPECIAL, TAGS, Chooser, make_tokenizer, story

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs/03_tokenizer.ipynb"
DATA = Path(os.environ.get("QWEN_NB_DATA") or ROOT.parent / "shared" / "qwen") / "tokenizer"
official = pytest.mark.skipif(
    not (DATA / "qwen3_tokenizer.json").is_file(),
    reason=f"the official Qwen tokenizer is not in {DATA} (QWEN_NB_DATA may name another folder)",
)
EVERYTHING = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]


# where the library's Unicode tables differ from Python's


def their_kind(pattern, chars=EVERYTHING):
    "The characters that the library takes for, say, a letter."
    cut, found = pre_tokenizers.Split(Regex(pattern), "removed"), set()
    for block in ("".join(chars[i : i + 4096]) for i in range(0, len(chars), 4096)):
        found |= set(block).difference(*(piece for piece, _ in cut.pre_tokenize_str(block)))
    return found


class TheirKinds(CharKinds):
    "Kinds of characters by the library's tables."

    def __init__(self):
        letters, numbers, marks, blanks = (
            their_kind(p) for p in (r"\p{L}", r"\p{N}", r"\p{M}", r"\s")
        )
        for kind, chars in (("a", letters), ("0", numbers), ("^", marks), ("\t", blanks)):
            self.update(dict.fromkeys(map(ord, chars), kind))
        for c in "stredvmlSTREDVML":
            self[ord(c)] = c.lower()
        self.update({ord("ſ"): "s", 10: "\n", 13: "\n", 32: " ", ord("'"): "'"})

    def __missing__(self, number):
        return "."


their_nfc = normalizers.NFC().normalize_str


@pytest.fixture(scope="module")
def their_kinds():
    return TheirKinds()


@pytest.fixture(scope="module")
def odd(their_kinds):
    "The characters that Python's tables and the library's know differently: a regular expression."
    kinds = {c for c in EVERYTHING if KINDS[ord(c)] != their_kinds[ord(c)]}
    around = "\u0301\u0316\u0334\u0345\u05b0\u093c\u094d\u3099"
    marks = {
        c
        for c in EVERYTHING
        if unicodedata.combining(c)
        and any(nfc(t) != their_nfc(t) for d in around for t in ("x" + c + d, "x" + d + c))
    }
    composed = {
        c
        for c in EVERYTHING
        if unicodedata.decomposition(c)[:1] not in ("", "<")
        and nfc(d := unicodedata.normalize("NFD", c)) != their_nfc(d)
    }
    parts = {x for c in composed for x in c + unicodedata.normalize("NFD", c)}
    young = their_kind(r"\p{Cn}")
    assert all(unicodedata.category(c) == "Cn" or c in young for c in kinds), (
        "a character that both know is of another kind"
    )
    return re.compile("[" + "".join(map(re.escape, kinds | marks | parts)) + "]")


# strings to try

BLANKS = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1f",
    "\x85",
    "\xa0",
    "\u1680",
    "\u2003",
    "\u200b",
    "\u2028",
    "\u3000",
    "\ufeff",
]
WORDS = """It's they'LL we'Ve 'tis I'm O'Re Max kitchen Küche está ¿Quién кухне المطبخ रसोई 厨房里 台所にいます 부엌에 กำลัง Việt café naïve ǅ ﬁ Ⅷ ½ 42 3.14 1e-5
 <|im_end|> <|im_start|> <think> </think> <tool_call> <| |> im_end <|endoftext x== != -> // /* */ {} [] () __init__ self.x #!/bin/sh & && ::""".split()
CODE = [
    "def f(x):\n    return x**2\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n}\n",
    "SELECT * FROM t WHERE id='1';--",
    '<a href="x">é</a>\r\n',
    "λ x → x + 1\n\n\n",
]
EMOJI = ["🦙", "👨‍👩‍👧‍👦", "👍🏽", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🇩🇪", "1️⃣", "❤️", "☕︎", "\u200d", "\ufe0f", "🏽"]


def broken(rng):
    "Text in which U+FFFD stands for half characters: from UTF-16 with lone surrogates, and from cut UTF-8."
    units = [
        rng.choice([0x41, 0xD83E, 0xDD99, 0xDC00, 0xD800, 0x4E2D, 0xFFFD])
        for _ in range(rng.randint(1, 8))
    ]
    raw = "é中🦙 abc".encode()
    return rng.choice(
        [
            b"".join(u.to_bytes(2, "little") for u in units).decode("utf-16-le", errors="replace"),
            raw[rng.randrange(len(raw)) :][: rng.randrange(1, 9)].decode(errors="replace"),
        ]
    )


def window(rng):
    "Characters of one neighbourhood, somewhere in Unicode."
    start = rng.choice(
        [
            rng.randrange(0x3000),
            rng.randrange(0x11000),
            rng.randrange(0x20000),
            rng.randrange(0x110000),
        ]
    )
    return "".join(
        chr(n)
        for n in (rng.randrange(start, start + 96) for _ in range(rng.randint(1, 12)))
        if n < 0x110000 and not 0xD800 <= n < 0xE000
    )


def accents(rng):
    text = "".join(
        rng.choice("aeiouAEIOUcnsxΑωи각ሀ")
        + "".join(
            rng.choices(
                "\u0301\u0302\u0323\u0327\u0308\u0316\u0345\u3099\u05b0\u094d", k=rng.randrange(4)
            )
        )
        for _ in range(rng.randint(1, 6))
    )
    return unicodedata.normalize(
        rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), text + rng.choice(WORDS)
    )


def anything(rng):
    return "".join(rng.choices(EVERYTHING, k=rng.randint(1, 20)))


def ascii_text(rng):
    return "".join(chr(rng.randrange(128)) for _ in range(rng.randint(0, 40)))


def blanks(rng):
    return "".join(rng.choice(BLANKS + ["a", ".", "1"]) for _ in range(rng.randint(1, 12)))


def code(rng):
    return "".join(rng.choice([*CODE, *WORDS, *BLANKS[:5]]) for _ in range(rng.randint(1, 6)))


def emoji(rng):
    return "".join(rng.choice([*EMOJI, "a", " "]) for _ in range(rng.randint(1, 8)))


def words(rng):
    return "".join(
        rng.choice(["", " ", " ", "  ", "\n"]) + rng.choice(WORDS)
        for _ in range(rng.randint(1, 12))
    )


def run(rng):
    return rng.choice([*"aé中 \n\t.='1", "🦙", "ab", " \n", "\u0301", "hello", "=-"]) * rng.choice(
        [1, 7, 64, 65, 257, 1000, 3000]
    )


def mixed(rng):
    return "".join(
        rng.choice([anything, ascii_text, blanks, code, emoji, words, window, accents, broken])(rng)
        for _ in range(3)
    )


PLAN = {
    anything: 4000,
    window: 4000,
    ascii_text: 2500,
    blanks: 2500,
    code: 2000,
    emoji: 1000,
    words: 2500,
    accents: 2500,
    broken: 1000,
    mixed: 2500,
    run: 300,
}


@pytest.fixture(scope="module")
def strings():
    "More than 20,000 different strings."
    found = dict.fromkeys(
        f(random.Random(f"{f.__name__} {i}")) for f, n in PLAN.items() for i in range(n)
    )
    assert len(found) > 20_000
    return list(found)


# the tokenizers to compare


@pytest.fixture(scope="module", params=["packaged", pytest.param("official", marks=official)])
def folder(request, tmp_path_factory):
    if request.param == "packaged":
        return packaged_model()
    home = tmp_path_factory.mktemp("official")
    (home / "tokenizer.json").symlink_to(DATA / "qwen3_tokenizer.json")
    return home


@pytest.fixture(scope="module")
def theirs(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def plain(folder):
    return PlainTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.from_pretrained(folder)


def their_ids(theirs, texts):
    return [e.ids for e in theirs.encode_batch_fast(texts, add_special_tokens=False)]


def same(texts, a, b):
    for text, x, y in zip(texts, a, b):
        assert x == y, f"{text!a}: {x} and {y}"
    assert len(a) == len(b)


def test_package_on_every_string(ours, theirs, strings):
    "With names of added tokens allowed it is the official tokenizer, text for text; and every text comes back that comes back there."
    expected = their_ids(theirs, strings)
    same(strings, [ours.encode(s, allow_special=True) for s in strings], expected)
    back = theirs.decode_batch(expected, skip_special_tokens=False)
    same(strings, [ours.decode(ids) for ids in expected], back)
    assert sum(s == b for s, b in zip(strings, back)) > 10_000
    assert all(b == their_nfc(s) for s, b in zip(strings, back))


def test_plain_python_on_every_string(plain, theirs, strings, odd):
    "Ours with Python's tables: equal once the characters are left out that its tables and the library's know differently."
    texts = list(dict.fromkeys(odd.sub("", s) for s in strings))
    assert len(texts) > 19_000
    same(texts, [plain.encode(s, allow_special=True) for s in texts], their_ids(theirs, texts))


def test_the_tables_are_the_whole_difference(
    folder, theirs, strings, odd, their_kinds, monkeypatch
):
    "With the library's tables, ours is equal on all of Unicode."
    monkeypatch.setattr(module, "KINDS", their_kinds)
    monkeypatch.setattr(module, "nfc", their_nfc)
    texts = [s for s in strings if odd.search(s)]
    assert len(texts) > 100
    plain = PlainTokenizer.from_pretrained(folder)
    same(texts, [plain.encode(s, allow_special=True) for s in texts], their_ids(theirs, texts))


@pytest.mark.parametrize("pattern", [SPLIT, SPLIT_MARKS])
def test_split_of_every_character(pattern, odd):
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    chars = [
        c for c in EVERYTHING if unicodedata.category(c) not in ("Cn", "Co") and not odd.match(c)
    ]
    for i in range(0, len(chars), 128):
        text = "".join(f"a{c}b '{c} b'{c}x b'v{c} 1{c}\n{c}  {c}" for c in chars[i : i + 128])
        assert split(text, pattern) == [piece for piece, _ in cut.pre_tokenize_str(text)]


def test_split_notices_its_parts(monkeypatch):
    "Each kind of character matters, so the equality above is not empty."
    text = "it'ſx bA1 .\x1c. é\u0301x  .\r\n"
    right = split(text)
    for c, kind in (
        ("ſ", "a"),
        ("A", "."),
        ("1", "a"),
        ("\x1c", "\t"),
        ("é", "."),
        ("\u0301", "a"),
        ("\r", "\t"),
    ):
        monkeypatch.setitem(KINDS, ord(c), kind)
        assert split(text) != right, c
        monkeypatch.undo()
    assert split(text) == right and "".join(right) == text


# added tokens


def test_text_never_becomes_an_added_token(ours, plain, strings):
    added = set(ours.special.values())
    texts = strings[::20] + [
        "".join(ours.special),
        *ours.special,
        "<|im_<|im_end|>end|>",
        "\u226f<think\u226f",
    ]
    for tok in (ours, plain):
        assert not any(added & set(tok.encode(s)) for s in texts)
        assert all(tok.decode(tok.encode(name)) == name for name in tok.special)


def test_added_tokens_where_they_are_allowed(ours, plain, theirs):
    rng, names = random.Random(0), list(ours.special)
    for i in range(1000):
        text = "".join(
            rng.choice([rng.choice(names), rng.choice(names)[:-1], words(rng), accents(rng), " "])
            for _ in range(5)
        )
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert (
            ours.encode(text, allow_special=True)
            == expected
            == plain.encode(text, allow_special=True)
        ), text
        assert ours.decode(expected, skip_special=True) == theirs.decode(
            expected, skip_special_tokens=True
        )
    assert ours.special == {t.content: i for i, t in theirs.get_added_tokens_decoder().items()}
    assert ours.control == {i for i, t in theirs.get_added_tokens_decoder().items() if t.special}


# decoding


def test_decoding_anything(ours, theirs):
    rng = random.Random(0)
    for i in range(3000):
        ids = [rng.randrange(rng.choice([256, len(ours) + 30])) for _ in range(rng.randrange(12))]
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), ids


def test_bytes_of_tokens(ours, theirs):
    for text in (words(random.Random(i)) for i in range(200)):
        ids = ours.encode(text, allow_special=True)
        assert b"".join(map(ours.token_bytes, ids)) == nfc(text).encode()
        assert ours.decode(torch.tensor(ids)) == ours.decode(ids) == ours.decode(tuple(ids))
    assert (
        ours.token_bytes(len(ours)) == b""
        and ours.decode([len(ours), 10**9]) == theirs.decode([len(ours), 10**9]) == ""
    )
    assert len(ours) == ours.vocab_size == theirs.get_vocab_size()


@pytest.mark.parametrize("bad", [[-1], [1.5], ["a"], [[1, 2]], [None], [True, 2.0]])
def test_what_is_no_id(bad):
    with pytest.raises((TypeError, ValueError), match="id"):
        Tokenizer.from_pretrained().decode(bad)


def test_what_is_no_text():
    for tok in (Tokenizer.from_pretrained(), PlainTokenizer.from_pretrained()):
        with pytest.raises(ValueError, match="half a character.*ud83e.*position 3"):
            tok.encode("abc\ud83e")
        for bad in (b"abc", None, 7, ["a"]):
            with pytest.raises(TypeError, match="expected text"):
                tok.encode(bad)
    check_text("🦙")


def test_copies_encode_alike(ours):
    text = "Max has <|im_end|> the ball."
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.encode(text, True) == ours.encode(text, True) and twin.special == ours.special


# the official files


@official
def test_vectors():
    "47 awkward strings with the ids that another project's tests expect."
    texts = (DATA / "vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (DATA / "vectors.out").read_text(encoding="utf-8").split("\n")
    expected = [[int(i) for i in line.split()] for line in lines][: len(texts)]
    vocabulary = read_vocabulary(DATA)  # vocab.json and merges.txt
    assert len(texts) == len(expected) == 47
    for tok in (PlainTokenizer(vocabulary), Tokenizer(vocabulary)):
        same(texts, [tok.encode(t) for t in texts], expected)


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


@official
def test_tokens_that_no_text_reaches():
    "The numbers that the notebook states."
    tok = Tokenizer(read_vocabulary(DATA))
    cut, scripts, numbers = Counter(), Counter(), []
    for i in range(151_643):
        try:
            text = tok.token_bytes(i).decode()
        except UnicodeDecodeError:
            cut["part of a character"] += 1
        else:
            if sum(unicodedata.category(c)[0] == "N" for c in text) > 1:
                numbers.append(text)
            if tok.encode(text) == [i]:
                continue
            why = (
                "NFC" if their_nfc(text) != text else "split" if len(split(text)) > 1 else "merges"
            )
            cut[why] += 1
            if why == "split":
                scripts[unicodedata.name(text.lstrip()[0]).split()[0]] += 1
    assert cut == {"part of a character": 1448, "NFC": 248, "split": 1661}
    assert numbers == ["１０", "２０"] and not any(
        n.encode() in map(tok.token_bytes, tok.encode(n)) for n in numbers
    )
    assert scripts["THAI"] == 1578 and scripts["ARABIC"] == 73
    thai = tok.vocabulary.tokens[spell("ได้".encode())]
    assert tok.encode("ได้") != [thai] and tok.encode(" ได้ ").count(thai) == 0


# files


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
    "A thousand damaged files: each is refused in one sentence, or what it gives encodes and decodes."
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
    "An added token that swallows blanks is refused where it would be looked for; ordinary text is encoded all the same."
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


# training


def tied_text(rng):
    "Words of few letters: at nearly every merge several pairs are equally frequent."
    letters = rng.choice(["ab", "abc", "abcdefgh", "aé中", "01 a", "\n \t."])
    return [
        "".join(rng.choices(letters + " ", k=rng.randint(1, 60))) for _ in range(rng.randint(1, 12))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_training_equals_the_library(seed):
    rng = random.Random(seed)
    texts = rng.choice(
        [
            tied_text,
            tied_text,
            lambda rng: [mixed(rng).replace("\0", "") for _ in range(10)],
            lambda rng: [run(rng) for _ in range(6)],
        ]
    )(rng)
    texts = [
        t
        if unicodedata.is_normalized("NFC", t) and their_nfc(t) == t
        else t.encode("ascii", "ignore").decode()
        for t in texts
    ]
    texts = [t for t in texts if all(unicodedata.category(c) != "Cn" for c in t)]
    for n in (1, 20, 300):
        assert learn(texts, n) == learn_with_library(texts, n), texts


def test_training_on_stories_gives_the_packaged_kind():
    texts = [
        "\n".join(line.text for line in story(Chooser(random.Random(seed)))) for seed in range(300)
    ]
    made = make_tokenizer(texts, 400)
    tok = Tokenizer.train(texts, 400, SPECIAL, TAGS)
    model = json.loads(made.to_str())["model"]
    assert tok.vocabulary.tokens == model["vocab"] and tok.vocabulary.merges == [
        tuple(m) for m in model["merges"]
    ]
    assert tok.special == {t.content: i for i, t in made.get_added_tokens_decoder().items()}
    assert (tok.vocabulary.tokens, tok.vocabulary.merges) == learn(texts, 400 - 256 - 9)
    assert tok.control == {tok.special[name] for name in SPECIAL}


@pytest.mark.parametrize(
    "kw, error, what",
    [
        (dict(texts="one string", vocab_size=300), TypeError, "list"),
        (dict(texts=["a"], vocab_size=300, special_tokens="<x>"), TypeError, "list"),
        (dict(texts=["a"], vocab_size=258), ValueError, "at least 259"),
        (dict(texts=["a"], vocab_size=300, special_tokens=["<x>", "<x>"]), ValueError, "twice"),
        (dict(texts=["a"], vocab_size=300, special_tokens=[""]), ValueError, "empty"),
        (dict(texts=["a\ud800"], vocab_size=300), ValueError, "half a character"),
        (dict(texts=[b"a"], vocab_size=300), TypeError, "expected text"),
    ],
)
def test_training_on_what_it_cannot_use(kw, error, what):
    with pytest.raises(error, match=what):
        Tokenizer.train(**kw)


def test_training_on_nothing():
    tok = Tokenizer.train([], 1000)
    assert len(tok) == 259 and tok.decode(tok.encode("é<|im_end|>")) == "é<|im_end|>"


# speed


def test_a_word_of_any_length(plain, ours):
    "The number of looks into the ranks grows with the length, not with its square; the ids are the library's."

    class Counted(dict):
        looks = 0

        def get(self, key):
            self.looks += 1
            return super().get(key)

        def __contains__(self, key):
            self.looks += 1
            return super().__contains__(key)

    word = "".join(random.Random(0).choices("etaoinshrdlu", k=20_000))
    looks = []
    for n in (10_000, 20_000):
        ranks = Counted(plain.ranks)
        ids = merge_piece([plain.vocabulary.tokens[CHAR_OF[b]] for b in word[:n].encode()], ranks)
        assert ids == ours.encode(word[:n])
        looks.append(ranks.looks)
    assert looks[1] < 2.2 * looks[0] and looks[1] < 6 * 20_000


def test_the_memory_of_pieces_is_bounded(plain):
    plain.encode(
        " ".join(f"x{'abcdefghij'[i % 10]}{chr(0x4E00 + i % 20_000)}" for i in range(60_000))
    )
    assert len(plain._remembered) <= 50_001


# pictures and the notebook


def test_pictures_are_whole_xml():
    from xml.etree import ElementTree

    tok = Tokenizer.from_pretrained()
    rows = {
        text[:20].replace("\0", ""): tok.tokens(tok.encode(text, True))
        for text in [*WORDS, *CODE, *EMOJI, "\0\x1c", "<|im_end|>&<", "\u0301a"]
    }
    svg = ElementTree.fromstring(draw_tokens(rows)._repr_svg_())
    assert len(svg.findall(".//{*}rect")) == 1 + sum(map(len, rows.values()))
    assert all(
        float(r.get("x", 0)) + float(r.get("width")) <= 700
        for r in svg.findall(".//{*}rect")
        if float(r.get("x", 0)) > 4
    )


def test_the_notebooks_folded_solutions_are_the_ones_it_runs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = {
        kind: "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == kind)
        for kind in ("markdown", "code")
    }
    folded = re.findall(
        r"<summary>Solution</summary>\s*```python\n(.*?)\n```", text["markdown"], re.S
    )
    assert len(folded) == 2 and all(solution in text["code"] for solution in folded)
