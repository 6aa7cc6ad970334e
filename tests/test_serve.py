"""The engine that serves many texts at once: equal to `generate` alone, over random models, arrivals,
lengths and pools; its pages; and what it refuses."""

import random

import pytest
import torch

from qwen_nb.generation import generate
from qwen_nb.inspect import packaged_model
from qwen_nb.mixture import MoEConfig
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.paged import Pages, page_name
from qwen_nb.qwen1 import Qwen1Config
from qwen_nb.qwen2 import WindowConfig
from qwen_nb.qwen3_5 import HybridConfig
from qwen_nb.qwen3_next import NextConfig
from qwen_nb.sampling import Sampling
from qwen_nb.serve import Engine, EngineFull

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=40, max_position_embeddings=128)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16)
DELTA = dict(linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8)
DELTA |= dict(linear_value_head_dim=12)
FAMILIES = {
    "qwen1": (Qwen1Config, dict(head_dim=8, num_attention_heads=4, seq_length=64)),
    "qwen2": (WindowConfig, dict(qk_norm=False, qkv_bias=True)),
    "qwen3": (QwenConfig, dict()),
    "windows": (WindowConfig, dict(windows=[None, 9, 4])),
    "mixture": (MoEConfig, EXPERTS),
    "qwen3_5": (HybridConfig, DELTA),
    "qwen3_next": (NextConfig, EXPERTS | DELTA | dict(shared_expert_intermediate_size=24)),
}


def random_model(family, seed):
    "A tiny model with random weights that look at their input, in float32."
    rng = random.Random(f"{family} {seed}")
    torch.manual_seed(seed)
    kind, more = FAMILIES[family]
    layers = len(more.get("windows", ())) or rng.choice([1, 2, 3])
    kv, head_dim = rng.choice([1, 2]), rng.choice([8, 16])
    sizes = SIZES | dict(num_hidden_layers=layers, num_key_value_heads=kv, head_dim=head_dim)
    sizes |= dict(num_attention_heads=kv * rng.choice([1, 2, 3]))
    if issubclass(kind, HybridConfig):
        kinds = ["linear_attention", "full_attention"]
        more = more | dict(layer_types=[rng.choice(kinds) for _ in range(layers)])
    if family == "qwen1":
        del sizes["num_key_value_heads"]
    model = Qwen(kind(**sizes | more)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.dim() == 1 else p.normal_(0, 0.25)
            if name.endswith("A_log"):
                p.uniform_(-5, 0)  # it remembers
    return model


def alone(model, prompt, new, sampling, seed):
    "What `generate` writes after the prompt when there is nobody else: a list of ids."
    if sampling.temperature:
        filters = dict(top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    else:
        filters = {}
    out = generate(
        model,
        torch.tensor([prompt]),
        new,
        temperature=sampling.temperature,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        stop_ids=list(sampling.stop_ids),
        seed=seed,
        **filters,
    )
    return out[0, len(prompt) :].tolist()


def random_request(rng, vocab_size, beginnings, longest):
    "A prompt, often with a beginning that others have too; how many ids; how; the seed."
    begin = rng.choice(beginnings)[: rng.randrange(30)]
    prompt = begin + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 25))]
    new = rng.randint(1, longest - len(prompt))
    stop = tuple(rng.randrange(vocab_size) for _ in range(rng.choice([0, 0, 3])))
    how = dict(stop_ids=stop)
    if rng.random() < 0.4:
        how |= dict(repetition_penalty=rng.choice([1.0, 1.3]), presence_penalty=rng.choice([0, 0.5]))
    if rng.random() < 0.4:
        how |= dict(temperature=rng.choice([0.5, 1.0]), top_k=rng.choice([0, 5]))
        how |= dict(top_p=rng.choice([1.0, 0.8]), min_p=rng.choice([0.0, 0.05]))
    return prompt, new, Sampling(**how), rng.randrange(10**6)


def near_tie(model, prompt, ours, theirs, sampling):
    "Whether two texts part where rounding may decide, or a draw."
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ours[:at]]))[0, -1]
    gap = (logits[ours[at]] - logits[theirs[at]]).abs() / logits.abs().max()
    return gap < 1e-5 or (sampling.temperature > 0 and gap < 1e-2)


def schedule(model, seed, requests=24):
    "Random requests at random times through a random engine, some cancelled: all as they are alone."
    rng = random.Random(seed)
    vocab, longest = model.config.vocab_size, 60
    size = rng.choice([1, 3, 4, 16])
    fewest = -(-longest // size)  # pages that the longest request may need
    rows = rng.choice([1, 3, 8])
    engine = Engine(
        model,
        max_rows=rows,
        num_pages=fewest + rng.choice([0, fewest // 2, 2 * fewest]),
        page_size=size,
        prefill_chunk=rng.choice([1, 7, 16, 64]),
    )
    beginnings = [[rng.randrange(vocab) for _ in range(40)] for _ in range(2)]
    todo = [random_request(rng, vocab, beginnings, longest) for _ in range(requests)]
    given, cancelled, steps = [], set(), 0
    while todo or not engine.idle:
        for _ in range(rng.choice([0, 0, 1, 4])):
            if todo:
                request = todo.pop()
                given.append((engine.add(*request), request))
        before = {id(r): len(r.ids) for r, _ in given}
        got = engine.step()
        assert len({id(r) for r in got}) == len(got)
        for r, _ in given:
            assert len(r.ids) == before[id(r)] + (r in got)
        if given and rng.random() < 0.05:
            r, _ = rng.choice(given)
            if not r.done:
                cancelled.add(id(r))
            engine.cancel(r)
        owned = sum(len(r.pages) for r in engine.running)
        assert owned == sum(engine.pages.owners)
        steps += 1
        assert steps < 10_000, "it never ends"

    counts = engine.counts
    assert counts["pages_used"] == counts["running"] == counts["waiting"] == 0
    assert len(engine.free_rows) == rows
    for request, (prompt, new, sampling, draw) in given:
        assert request.done
        expected = alone(model, prompt, new, sampling, draw)
        if id(request) in cancelled:
            assert request.reason == "cancelled"
            expected = expected[: len(request.ids)]
        else:
            ended = request.ids[-1] in sampling.stop_ids
            assert request.reason == ("stop" if ended else "length")
        if request.ids != expected:
            assert near_tie(model, prompt, request.ids, expected, sampling), seed
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate_alone(family):
    for seed in range(3):
        schedule(random_model(family, seed), f"{family} {seed}", 12)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate_on_many_schedules(family):
    for seed in range(40):
        schedule(random_model(family, seed), f"{family} {seed} more", 30)
