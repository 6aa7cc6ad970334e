"""The engine that serves many texts at once: equal to `generate` alone, over random models, arrivals,
lengths and pools; its pages; and what it refuses."""

import random

import pytest
import torch

from qwen_nb.generation import generate
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.paged import Pages, page_name
from qwen_nb.sampling import Sampling
from qwen_nb.serve import Engine, EngineFull

DENSE = ["Qwen2ForCausalLM", "Qwen3ForCausalLM"]
MIXTURES = ["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"]
HYBRIDS = ["Qwen3_5ForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM"]


def random_model(folder, family, seed):
    test_family = pytest.importorskip("test_family")
    test_family.checkpoint(folder, family, seed)
    return Qwen.from_pretrained(folder, dtype="float32")


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
    engine = Engine(
        model,
        max_rows=rng.choice([1, 3, 8]),
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
    assert len(engine.free_rows) == engine.rows
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


@pytest.mark.parametrize("family", DENSE + MIXTURES + HYBRIDS)
@pytest.mark.parametrize("seed", range(2))
def test_equals_generate_alone(tmp_path, family, seed):
    model = random_model(tmp_path, family, seed)
    for k in range(2):
        schedule(model, f"{family} {seed} {k}")


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE + MIXTURES + HYBRIDS)
def test_equals_generate_on_many_schedules(tmp_path, family):
    for seed in range(20):
        model = random_model(tmp_path / str(seed), family, seed)
        for k in range(5):
            schedule(model, f"{family} {seed} {k}", 40)
