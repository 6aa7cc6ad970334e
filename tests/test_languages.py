"""Languages: the notebook's numbers of the real Qwen3, and the tokens that no text reaches."""

import ast
import json
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import normalizers

from qwen_nb.bpe import spell, split
from qwen_nb.languages import bytes_per_token, sort_of
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.vocabulary import read_vocabulary

ROOT = Path(__file__).resolve().parent.parent
CELLS = json.loads((ROOT / "nbs/03d_languages.ipynb").read_text(encoding="utf-8"))["cells"]
DATA = Path(os.environ.get("QWEN_NB_DATA") or ROOT.parent / "shared" / "qwen") / "tokenizer"
official = pytest.mark.skipif(
    not (DATA / "qwen3_tokenizer.json").is_file(),
    reason=f"the official Qwen tokenizer is not in {DATA} (QWEN_NB_DATA may name another folder)",
)
their_nfc = normalizers.NFC().normalize_str


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    home = tmp_path_factory.mktemp("official")
    (home / "tokenizer.json").symlink_to(DATA / "qwen3_tokenizer.json")
    return Tokenizer.from_pretrained(home)


def constant(name):
    "What the notebook assigns to this name."
    for cell in CELLS:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(rf"^{name} =", source, re.M):
            for node in ast.parse(source).body:
                if isinstance(node, ast.Assign) and node.targets[0].id == name:
                    return ast.literal_eval(node.value)


@official
def test_what_a_sentence_costs(qwen3):
    sentences, stated = constant("NEW"), constant("QWEN3_TOKENS")
    assert {k: len(qwen3.encode(text)) for k, text in sentences.items()} == stated
    first = "".join(CELLS[0]["source"])
    for language in ("English", "Hindi"):
        assert f" {stated[language]} " in first


@official
def test_the_table_of_real_ids(qwen3):
    text = "\n".join("".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown")
    rows = re.findall(r"^\| `([^`]+)` \| ([\d ]+) \|$", text, re.M)
    assert len(rows) >= 5
    for piece, ids in rows:
        assert qwen3.encode(piece) == [int(i) for i in ids.split()], piece


def test_sorts_of_the_packaged_rows():
    tok = Tokenizer.from_pretrained()
    sorts = Counter(sort_of(tok, i) for i in range(512))
    assert sorts["impossible byte"] == 13 and sorts["added"] == 9
    assert sorts["no token"] == 512 - len(tok)
    assert sort_of(tok, tok.encode(" has")[0]) == "text"
    assert bytes_per_token(tok, ["中"]) == 1 < bytes_per_token(tok, ["Max has the ball."])


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
