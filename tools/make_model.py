#!/usr/bin/env python3
"""Make the small pretrained model that ships inside the package.

    python tools/make_model.py --out qwen_nb/pretrained

draws stories from the made-up world (`qwen_nb.world`), trains a byte-level BPE tokenizer on some of them and then a
Qwen3 on the rest, each story used once, and writes the reference's own files. Then

    python tools/make_model.py --out qwen_nb/pretrained --chat --steps 2800 --lr 1.5e-3 --answer-weight 6 --bf16 --log 200

goes on from those weights, half with stories and half with conversations, in which only the assistant's last message counts:
half of them with a thought before the answer. Seeds below HELD_OUT train; `--measure-only` scores a finished folder on
seeds from HELD_OUT on.
"""
import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm.auto import tqdm

from qwen_nb.chat import SMALL_TEMPLATE, encode_chat, quiz
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.tokenizer import Tokenizer as ChatTokenizer
from qwen_nb.world import Chooser, conversation, encode_story, make_tokenizer, measure, story

HELD_OUT = 1_000_000_000  # the first seed that is never trained on
CONFIG = dict(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=32, max_position_embeddings=512, rope_theta=10_000.0, rms_norm_eps=1e-6,
    tie_word_embeddings=True)
# Words a conversation about the world will need, so that they too become single tokens.
EXTRA = [
    "Hello! I am a small Qwen. I know a small world: people, places and things.",
    "Yes. No. I do not know. Please tell me a story. Thank you! Goodbye.",
    "The user asks where the ball is. Max has the ball. Max is in the garden. So the ball is in the garden.",
    "What does Anna have? Who is in the kitchen? Is Tom in the attic? They are there. It is here.",
]


def write_tokenizer(out):
    "Train the tokenizer on the first 2000 stories and write it the way Qwen's repositories do."
    texts = ["\n".join(line.text for line in story(Chooser(random.Random(seed)))) for seed in range(2000)]
    tokenizer = make_tokenizer(texts + EXTRA * 200, CONFIG["vocab_size"])
    tokenizer.save(str(out / "tokenizer.json"))
    special = dict(tokenizer_class="Qwen2Tokenizer", bos_token=None, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                   unk_token=None, model_max_length=CONFIG["max_position_embeddings"], clean_up_tokenization_spaces=False,
                   chat_template=SMALL_TEMPLATE)
    (out / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    return tokenizer


def rows(tokenizer, first_seed, seq_len, answer_weight):
    "Endless rows of seq_len + 1 ids and the weight of each: whole stories one after another, the last one cut off."
    seed = first_seed
    while True:
        ids, weights = [], []
        while len(ids) < seq_len + 1:
            new, answers = encode_story(story(Chooser(random.Random(seed))), tokenizer)
            w = [1.0] * len(new)
            for _, a, b in answers: w[a:b] = [answer_weight] * (b - a)
            ids, weights, seed = ids + new, weights + w, seed + 1
        yield ids[:seq_len + 1], weights[:seq_len + 1]


def chat_row(tokenizer, seed):
    "A conversation up to an assistant's message: its ids, and weight 1 for those that the assistant writes, 0 for the rest."
    choose = Chooser(random.Random(seed))
    *before, last = conversation(choose)
    thinks = choose([True, False])
    if not thinks: last = last | dict(reasoning_content="")
    full = encode_chat(tokenizer, [*before, last], "qwen3", add_generation_prompt=False)
    prompt = encode_chat(tokenizer, before, "qwen3", enable_thinking=thinks)
    assert full[:len(prompt)] == prompt
    end = len(full) - full[::-1].index(tokenizer.special["<|im_end|>"])  # without the line end after it
    return full[:end], [0.0] * len(prompt) + [1.0] * (end - len(prompt))


def chat_batches(tokenizer, first_seed, batch, seq_len):
    "Endless (ids, weights), conversations of about the same length together, padded on the right with weight 0."
    seed = first_seed
    while True:
        pool = [row for row in (chat_row(tokenizer, seed + i) for i in range(16 * batch)) if len(row[0]) <= seq_len]
        seed += 16 * batch
        pool.sort(key=lambda row: len(row[0]))
        groups = [pool[i:i + batch] for i in range(0, len(pool), batch)]
        random.Random(seed).shuffle(groups)
        for rows in groups:
            longest = max(len(ids) for ids, _ in rows)
            yield (torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
                   torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows]))


def weighted_loss(model, ids, weights, bf16):
    "Cross-entropy of each next token, its mean weighted."
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16): logits = model(ids[:, :-1])
    nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    return (nll * w).sum() / w.sum()


