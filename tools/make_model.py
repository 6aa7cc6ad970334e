#!/usr/bin/env python3
"""The small pretrained model that ships inside the package. Three steps make it again:

    python tools/make_model.py tokenizer        # train its tokenizer, as Qwen's is built
    # train the model, from random weights; lists first (nbs/20e_lessons)
    qwen-nb train configs/packaged.toml
    python tools/make_model.py install runs/packaged

The last copies the finished run into the package, with a log of how its checkpoints score. `python
tools/make_model.py score` counts how often the model is right, on stories and conversations that it
never saw.

Its siblings of other generations are made alike, on the same tokenizer; their `config.json` lies in
the package already:

    qwen-nb train configs/qwen3_5.toml
    python tools/make_model.py install runs/qwen3_5 --sibling qwen3_5

The embedder, which begins as the small model, is made by tools/make_embedder.py.
"""

import argparse
import base64
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from qwen_nb.chat import quiz
from qwen_nb.durable import checkpoints
from qwen_nb.floor import make_tokenizer, measure
from qwen_nb.inspect import packaged_model
from qwen_nb.lessons import cut_course
from qwen_nb.log import read_log
from qwen_nb.model import Qwen
from qwen_nb.prompt import SMALL_TEMPLATE
from qwen_nb.settings import read_run_config
from qwen_nb.tokenizer import Tokenizer as ChatTokenizer
from qwen_nb.world import Chooser, conversation, story

# stories and conversations from this seed on mark the model; training draws from another generator
HELD_OUT = 1_000_000_000
VOCAB_SIZE = 512
# Words a conversation about the world will need, so that they too become single tokens.
EXTRA = [
    "Hello! I am a small Qwen. I know a small world: people, places and things.",
    "Yes. No. I do not know. Please tell me a story. Thank you! Goodbye.",
    "The user asks where the ball is. Max has the ball. Max is in the garden. So the ball is in "
    "the garden.",
    "What does Anna have? Who is in the kitchen? Is Tom in the attic? They are there. It is here.",
]


def write_tokenizer(args):
    "Train the tokenizer on 2000 stories and write it the way Qwen's repositories do."
    args.out.mkdir(parents=True, exist_ok=True)
    texts = [
        "\n".join(line.text for line in story(Chooser(random.Random(seed)))) for seed in range(2000)
    ]
    make_tokenizer(texts + EXTRA * 200, VOCAB_SIZE).save(str(args.out / "tokenizer.json"))
    special = dict(
        tokenizer_class="Qwen2Tokenizer",
        bos_token=None,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=SMALL_TEMPLATE,
    )
    (args.out / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")


def copy_tokenizer(out, tiktoken):
    "The small model's tokenizer, in the files of the sibling's generation. The ids are the same."
    shutil.copy(packaged_model() / "tokenizer_config.json", out)
    if not tiktoken:
        return shutil.copy(packaged_model() / "tokenizer.json", out)
    tokenizer = ChatTokenizer.from_pretrained(packaged_model())
    ranks = [tokenizer.token_bytes(i) for i in range(min(tokenizer.special.values()))]
    (out / "qwen.tiktoken").write_bytes(
        b"".join(base64.b64encode(raw) + b" %d\n" % rank for rank, raw in enumerate(ranks))
    )
    added = {
        str(i): dict(content=name, special=i in tokenizer.control)
        for name, i in tokenizer.special.items()
    }  # else there would be Qwen1's 205 spare ones, more than the model has rows
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            dict(
                tokenizer_class="QWenTokenizer",
                model_max_length=512,
                added_tokens_decoder=added,
                chat_template=SMALL_TEMPLATE,
            )
        )
        + "\n"
    )


def install(args):
    """Copy a finished run's model into the package, with a log: the settings, and what each
    checkpoint scores on 100 stories."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(args.run / "final" / name, args.out)
    if args.sibling:
        copy_tokenizer(args.out, tiktoken=args.sibling == "qwen1")
    lines = read_log(args.run)
    steps = [0] + [line["step"] for line in lines]
    config = read_run_config(args.config)
    about = dict(
        asdict(config),
        course=cut_course(config.lesson_rows),
        first_loss=lines[0]["loss"],
        tokens=sum(
            line["tokens"] * (step - before) for line, before, step in zip(lines, steps, steps[1:])
        ),
    )  # between two lines: as in the second
    log, tokenizer = [about], Tokenizer.from_file(str(packaged_model() / "tokenizer.json"))
    for folder in tqdm([*checkpoints(args.run)[1:-1], args.out], unit="checkpoint"):
        scores = measure(
            Qwen.from_pretrained(folder, dtype=torch.float32),
            tokenizer,
            range(HELD_OUT, HELD_OUT + 100),
        )
        log.append(
            dict(
                step=about["steps"] if folder == args.out else int(folder.name[5:]),
                **{k: round(v, 4) for k, v in scores.items()},
            )
        )
    (args.out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def score(args):
    "Count right answers: in stories, and in conversations after a thought and without one."
    model, tokenizer = (
        Qwen.from_pretrained(args.out, dtype=torch.float32),
        ChatTokenizer.from_pretrained(packaged_model()),
    )
    told = measure(
        model,
        Tokenizer.from_file(str(packaged_model() / "tokenizer.json")),
        range(HELD_OUT + 1000, HELD_OUT + 1000 + args.n),
    )
    print("stories          ", "  ".join(f"{k} {v:.4f}" for k, v in told.items()))
    talks = [
        conversation(Chooser(random.Random(seed)))
        for seed in range(3 * HELD_OUT, 3 * HELD_OUT + args.n)
    ]
    for thinks in (True, False):
        right = quiz(model, tokenizer, talks, thinks)
        print(
            "after a thought  " if thinks else "answering at once",
            "  ".join(f"{k} {v:.4f}" for k, v in right.items() if k != "asked"),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, about in (
        ("tokenizer", write_tokenizer, "train and write the tokenizer"),
        ("install", install, "copy a finished run into the package"),
        ("score", score, "count right answers on what the model never saw"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run_command=run)
        if name != "tokenizer":
            command.add_argument(
                "--sibling",
                default="",
                choices=["qwen1", "qwen2", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"],
                help="the sibling of that generation, in place of the small model",
            )
        command.add_argument(
            "--out", type=Path, help="folder of the model (default: the one in the package)"
        )
        if name == "install":
            command.add_argument("run", type=Path, help="the run's folder, such as runs/packaged")
            command.add_argument(
                "--config",
                type=Path,
                help="the run's config (default: configs/packaged.toml, or the sibling's)",
            )
        if name == "score":
            command.add_argument(
                "-n",
                type=int,
                default=1000,
                help="stories, and conversations (default: %(default)s)",
            )
    args = parser.parse_args()
    sibling = getattr(args, "sibling", "")
    args.out = args.out or packaged_model(sibling)
    if "config" in args:
        args.config = args.config or Path(f"configs/{sibling or 'packaged'}.toml")
    args.run_command(args)
