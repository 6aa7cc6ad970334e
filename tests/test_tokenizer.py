"""The tokenizer against the official one and against the `tokenizers` library.

The official files are not part of this project. They are looked for in ../shared/qwen beside the
repository, or in the folder that QWEN_NB_DATA names (it holds `tokenizer/qwen3_tokenizer.json` and
so on). Without them those tests are skipped, and the packaged tokenizer, made in the same way,
stands in for the rest."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import Regex, normalizers, pre_tokenizers

from qwen_nb.bpe import CHAR_OF, KINDS, SPLIT, SPLIT_MARKS, CharKinds, draw_tokens, nfc, split
from qwen_nb.encode import (
    YOUNG_KINDS,
    YOUNG_MARKS,
    hex_range,
    library_kinds,
    library_nfc,
    merge_piece,
)
from qwen_nb.inspect import packaged_model
from qwen_nb.tokenizer import PlainTokenizer, Tokenizer, check_text, learn, learn_with_library
from qwen_nb.vocabulary import read_vocabulary

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("QWEN_NB_DATA") or ROOT.parent / "shared" / "qwen") / "tokenizer"
official = pytest.mark.skipif(
    not (DATA / "qwen3_tokenizer.json").is_file(),
    reason=f"the official Qwen tokenizer is not in {DATA} (QWEN_NB_DATA may name another folder)",
)
EVERYTHING = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]


# the library's Unicode tables


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


def test_our_tables_are_the_librarys(their_kinds):
    """Whatever this Python's Unicode: no character is of another kind. If the library has grown,
    this says where."""
    ours = library_kinds()
    differ = [c for c in EVERYTHING if ours[ord(c)] != their_kinds[ord(c)]]
    assert not differ, (
        f"{len(differ)} characters, U+{ord(differ[0]):04X} to U+{ord(differ[-1]):04X}"
    )


def test_the_tables_are_in_order():
    for table, skip in ((YOUNG_KINDS, 1), (YOUNG_MARKS, 0)):
        last = -1
        for entry in table.split():
            numbers = hex_range(entry[skip:])
            assert last < numbers[0] <= numbers[-1] < 0x110000, entry
            last = numbers[-1]


def test_nfc_of_every_mark_and_every_composed_character():
    """Also of those that this Python does not know: the library does not move them, and neither
    do we."""
    around = "\u0301\u0316\u0334\u0345\u05b0\u093c\u094d\u3099\u08d2"
    young = [chr(n) for entry in YOUNG_MARKS.split() for n in hex_range(entry)]
    marks = [c for c in EVERYTHING if unicodedata.combining(c)] + young
    texts = ["x" + c + d for c in marks for d in around]
    texts += ["x" + d + c + "e" for c in marks for d in around]
    texts += [unicodedata.normalize("NFD", c) for c in EVERYTHING if unicodedata.decomposition(c)]
    same(texts, [library_nfc(t) for t in texts], [their_nfc(t) for t in texts])
    assert sum(nfc(t) != their_nfc(t) for t in texts) > 100  # Python's own would not do


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
WORDS = """
It's they'LL we'Ve 'tis I'm O'Re Max kitchen Küche está ¿Quién кухне المطبخ रसोई 厨房里
台所にいます 부엌에 กำลัง Việt café naïve ǅ ﬁ Ⅷ ½ 42 3.14 1e-5 <|im_end|> <|im_start|> <think>
</think> <tool_call> <| |> im_end <|endoftext x== != -> // /* */ {} [] () __init__
self.x #!/bin/sh & && ::
""".split()
CODE = [
    "def f(x):\n    return x**2\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n}\n",
    "SELECT * FROM t WHERE id='1';--",
    '<a href="x">é</a>\r\n',
    "λ x → x + 1\n\n\n",
]
EMOJI = ["🦙", "👨‍👩‍👧‍👦", "👍🏽", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🇩🇪", "1️⃣", "❤️", "☕︎", "\u200d", "\ufe0f", "🏽"]


def broken(rng):
    """Text in which U+FFFD stands for half characters: from UTF-16 with lone surrogates, and
    from cut UTF-8."""
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


def young(rng):
    "Characters younger than somebody's tables, in company."
    table = rng.choice([YOUNG_KINDS, YOUNG_MARKS]).split()
    some = [hex_range(entry.lstrip("LNM-")) for entry in rng.choices(table, k=3)]
    chars = [chr(rng.choice(numbers)) for numbers in some]
    return "".join(
        rng.choice(["", " ", "\n", "a", "e\u0301", "1", "\u0323\u0301", "'"]) + c for c in chars
    ) + rng.choice(["", "\u0301", "\n\n", " x"])


def run(rng):
    return rng.choice([*"aé中 \n\t.='1", "🦙", "ab", " \n", "\u0301", "hello", "=-"]) * rng.choice(
        [1, 7, 64, 65, 257, 1000, 3000]
    )


def mixed(rng):
    return "".join(
        rng.choice(
            [anything, ascii_text, blanks, code, emoji, words, window, accents, broken, young]
        )(rng)
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
    young: 3000,
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
    """With names of added tokens allowed it is the official tokenizer, text for text; and every
    text comes back that comes back there."""
    expected = their_ids(theirs, strings)
    same(strings, [ours.encode(s, allow_special=True) for s in strings], expected)
    back = theirs.decode_batch(expected, skip_special_tokens=False)
    same(strings, [ours.decode(ids) for ids in expected], back)
    assert sum(s == b for s, b in zip(strings, back)) > 10_000
    assert all(b == their_nfc(s) for s, b in zip(strings, back))


def test_plain_python_on_every_string(plain, theirs, strings):
    "Ours in plain Python, on all of Unicode: nothing is left out."
    same(
        strings,
        [plain.encode(s, allow_special=True) for s in strings],
        their_ids(theirs, strings),
    )


def test_with_pythons_own_tables_ids_would_differ(plain, strings, monkeypatch):
    "So the test above is about something."
    import qwen_nb.tokenizer as module

    right = [plain.encode(s) for s in strings]
    before_2021 = CharKinds()
    for entry in YOUNG_KINDS.split():
        before_2021.update(dict.fromkeys(hex_range(entry[1:]), "."))
    changes = {"library_nfc": nfc}
    if len(plain) > 100_000:  # the small vocabulary joins nothing across such a cut
        changes["library_kinds"] = lambda: before_2021
    for name, old in changes.items():
        monkeypatch.setattr(module, name, old)
        again = PlainTokenizer(plain.vocabulary)
        assert sum(again.encode(s) != ids for s, ids in zip(strings, right)) > 3, name
        monkeypatch.undo()


@pytest.mark.parametrize("pattern", [SPLIT, SPLIT_MARKS])
def test_split_of_every_character(pattern):
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    for i in range(0, len(EVERYTHING), 128):
        text = "".join(
            f"a{c}b '{c} b'{c}x b'v{c} 1{c}\n{c}  {c}" for c in EVERYTHING[i : i + 128]
        )
        ours = split(text, pattern, library_kinds())
        assert ours == [piece for piece, _ in cut.pre_tokenize_str(text)], hex(ord(EVERYTHING[i]))


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
        for bad in (b"abc", None, 7, [7]):
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
    for n in (1, 20, 300):
        assert learn(texts, n) == learn_with_library(texts, n), texts


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
    """The number of looks into the ranks grows with the length, not with its square; the ids are
    the library's."""

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


# what it needs


def test_it_needs_neither_torch_nor_matplotlib():
    """`import qwen_nb.tokenizer` and the modules that it is made of: a server that only counts
    tokens has no torch."""
    code = """
import sys
import qwen_nb.bpe, qwen_nb.encode, qwen_nb.vocabulary, qwen_nb.tokenizer, qwen_nb.world
heavy = {"torch", "matplotlib", "numpy", "transformers", "IPython"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_names_that_programs_ask_for(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(packaged_model())
    ours = Tokenizer.from_pretrained()
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.encode(["a b", ""]) == [ours.encode("a b"), []]
    config = dict(eos_token="<|im_end|>", pad_token=dict(content="<|im_start|>"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours.save(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.eos_token_id == again.special["<|im_end|>"]
    assert again.pad_token_id == again.special["<|im_start|>"]
    learned = Tokenizer.train(["a b c"], 300)
    assert learned.eos_token_id == learned.pad_token_id == learned.special["<|endoftext|>"]
    assert Tokenizer.train(["a b c"], 300, special_tokens=()).eos_token_id is None
