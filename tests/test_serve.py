"""The engine that serves many texts at once: equal to `generate` alone, over random models,
arrivals, lengths and pools; its pages; and what it refuses."""

import random

import pytest
import torch

from qwen_nb.generation import generate
from qwen_nb.inspect import packaged_model
from qwen_nb.mixture import MoEConfig
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.paged import Pages, check_paged, page_name
from qwen_nb.qwen1 import Qwen1Config
from qwen_nb.qwen3_5 import HybridConfig
from qwen_nb.qwen3_next import NextConfig
from qwen_nb.qwen4_exp import StreamConfig
from qwen_nb.sampling import Sampling
from qwen_nb.serve import Engine, EngineFull
from qwen_nb.windows import WindowConfig

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
    begin = rng.choice(beginnings)[: rng.choice([0, 0, 12, 16, rng.randrange(30)])]
    more = rng.choice([0, rng.randint(1, 5), rng.randint(1, 25)]) if begin else rng.randint(1, 5)
    prompt = begin + [rng.randrange(vocab_size) for _ in range(more)]
    new = rng.randint(1, longest - len(prompt))
    stop = tuple(rng.randrange(vocab_size) for _ in range(rng.choice([0, 0, 3])))
    how = dict(stop_ids=stop)
    if rng.random() < 0.4:
        how |= dict(
            repetition_penalty=rng.choice([1.0, 1.3]), presence_penalty=rng.choice([0, 0.5])
        )
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


