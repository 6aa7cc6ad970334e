#!/usr/bin/env python3
"""How fast is the tokenizer? Plain Python, the package's, and the `tokenizers` library alone.

    python benchmarks/tokenizer.py             # Qwen's official tokenizer if it is at hand
    python benchmarks/tokenizer.py --model DIR

A megabyte of text (English, Python and nine other languages), single "words" of up to 100,000
letters, and training. Every encoding is done by a tokenizer that has seen nothing yet, in turn, and
the ids must be equal. Times are medians in seconds.
"""

import argparse
import os
import platform
import pydoc_data.topics
import random
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers

from qwen_nb.hub import find_model
from qwen_nb.tokenizer import (
    PlainTokenizer,
    Tokenizer,
    learn,
    learn_with_library,
    library_tokenizer,
)
from qwen_nb.vocabulary import read_vocabulary

LINES = [
    "Max ist in der Küche, und Anna hat den Schlüssel.",
    "Anna está en el jardín. ¿Quién tiene la llave?",
    "Où est la balle ? Elle est là-bas, près du château.",
    "Где мяч? Мяч на кухне. У кого ключ?",
    "أين الكرة؟ الكرة في المطبخ.",
    "गेंद कहाँ है? गेंद रसोई में है।",
    "球在哪里？球在厨房里。谁有钥匙？",
    "ボールはどこにありますか。台所にあります。",
    "공은 어디에 있습니까? 부엌에 있습니다. 🦙👍🏽",
]


def megabyte(size=1_000_000):
    """Text of this many bytes: half English (Python's manual), a third code (its library), the
    rest other languages. The same in every run of one Python version."""
    rng, code = random.Random(0), b""
    for path in sorted(Path(argparse.__file__).parent.glob("[a-t]*.py")):
        code += path.read_bytes()[:8000]
    english = "\n".join(pydoc_data.topics.topics.values()).encode()
    words = [word for line in LINES for word in line.split()]
    others = " ".join(rng.choice(words) for _ in range(size // 20)).encode()
    parts = [english[: size // 2], code[: size // 3], others]
    return b"\n".join(parts)[:size].decode(errors="ignore")


def timed(f, *args):
    start = time.perf_counter()
    found = f(*args)
    return time.perf_counter() - start, found


def fresh(vocabulary):
    "The three, with nothing remembered; everything is built before the clock starts."
    plain, package = PlainTokenizer(vocabulary), Tokenizer(vocabulary)
    plain.ranks, package.library  # noqa: B018  made at the first use
    alone = library_tokenizer(
        tokenizers.models.BPE(vocabulary.tokens, vocabulary.merges), vocabulary.pattern
    )
    return {
        "plain Python": plain.encode,
        "package": package.encode,
        "library alone": lambda text: alone.encode(text, add_special_tokens=False).ids,
    }


def compare(name, text, vocabulary, runs):
    times = {}
    for _ in range(runs):
        ids = []
        for who, encode in fresh(vocabulary).items():
            seconds, found = timed(encode, text)
            times.setdefault(who, []).append(seconds)
            ids.append(found)
        assert ids[0] == ids[1] == ids[2], name
    middle = {who: statistics.median(t) for who, t in times.items()}
    alone = middle["library alone"]
    columns = "".join(f"{t:>15.3f}" for t in middle.values())
    slower, package = middle["plain Python"] / alone, middle["package"] / alone
    print(f"{name:28}{len(ids[0]):>10,}{columns}{slower:>14.1f}{package:>13.2f}")


def train(text, n, runs):
    texts, times = text.split("\n\n"), {}
    for _ in range(runs):
        for who, f in (("plain Python", learn), ("library", learn_with_library)):
            seconds, found = timed(f, texts, n)
            times.setdefault(who, []).append((seconds, found))
    assert all(a[1] == b[1] for a, b in zip(*times.values()))
    a, b = (statistics.median(s for s, _ in t) for t in times.values())
    print(f"\n{n:,} merges learned from {len(text.encode()):,} bytes, the same ones:")
    print(f"plain Python {a:.2f} s, library {b:.2f} s ({a / b:.1f} times)")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or hub id with a Qwen tokenizer")
    parser.add_argument("--runs", type=int, default=3, help="of each (default: %(default)s)")
    args = parser.parse_args()
    data = (
        Path(
            os.environ.get("QWEN_NB_DATA")
            or Path(__file__).resolve().parent.parent.parent / "shared" / "qwen"
        )
        / "tokenizer"
    )
    at_hand = not args.model and (data / "vocab.json").is_file()
    vocabulary = read_vocabulary(data if at_hand else find_model(args.model))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"tokenizers {tokenizers.__version__}; medians of {args.runs}")
    which = "Qwen2, official" if at_hand else args.model or "packaged"
    tokens, merges = len(vocabulary.tokens), len(vocabulary.merges)
    print(f"{which} tokenizer: {tokens:,} tokens, {merges:,} merges")
    with tempfile.TemporaryDirectory() as tmp:
        Tokenizer(vocabulary).save(tmp)
        ours, _ = timed(Tokenizer.from_pretrained, tmp)
        theirs, _ = timed(tokenizers.Tokenizer.from_file, tmp + "/tokenizer.json")
    print(f"reading tokenizer.json: package {ours:.2f} s, library alone {theirs:.2f} s\n")
    heads = f"{'plain Python':>15}{'package':>15}{'library alone':>15}"
    print(f"{'':28}{'tokens':>10}{heads}{'plain/library':>14}{'pkg/library':>13}")
    text, rng = megabyte(), random.Random(0)
    compare("1 MB of text", text, vocabulary, args.runs)
    letters = "".join(rng.choices("eeeetttaaaooniinsshrrdlucmfwypvbgk", k=100_000))
    for n in (12_500, 25_000, 50_000, 100_000):
        compare(f"one word of {n:,} letters", letters[:n], vocabulary, args.runs)
    compare("100,000 times the letter a", "a" * 100_000, vocabulary, args.runs)
    train(text[:200_000], 2000, args.runs)


if __name__ == "__main__":
    main()