def lr_at(step, steps, peak, warmup=200):
    "Warm up, then a cosine to a hundredth of the peak."
    if step < warmup: return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def save(model, out, note):
    "config.json, generation_config.json and model.safetensors, weights in bfloat16, as Qwen ships them; old files replaced at once."
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    end, stop = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    config = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False, attention_dropout=0.0,
                  hidden_act="silu", initializer_range=0.02, rope_scaling=None, sliding_window=None, use_sliding_window=False,
                  max_window_layers=CONFIG["num_hidden_layers"], torch_dtype="bfloat16", use_cache=True,
                  bos_token_id=end, eos_token_id=stop, **CONFIG)
    generation = dict(bos_token_id=end, eos_token_id=[stop, end], pad_token_id=end, do_sample=False)
    weights = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, out / "model.safetensors.tmp", metadata={"format": "pt", "note": note})
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")
    for name, what in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(dict(sorted(what.items())), indent=2) + "\n")


def settings(args):
    "What a rerun needs to know."
    return {k: getattr(args, k) for k in ("chat", "steps", "batch", "seq_len", "lr", "answer_weight", "first_seed", "seed", "bf16")}


def train(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = write_tokenizer(out)
    model = Qwen(QwenConfig(**CONFIG))
    for p in model.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=CONFIG["hidden_size"] ** -0.5)
    if args.chat: model.load_state_dict({k: v.float() for k, v in load_file(out / "model.safetensors").items()})
    matrices = [p for p in model.parameters() if p.dim() > 1]
    scales = [p for p in model.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=scales, weight_decay=0.0)],
                            lr=args.lr, betas=(0.9, 0.95))
    with open(out / "training_log.jsonl", "a" if args.chat else "w") as f: f.write(json.dumps(settings(args)) + "\n")
    first_seed = args.first_seed + args.chat * HELD_OUT // 2  # stories not seen before
    data, start, seen = rows(tokenizer, first_seed, args.seq_len, args.answer_weight), time.time(), 0
    chats = args.chat and chat_batches(ChatTokenizer.from_pretrained(out), first_seed, args.batch, 2 * args.seq_len)
    forward = torch.compile(model) if args.compile else model
    for step in tqdm(range(args.steps), unit="step", disable=None):
        for group in opt.param_groups: group["lr"] = lr_at(step, args.steps, args.lr)
        ids, weights = (torch.tensor(z) for z in zip(*(next(data) for _ in range(args.batch // (1 + args.chat)))))
        loss = weighted_loss(forward, ids, weights, args.bf16)
        seen += ids.numel()
        if args.chat:
            ids, weights = next(chats)
            loss = loss + weighted_loss(forward, ids, weights, args.bf16)
            seen += ids.numel()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if (step + 1) % args.log == 0 or step + 1 == args.steps:
            model.eval()
            scores = measure(model, tokenizer, range(HELD_OUT, HELD_OUT + args.score_stories))
            save(model, out, f"step {step + 1} of {args.steps}")
            with open(out / "training_log.jsonl", "a") as f:
                f.write(json.dumps(dict(step=step + 1, tokens=seen, train=round(loss.item(), 4), **{k: round(v, 4) for k, v in scores.items()})) + "\n")
            print(f"step {step + 1:6d}  {seen / 1e6:6.2f} M tokens  {time.time() - start:6.0f} s  "
                  f"train {loss.item():.3f}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
            model.train()


def score(args):
    "Score the folder's bfloat16 weights, run in float32."
    out = Path(args.out)
    model = Qwen.from_pretrained(out, dtype=torch.float32)
    scores = measure(model, Tokenizer.from_file(str(out / "tokenizer.json")), range(HELD_OUT + 1000, HELD_OUT + 1000 + args.stories))
    print("stories          ", "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    if not any(json.loads(line).get("chat") for line in open(out / "training_log.jsonl")): return
    talks = [conversation(Chooser(random.Random(seed))) for seed in range(3 * HELD_OUT, 3 * HELD_OUT + args.stories)]
    for thinks in (True, False):
        right = quiz(model, ChatTokenizer.from_pretrained(out), talks, thinks)
        print("after a thought  " if thinks else "answering at once", "  ".join(f"{k} {v:.4f}" for k, v in right.items() if k != "asked"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="qwen_nb/pretrained", help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="rows a step (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a row (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--answer-weight", type=float, default=3.0, help="loss weight of an answer's tokens (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="first story (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default: %(default)s)")
    parser.add_argument("--log", type=int, default=500, help="score and save every so many steps (default: %(default)s)")
    parser.add_argument("--score-stories", type=int, default=100, help="unseen stories to score on while training (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    parser.add_argument("--chat", action="store_true", help="go on from the weights in --out, with conversations")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--stories", type=int, default=1000, help="stories, and conversations, to score with --measure-only (default: %(default)s)")
    parser.add_argument("--measure-only", action="store_true", help="score what is in --out and stop")
    args = parser.parse_args()
    score(args) if args.measure_only else train(args)