def schedule(model, seed, requests=24, tight=False):
    "Random requests at random times through a random engine, some cancelled: all as alone."
    rng = random.Random(seed)
    vocab, longest = model.config.vocab_size, 60
    size = rng.choice([1, 3, 4, 16])
    fewest = -(-longest // size)  # pages that the longest request may need
    rows = 8 if tight else rng.choice([1, 4, 8])
    more = 0 if tight else rng.choice([0, fewest // 4, fewest])
    engine = Engine(
        model,
        max_rows=rows,
        num_pages=fewest + more,
        page_size=size,
        prefill_chunk=rng.choice([1, 7, 16, 64]),
    )
    beginnings = [[rng.randrange(vocab) for _ in range(40)] for _ in range(2)]
    todo = [random_request(rng, vocab, beginnings, longest) for _ in range(requests)]
    given, cancelled, steps, preempted = [], set(), 0, 0
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
        preempted += sum(bool(r.ids) for r in engine.waiting)
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
    return preempted


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate_alone(family):
    preempted = schedule(random_model(family, 0), f"{family} tight", 14, tight=True)
    schedule(random_model(family, 1), f"{family} 1", 10)
    assert preempted, "nobody ever had to wait again: the pool is too large to test it"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate_on_many_schedules(family):
    for seed in range(40):
        schedule(random_model(family, seed), f"{family} {seed} more", 30)


@pytest.mark.parametrize(
    "module, name, broken",
    [
        ("paged", "page_name", lambda before, ids: bytes(ids)),  # forgets what stands before
        ("paged", "page_name", lambda before, ids: before + b"."),  # forgets the ids
        ("serve", "choose_each", lambda requests, logits: logits.argmax(-1).tolist()),
    ],
)
def test_the_comparison_can_fail(monkeypatch, module, name, broken):
    "What `schedule` compares sees a broken engine."
    monkeypatch.setattr(f"qwen_nb.{module}.{name}", broken)
    with pytest.raises(AssertionError):
        for seed in range(10):
            schedule(random_model("qwen3", seed), f"qwen3 {seed}", 10)


@pytest.mark.parametrize("sibling", [None, "qwen1", "qwen2", "qwen3_5", "qwen3_moe"])
def test_packaged_models(sibling):
    model = Qwen.from_pretrained(packaged_model(sibling) if sibling else None, dtype="float32")
    rng = random.Random(0)
    engine = Engine(model, max_rows=3, num_pages=20, page_size=8, prefill_chunk=16)
    prompts = [[rng.randrange(400) for _ in range(n)] for n in (3, 30, 12, 41)]
    given = [engine.add(prompt, 12, Sampling()) for prompt in prompts]
    while not engine.idle:
        engine.step()
    for prompt, request in zip(prompts, given):
        assert request.ids == alone(model, prompt, 12, Sampling(), None)


def engine_for_two(**more):
    "A small engine, and its model."
    model = random_model("qwen3", 0)
    return Engine(model, **dict(max_rows=2, num_pages=8, page_size=4) | more), model


def test_a_shared_beginning_is_read_once():
    engine, model = engine_for_two(num_pages=30)
    begin = list(range(20))
    for last in (50, 51, 52):
        request = engine.add([*begin, last], 3, Sampling())
        while not engine.idle:
            engine.step()
        assert request.ids == alone(model, [*begin, last], 3, Sampling(), None)
    counts = engine.counts
    assert counts["pages_shared"] == 2 * 5
    assert counts["tokens_read"] == (21 + 2) + 2 * (1 + 2)
    assert counts["tokens_written"] == 9


def test_the_last_id_is_read_though_its_page_is_there():
    engine, model = engine_for_two(num_pages=30)
    for _ in range(2):
        request = engine.add(list(range(20)), 3, Sampling())  # five full pages
        for _ in range(5):
            engine.step()
        assert request.ids == alone(model, list(range(20)), 3, Sampling(), None)
    assert engine.counts["pages_shared"] == 4


def test_a_state_does_not_read_twice():
    model = random_model("qwen3_5", 1)
    assert "linear_attention" in model.config.layer_types
    engine = Engine(model, prefill_chunk=16, prefill_every=1, num_pages=40)
    prompts = [list(range(18)), list(range(30, 35))]  # 2 ids are left when the second one is read
    given = [engine.add(prompt, 8, Sampling()) for prompt in prompts]
    while not engine.idle:
        engine.step()
    for prompt, request in zip(prompts, given):
        assert request.ids == alone(model, prompt, 8, Sampling(), None)


def test_the_youngest_makes_room_and_is_not_lost():
    engine, model = engine_for_two(num_pages=6)
    old, young = (engine.add([i] * 6, 15, Sampling()) for i in (1, 2))
    waited = False
    while not engine.idle:
        engine.step()
        waited |= bool(young.ids) and young in engine.waiting
        assert old not in engine.waiting
    assert waited, "the pages were enough for both"
    for i, request in ((1, old), (2, young)):
        assert request.ids == alone(model, [i] * 6, 15, Sampling(), None)


def test_cancel_frees_everything_at_once():
    engine, _ = engine_for_two()
    given = [engine.add([1, 2, 3], 9, Sampling()) for _ in range(3)]
    engine.step()
    assert engine.counts["running"] == 2 and engine.counts["waiting"] == 1
    for request in given[::-1]:
        engine.cancel(request)
        assert request.done and request.reason == "cancelled"
    written = [list(request.ids) for request in given]
    assert engine.idle and engine.counts["pages_used"] == 0 and engine.step() == []
    engine.cancel(given[0])
    request = engine.add([1, 2, 3], 1, Sampling())
    assert engine.step() == [request] and request.reason == "length"
    engine.cancel(request)
    assert request.reason == "length" and [r.ids for r in given] == written


def test_a_long_prompt_stops_nobody():
    engine, model = engine_for_two(num_pages=60, prefill_chunk=8)
    first = engine.add([5, 6], 20, Sampling())
    engine.step()
    engine.add(list(range(80)), 2, Sampling())
    before = engine.counts["tokens_read"]
    for _ in range(8):
        got = engine.step()
        assert first in got
        read = engine.counts["tokens_read"] - before
        assert read <= 8 + 1, f"{read} ids in one step"
        before = engine.counts["tokens_read"]


def test_prompts_wait_for_company_but_not_for_long():
    engine, _ = engine_for_two(num_pages=60, prefill_every=3)
    engine.add([5, 6], 30, Sampling())
    engine.step()
    second = engine.add([7, 8, 9], 5, Sampling())
    steps = 0
    while not second.ids:
        engine.step()
        steps += 1
    assert steps <= 3


def test_refusals():
    engine, _ = engine_for_two(max_waiting=2)
    for ids, new, words in (
        ([], 1, "empty"),
        ([1, 97], 1, "97; expected ids from 0 to 96"),
        ([1, 2.0], 1, "expected ids"),
        ([1], 0, "max_new_tokens is 0"),
        ([1] * 30, 4, "the pages hold 32"),
        ([1] * 100, 30, "the pages hold 32"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.add(ids, new, Sampling())
    with pytest.raises(ValueError, match="seed"):
        engine.add([1], 1, Sampling(), seed=2**70)
    engine.add([1] * 30, 3, Sampling())
    engine.add([1], 3, Sampling())
    with pytest.raises(EngineFull, match="2 requests are waiting"):
        engine.add([1], 3, Sampling())
    while not engine.idle:
        engine.step()
    wide, _ = engine_for_two(num_pages=200)
    with pytest.raises(ValueError, match="the model knows 128"):
        wide.add([1] * 100, 30, Sampling())
    with pytest.raises(ValueError, match="StreamCache, which pages do not hold"):
        check_paged(StreamConfig())


def test_qwen1_stays_within_the_length_that_needs_one_base():
    engine = Engine(random_model("qwen1", 0), num_pages=40)
    engine.add([1] * 40, 25, Sampling())
    with pytest.raises(ValueError, match="the model knows 64"):
        engine.add([1] * 40, 26, Sampling())


def test_pages_give_up_the_one_that_was_kept_longest():
    pages = Pages(3)
    taken = [pages.take() for _ in range(3)]
    for page in taken:
        pages.call(page, page_name(b"", [page]))
    pages.call(taken[0], page_name(b"", [taken[1]]))  # the name is taken
    for page in (taken[1], taken[0], taken[2]):
        pages.give_back(page)
    assert pages.left == 3 and not pages.free
    assert pages.share(page_name(b"", [taken[1]])) == taken[1]
    assert pages.take() == taken[0], "the oldest without an owner"
    assert pages.share(page_name(b"", [taken[0]])) is None
    assert pages.take() == taken[2] and pages.left == 0
    with pytest.raises(ValueError, match="all 3 pages"):
        pages.take()
    assert page_name(b"", [1, 2]) != page_name(page_name(b"", [1]), [2])
