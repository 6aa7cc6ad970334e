#!/usr/bin/env python3
"""The small embedder that ships inside the package (nbs/18a_contrast). These make it again, each
run in two minutes on one idle core. The second half of each begins from the first:

    python tools/make_embedder.py train runs/half-0
    python tools/make_embedder.py train runs/embed-0 --begin runs/half-0
    python tools/make_embedder.py train runs/half-1 --seed 1
    python tools/make_embedder.py train runs/embed-1 --seed 1 --begin runs/half-1
    python tools/make_embedder.py install runs/embed-0 runs/embed-1

With `--false-negatives` those are taken as wrong answers. The first run that `install` is given is
copied into the package; of the others it keeps the log.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import trange

from qwen_nb.contrast import UNSEEN_SEED, answered, contrastive_loss, search, some_tales
from qwen_nb.embed import Embedder, last_token, open_decoder, padded, unit
from qwen_nb.inspect import packaged_model
from qwen_nb.model import positions
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.train import learning_rate, parameter_groups

TASK = "Who is where?"
DIMS = 128, 32  # the loss is the mean over vectors of these lengths
TEMPERATURE = 0.05


def beginning(folder):
    "The model to begin from, as an embedder, and the log of a run that it ended."
    decoder, config = open_decoder(folder, torch.float32)
    lines = []
    if folder != packaged_model():
        lines = list(map(json.loads, (folder / "training_log.jsonl").read_text().splitlines()))[1:]
    return Embedder(decoder.train(), config, Tokenizer.from_pretrained(), TASK), lines


def pooled(embedder, texts):
    """As `embedder.pooled`, faster: with padding on the right a plain causal decoder needs no mask,
    for no real token sees what comes after it."""
    ids, mask = padded([embedder.ids(text) for text in texts], embedder.end)
    return last_token(embedder.decoder(ids, positions(mask, ids.shape[1])), mask)


def loss_of(embedder, tales, false_negatives):
    "The contrastive loss of a batch; with `false_negatives` they are taken as wrong."
    queries = pooled(embedder, [embedder.told(tale.query) for tale in tales])
    stories = pooled(embedder, [tale.text for tale in tales])
    right = None if false_negatives else answered(tales)
    losses = []
    for dims in DIMS:
        cut = unit(queries, dims), unit(stories, dims)
        losses.append(contrastive_loss(*cut, right, TEMPERATURE))
    return sum(losses) / len(losses)


def train(args):
    "One run: weights, and how well it searches every `--every` steps."
    embedder, lines = beginning(args.begin)
    done = lines[-1]["step"] if lines else 0
    decoder, test, losses = embedder.decoder, some_tales(100, UNSEEN_SEED), []
    optimizer = torch.optim.AdamW(parameter_groups(decoder, 0.01), args.lr, betas=(0.9, 0.98))
    for step in trange(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, warmup=20)
        loss = loss_of(
            embedder, some_tales(args.pairs, f"{args.seed}/{step}"), args.false_negatives
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % args.every == 0:
            found = dict(loss=sum(losses) / len(losses), **search(embedder, test))
            about = dict(seed=args.seed, false_negatives=args.false_negatives, step=done + step + 1)
            lines.append(about | {name: round(value, 4) for name, value in found.items()})
            losses = []
            print(lines[-1], flush=True)
    save(args, decoder, lines)


def save(args, decoder, lines):
    "Weights without a prefix, as Qwen3-Embedding's, in bfloat16; and the log."
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: t.bfloat16().contiguous() for name, t in decoder.state_dict().items()}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(packaged_model() / "config.json", args.out)
    shutil.copy(packaged_model() / "tokenizer_config.json", args.out)
    tokenizer = json.loads((packaged_model() / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["post_processor"] = adds_end(Tokenizer.from_pretrained().special["<|endoftext|>"])
    text = json.dumps(tokenizer, ensure_ascii=False, indent=2)
    (args.out / "tokenizer.json").write_text(text, encoding="utf-8")
    prompts = dict(query=f"Instruct: {TASK}\nQuery:", document="")
    about = dict(prompts=prompts, default_prompt_name=None, similarity_fn_name="cosine")
    text = json.dumps(about, indent=2) + "\n"
    (args.out / "config_sentence_transformers.json").write_text(text, encoding="utf-8")
    steps = lines[-1]["step"] if lines else args.steps
    settings = dict(steps=steps, lr=args.lr, pairs=args.pairs, temperature=TEMPERATURE)
    settings |= dict(dims=DIMS, task=TASK)
    log = "".join(json.dumps(line) + "\n" for line in [settings, *lines])
    (args.out / "training_log.jsonl").write_text(log, encoding="utf-8")


def adds_end(end_id):
    "What makes the `tokenizers` library put the end after each text, as Qwen3-Embedding's has it."
    name = "<|endoftext|>"
    text, end = dict(Sequence=dict(id="A", type_id=0)), dict(SpecialToken=dict(id=name, type_id=0))
    other = dict(Sequence=dict(id="B", type_id=0))
    return dict(
        type="TemplateProcessing",
        single=[text, end],
        pair=[text, end, other, end],
        special_tokens={name: dict(id=name, ids=[end_id], tokens=[name])},
    )


def install(args):
    "Copy the first run into the package, with the lines of all."
    first, *others = args.runs
    args.out.mkdir(parents=True, exist_ok=True)
    for file in first.iterdir():
        shutil.copy(file, args.out)
    with open(args.out / "training_log.jsonl", "a", encoding="utf-8") as log:
        for run in others:
            lines = (run / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
            log.writelines(f"{line}\n" for line in lines[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    one = commands.add_parser("train", help="train one")
    one.add_argument("out", type=Path, metavar="FOLDER")
    one.add_argument(
        "--begin",
        type=Path,
        default=packaged_model(),
        help="a run to go on from, for as many steps",
    )
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, default=120)
    one.add_argument("--pairs", type=int, default=16, help="of twins in a batch")
    one.add_argument("--every", type=int, default=40)
    one.add_argument("--lr", type=float, default=1e-3)
    one.add_argument("--false-negatives", action="store_true", help="take them as wrong")
    one.set_defaults(run=train)
    all_runs = commands.add_parser("install", help="copy a finished run into the package")
    all_runs.add_argument("runs", type=Path, nargs="+", metavar="FOLDER")
    all_runs.add_argument("--out", type=Path, default=packaged_model("qwen3_embed"))
    all_runs.set_defaults(run=install)
    args = parser.parse_args()
    args.run(args)
