"""The fast way against the plain one: the same ids for many models, and where it steps aside."""

import gc
import random
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from qwen_nb import fast as fast_module
from qwen_nb.cache import KVCache, count_rows
from qwen_nb.captured import CAPTURED, CapturedStep, stepper_for
from qwen_nb.fast import PLAIN_WAY, draw, is_shipped, loop_for, why_plain, write_fast
from qwen_nb.fixed import FixedCache, before_attention, open_columns
from qwen_nb.generation import generate, stream
from qwen_nb.indexer import best_blocks
from qwen_nb.inspect import packaged_model
from qwen_nb.lean import LeanStep, after_attention
from qwen_nb.mixture import MoEConfig
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.qwen1 import Qwen1Config
from qwen_nb.qwen3_5 import LAYER_KINDS, HybridConfig
from qwen_nb.qwen3_5_moe import MoEHybridConfig
from qwen_nb.qwen3_next import NextConfig
from qwen_nb.qwen4_exp import StreamConfig
from qwen_nb.sampling import Sampling, choose
from qwen_nb.sparse import closed_blocks
from qwen_nb.streamed import fixed_cache, step_for
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.windows import WindowConfig
from qwen_nb.writing import Context, write

HYBRIDS = {
    "qwen3_5": HybridConfig,
    "qwen3_next": NextConfig,
    "qwen3_5_moe": MoEHybridConfig,
    "qwen4_exp": StreamConfig,
}
KINDS = ["qwen1", "qwen2", "qwen3", "yarn", "linear", "windows", "mixture", "shared", *HYBRIDS]


def hybrid_sizes(kind, rng, sizes):
    "The numbers that a hybrid has beside those of all families."
    heads, kinds = rng.choice([1, 2]), [rng.choice(LAYER_KINDS) for _ in range(rng.randint(1, 4))]
    head_dim = 4 * rng.randint(2, 6)
    more = dict(
        num_hidden_layers=len(kinds),
        layer_types=kinds,  # also attention alone, states alone, and either last
        head_dim=head_dim,
        partial_rotary_factor=rng.choice([1.0, 0.5, 2 / head_dim]),
        linear_num_key_heads=heads,
        linear_num_value_heads=heads * rng.choice([1, 2, 3]),
        linear_key_head_dim=rng.randint(2, 12),
        linear_value_head_dim=rng.randint(2, 12),
        linear_conv_kernel_dim=rng.choice([1, 2, 4]),
        qkv_bias=rng.random() < 0.3,
        o_bias=rng.random() < 0.3,
    )
    if kind != "qwen3_5":
        experts = rng.randint(2, 5)
        more |= dict(num_experts=experts, num_experts_per_tok=rng.randint(1, experts))
        more |= dict(moe_intermediate_size=8, shared_expert_intermediate_size=rng.randint(4, 12))
    if kind == "qwen4_exp":
        more |= stream_sizes(rng, more)
    return sizes | more


def stream_sizes(rng, sizes):
    "And those that a Qwen4-exp has beside a hybrid's."
    kinds = sizes["layer_types"]
    turned = int(sizes["head_dim"] * sizes["partial_rotary_factor"])
    lengths, heads, block = rng.randint(2, 4), rng.choice([1, 2]), rng.choice([1, 2, 4])
    return dict(
        output_gate_type=rng.choice(["sigmoid", "silu"]),
        hc_count=rng.randint(2, 4),
        hc_lowrank=rng.randint(1, 9),
        indexer_n_heads=rng.randint(1, 3),
        indexer_head_dim=turned + 2 * rng.randint(0, 4),
        indexer_compress_ratio=block,
        indexer_budget=block * rng.randint(1, 12),  # reached early, late, or never
        ple_layer_ids=[
            i + 1 for i, kind in enumerate(kinds) if kind == LAYER_KINDS[0] and rng.random() < 0.7
        ],
        ple_embed_dim=(lengths - 1) * heads * rng.randint(2, 8),
        ple_conv_kernel_size=rng.choice([1, 2, 4]),
        ngram_size=lengths,
        heads_per_ngram=heads,
        ngram_vocab_size_base=rng.randint(20, 60),
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=rng.choice([1, 3]),
        eos_token_id=rng.randrange(20),  # ends a text again and again
    )


def random_config(kind, rng):
    "A tiny config of one of KINDS."
    kv_heads = rng.choice([1, 2, 3])
    heads, head_dim = kv_heads * rng.choice([1, 2, 3]), 2 * rng.randint(2, 8)
    sizes = dict(
        vocab_size=rng.randint(30, 90),
        hidden_size=rng.randint(8, 40),
        intermediate_size=rng.randint(8, 60),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rng.choice([1e3, 1e4, 1e6]),
        max_position_embeddings=400,
        tie_word_embeddings=rng.random() < 0.5,
    )
    if kind in HYBRIDS:
        return HYBRIDS[kind](**hybrid_sizes(kind, rng, sizes))
    if kind == "qwen1":
        sizes |= dict(hidden_size=heads * head_dim, num_key_value_heads=heads)
        switches = dict(use_dynamic_ntk=rng.random() < 0.7, use_logn_attn=rng.random() < 0.7)
        return Qwen1Config(**sizes, seq_length=rng.choice([8, 20, 150]), **switches)
    if kind == "qwen2":
        return QwenConfig(**sizes, qkv_bias=True, qk_norm=False)
    if kind == "yarn":
        scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=20)
        return QwenConfig(**sizes, rope_scaling=scaling)
    if kind == "linear":
        scaling = dict(rope_type="linear", factor=2.0)
        return QwenConfig(**sizes, rope_scaling=scaling, o_bias=True, qkv_bias=True)
    if kind == "windows":
        choices = [None, rng.randint(1, 12), rng.randint(1, 30)]
        windows = [rng.choice(choices) for _ in range(sizes["num_hidden_layers"])]
        return WindowConfig(**sizes, windows=windows)
    if kind in ("mixture", "shared"):
        experts = rng.randint(2, 6)
        shared = dict(shared_expert_intermediate_size=rng.randint(4, 20), qk_norm=False)
        return MoEConfig(
            **sizes,
            num_experts=experts,
            num_experts_per_tok=rng.randint(1, experts),
            moe_intermediate_size=rng.randint(4, 30),
            norm_topk_prob=rng.random() < 0.5,
            decoder_sparse_step=rng.choice([1, 2]),
            **(shared if kind == "shared" else {}),
        )
    return QwenConfig(**sizes)


def random_model(kind, seed, dtype=torch.float32):
    rng = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    model = Qwen(random_config(kind, rng)).eval()
    for p in model.parameters():  # norms and biases too: none may be forgotten
        p.data = p.data + torch.randn_like(p) * 0.3
    return model.to(dtype), rng


def random_prompts(model, rng, longest=40):
    "Prompts of one or several rows, with or without padding on the left."
    batch, length = rng.choice([1, 1, 2, 3]), rng.randint(1, longest)
    ids = torch.randint(0, model.config.vocab_size, (batch, length))
    mask = None
    if batch > 1 and rng.random() < 0.7:
        missing = torch.tensor([rng.randint(0, length - 1) for _ in range(batch)])
        mask = (torch.arange(length) >= missing[:, None]).long()
    return ids, mask


def both(model, ids, new, mask=None, **settings):
    "What the plain way and the fast way write."
    plain = generate(model, ids, new, mask, fast=False, **settings)
    return plain, generate(model, ids, new, mask, fast=True, **settings)


def same_in_float32(kind, seed):
    model, rng = random_model(kind, seed)
    ids, mask = random_prompts(model, rng)
    stops = [rng.randrange(model.config.vocab_size) for _ in range(rng.choice([0, 0, 3]))]
    chunk = rng.choice([None, None, 3, 7]) if kind != "qwen1" else None
    new = rng.choice([1, 2, 30, 150])
    sampled = dict(temperature=0.9, top_p=0.9, top_k=20, seed=seed, repetition_penalty=1.3)
    settings = [dict(), dict(presence_penalty=0.5), sampled][seed % 3]
    plain, fast = both(model, ids, new, mask, stop_ids=stops, prefill_chunk=chunk, **settings)
    assert torch.equal(plain, fast), f"{kind}, seed {seed}: {plain.tolist()}, {fast.tolist()}"


@pytest.mark.parametrize("kind", KINDS)
def test_same_ids_as_the_plain_way(kind):
    for seed in range(20):
        same_in_float32(kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_same_ids_as_the_plain_way_for_many_more(kind):
    for seed in range(20, 65):
        same_in_float32(kind, seed)


@torch.no_grad()
def nearly_best(model, ids, mask, prompt, share):
    """Whether each written token is the plain model's likeliest, or as good as that: in bfloat16
    two ways of adding differ by rounding, and a tie may fall either way."""
    context = Context(model, len(ids), ids.shape[1], mask)
    logits = context.read(ids[:, :prompt])
    for i in range(prompt, ids.shape[1]):
        missing = logits.amax(-1) - logits.gather(-1, ids[:, i : i + 1])[:, 0]
        if (missing > share * logits.abs().amax(-1)).any():
            return False
        logits = context.read(ids[:, i : i + 1])
    return True


@pytest.mark.parametrize("small", [True, False])  # a copy in float32, or bfloat16 as it is
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_differs_in_ties_alone(kind, small, monkeypatch):
    if not small:
        monkeypatch.setattr("qwen_nb.lean.FUSE_BELOW", 0)
    for seed in range(5):
        model, rng = random_model(kind, seed, torch.bfloat16)
        ids, mask = random_prompts(model, rng)
        fast = generate(model, ids, 30, mask, stop_ids=(), fast=True)
        if hasattr(model.config, "num_experts"):  # a tie between experts changes a lot
            assert fast.shape == (len(ids), ids.shape[1] + 30)
            continue
        assert nearly_best(model, fast, mask, ids.shape[1], 0.05), f"{kind}, seed {seed}"
        worst = fast.clone()
        worst[:, ids.shape[1]] = model(ids, mask)[:, -1].argmin(-1)
        assert not nearly_best(model, worst, mask, ids.shape[1], 0.05), "the worst token is seen"


@pytest.mark.parametrize("name", [None, "qwen1", "qwen2", "qwen3_moe", "qwen4_exp"])
def test_packaged_models(name):
    folder = packaged_model(name) if name else packaged_model()
    model = Qwen.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("Anna is in the garden.\n")])
    state = {key: t.clone() for key, t in model.state_dict().items()}
    for settings in (dict(temperature=0.0), dict(temperature=0.9, seed=1)):
        plain, fast = both(model, ids, 100, stop_ids=(), **settings)
        assert torch.equal(plain, fast)
    stopped = both(model, ids, 100, stop=["garden", "."], tokenizer=tokenizer)
    assert torch.equal(*stopped)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_stream_and_generate_take_it(monkeypatch):
    model, _ = random_model("qwen3", 0)
    ids = torch.tensor([[1, 2, 3]])
    made = []
    kept = LeanStep.__init__
    monkeypatch.setattr(LeanStep, "__init__", lambda self, *a: made.append(1) or kept(self, *a))
    generate(model, ids, 5, stop_ids=())
    written = list(stream(model, ids, 5, stop_ids=()))
    assert len(made) == 2, f"{len(made)} lean steps were made, expected one a text"
    generate(model, ids, 5, stop_ids=(), fast=False)
    assert len(made) == 2, "fast=False took the fast way"
    assert written == list(stream(model, ids, 5, stop_ids=(), fast=False))


def test_the_logits_are_the_same():
    model, rng = random_model("qwen3", 3)
    ids = torch.randint(0, 30, (1, 100))
    cache, plain = FixedCache(model.config, 1, 300), KVCache(model.config, 1, 300)
    with torch.inference_mode():
        first = model(ids, cache=cache, last_only=True)[:, -1]
        model(ids, cache=plain, last_only=True)
        step, new = LeanStep(model, cache), first.argmax(-1)
        for _ in range(80):  # past the end of what was ready at first
            theirs = model(new[:, None], cache=plain, last_only=True)[:, -1]
            ours = step(new)
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
            new = ours.argmax(-1)


def test_what_was_never_written_does_no_harm():
    model, _ = random_model("qwen3", 1)
    ids = torch.tensor([[1, 2, 3]])

    class Dirty(FixedCache):  # memory as it may be found
        def __init__(self, *args):
            super().__init__(*args)
            self.kv.fill_(torch.nan)

    with torch.inference_mode():
        cache = Dirty(model.config, 1, 300)
        model(ids, cache=cache)
        step = LeanStep(model, cache)
        for _ in range(200):
            assert not step(torch.tensor([1])).isnan().any()


def test_a_window_closes_behind():
    model, _ = random_model("qwen3", 1)
    cache = FixedCache(model.config, 1, 20)
    cache.length = 5
    mask = open_columns(cache, window=3)[0, 0, 3:]
    assert (mask == 0).nonzero()[:, 0].tolist() == [2, 3, 4]  # the step closes one and opens one


@pytest.mark.parametrize("look", [1, 4, 16, 1000])
def test_the_host_may_look_later(look):
    for seed in range(6):
        model, rng = random_model("qwen3", seed)
        ids, mask = random_prompts(model, rng)
        sampling = Sampling(stop_ids=tuple(range(0, 30, 4)), temperature=seed % 2, pad_id=7)
        plain = list(write(model, ids, 40, sampling, mask, seed=5))
        later = list(write_fast(model, ids, 40, sampling, mask, seed=5, look=look))
        assert torch.equal(torch.stack(plain), torch.stack(later))


def spoilt(model, layer=-1):
    "NaN in the head of one token: its logit is NaN from the first step on."
    model.model.norm.weight.data[0] = torch.nan
    return model


def test_nan_is_the_same_error():
    model, _ = random_model("qwen3", 0)
    ids = torch.tensor([[1, 2, 3]])
    words = []
    for way in (False, True):
        with pytest.raises(ValueError, match="gave NaN in torch.float32") as error:
            generate(spoilt(model), ids, 5, fast=way)
        words.append(str(error.value))
    assert words[0] == words[1]


@pytest.mark.parametrize("look", [1, 4])
def test_nan_while_writing(look, monkeypatch):
    model, _ = random_model("qwen3", 0)
    kept = LeanStep.step

    def third(self, ids):
        logits = kept(self, ids)
        if self.cache.length == 6:
            logits[0, 3] = torch.nan
        return logits

    monkeypatch.setattr(LeanStep, "step", third)
    ids, written = torch.tensor([[1, 2, 3]]), []
    with pytest.raises(ValueError, match="float16 is too narrow"):
        for new in write_fast(model, ids, 20, Sampling(), look=look):
            written.append(new)
    assert len(written) == 3, f"{len(written)} tokens came before the error, expected 3"


def test_the_same_errors():
    model, _ = random_model("qwen3", 0)
    ids = torch.tensor([[1, 2, 3]])
    wrong = [
        (dict(max_new_tokens=1000), "knows 400 positions"),
        (dict(max_new_tokens=5, top_k=3), "temperature is 0"),
        (dict(max_new_tokens=5, temperature=1.0, seed=2**70), "64 bits"),
        (dict(max_new_tokens=5, stop="a"), "decode"),
    ]
    for settings, words in wrong:
        for way in (None, True, False):
            with pytest.raises(ValueError, match=words):
                generate(model, ids, fast=way, **settings)
    with pytest.raises(ValueError, match="input_ids go from"):
        generate(model, torch.tensor([[10_000]]), 5, fast=True)
    with pytest.raises(ValueError, match="fast is 'quick'; expected"):
        generate(model, ids, 5, fast="quick")
    for settings in (dict(use_cache=False), dict(num_beams=2)):
        with pytest.raises(ValueError, match="cannot be taken: it needs a cache"):
            generate(model, ids, 5, fast=True, **settings)
        generate(model, ids, 5, **settings)


@contextmanager
def own_method(model):
    attention = model.model.layers[0].self_attn
    attention.forward = lambda *args: type(attention).forward(attention, *args)
    yield
    del attention.forward


@contextmanager
def own_class(model):
    class Louder(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mlp.down_proj.__class__ = Louder
    yield
    model.model.layers[0].mlp.down_proj.__class__ = nn.Linear


@contextmanager
def training(model):
    model.train()
    yield
    model.eval()


@contextmanager
def one_norm_in_double(model):
    norm = model.model.norm
    norm.weight.data = norm.weight.data.double()
    yield
    norm.weight.data = norm.weight.data.float()


@contextmanager
def hook_on_all(model):
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    yield
    handle.remove()


ASIDE = {
    "has a method of its own": own_method,
    "is a Louder": own_class,
    "training mode": training,
    "hooks watch layers": None,
    "hooks watch all": hook_on_all,
    "differ in dtype": one_norm_in_double,
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("words", ASIDE)
def test_it_steps_aside(words):
    model, _ = random_model("qwen3", 0)
    around = ASIDE[words] or (lambda model: count_rows(model))
    assert why_plain(model) is None
    with around(model):
        why = why_plain(model)
        expected = "hooks watch" if ASIDE[words] is None else words
        assert why and expected in why, f"{why!r}, expected {expected!r}"
        assert loop_for(model) is write
        with pytest.raises(ValueError, match="the fast way cannot be taken: .*leave out fast"):
            loop_for(model, True)
    assert why_plain(model) is None, "it is sure again afterwards"


@pytest.mark.parametrize("path", PLAIN_WAY)
def test_a_function_in_anothers_place_is_seen(path, monkeypatch):
    assert is_shipped(path), f"{path} is the package's own"
    module, *names = path.split(".")
    holder = __import__(f"qwen_nb.{module}", fromlist=["x"])
    for name in names[:-1]:
        holder = getattr(holder, name)
    kept = getattr(holder, names[-1])
    monkeypatch.setattr(holder, names[-1], lambda *args, **kw: kept(*args, **kw))
    model, _ = random_model("qwen3", 0)
    assert path in why_plain(model)
    assert loop_for(model) is write


def test_a_piece_in_use_is_seen():
    from qwen_nb.mine import all_pieces
    from qwen_nb.pieces import put_in, take_out

    model, _ = random_model("qwen3", 0)
    piece = all_pieces()["rotate_half"]
    put_in(piece, lambda x: torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1))
    try:
        assert "pieces of your own" in why_plain(model)
    finally:
        take_out(piece)
    assert why_plain(model) is None


def test_a_table_in_another_dtype_steps_aside():
    "As a large one is, which stays in its file."
    model = Qwen.from_pretrained(packaged_model("qwen4_exp"), dtype=torch.float32)
    assert why_plain(model) is None
    table = model.model.layers[1].ple.ple_embedding.ngram_embedding
    table.bfloat16()
    assert "differ in dtype" in why_plain(model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(generate(model, ids, 5), generate(model, ids, 5, fast=False))


def test_an_int8_cache_steps_aside():
    config = random_config("qwen1", random.Random(0))
    config.use_cache_quantization = True
    assert "its cache is a Int8Cache" in why_plain(Qwen(config).eval())


def test_nothing_is_kept():
    model, _ = random_model("qwen3", 0)
    before = {id(module): set(vars(module)) for module in model.modules()}
    generate(model, torch.tensor([[1, 2, 3]]), 20, stop_ids=(), fast=True)
    gc.collect()
    left = [o for o in gc.get_objects() if type(o) in (FixedCache, LeanStep)]
    assert not left, f"{len(left)} caches or steps are left"
    assert before == {id(module): set(vars(module)) for module in model.modules()}


def test_the_ids_can_be_used_in_training():
    model, _ = random_model("qwen3", 0)
    ids = generate(model, torch.tensor([[1, 2, 3]]), 5, stop_ids=(), fast=True)
    ids[0, 0] = 4
    loss = model(ids).square().mean()
    loss.backward()
    assert not ids.is_inference() and not torch.is_inference_mode_enabled()


def test_weights_that_changed_are_seen():
    model, _ = random_model("qwen3", 0)
    ids = torch.tensor([[1, 2, 3]])
    first = generate(model, ids, 20, stop_ids=(), fast=True)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1)
    plain, fast = both(model, ids, 20, stop_ids=())
    assert torch.equal(plain, fast) and not torch.equal(first, fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_threads(dtype):
    model, _ = random_model("qwen3", 0, dtype)
    prompts = [torch.tensor([[i, 2, 3]]) for i in range(6)]
    alone = [generate(model, p, 40, stop_ids=(), fast=True) for p in prompts]
    found = {}

    def one(i):
        found[i] = generate(model, prompts[i], 40, stop_ids=(), fast=True)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(6))


def test_large_layers_are_not_copied(monkeypatch):
    model, _ = random_model("qwen3", 0)
    cache = FixedCache(model.config, 1, 10)
    monkeypatch.setattr("qwen_nb.lean.FUSE_BELOW", 0)
    step = LeanStep(model, cache)
    own = {p.data_ptr() for p in model.parameters()}
    for w in step.layers:
        (gate_up, _), down = w.mlp
        for weight in (*w.qkv[0], *gate_up, w.out, down):
            assert weight.data_ptr() in own, "a weight was copied"
    same_in_float32("qwen2", 0)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_large_hybrids_are_not_copied(kind, monkeypatch):
    monkeypatch.setattr("qwen_nb.lean.FUSE_BELOW", 0)
    for seed in range(8):
        same_in_float32(kind, seed)
    model, _ = random_model(kind, 0)
    cache = fixed_cache(model, 1, 10, torch.float32, "cpu")
    model(torch.tensor([[1, 2]]), cache=cache)
    step = step_for(model)(model, cache)
    for w in step.layers:
        assert getattr(w, "columns", None) is None, "a matrix was copied"
    own = {p.data_ptr() for p in model.parameters()}
    for ngrams, *mixers in getattr(step, "around", ()):
        assert ngrams is None or ngrams.table is None, "a table was copied"
        weights = [weight for w in mixers for weight in (*w.first[0], w.up)]
        assert all(weight.data_ptr() in own for weight in weights), "a mixer was copied"


@pytest.mark.parametrize("kind", HYBRIDS)
def test_states_stay_where_they_are(kind):
    for seed in range(4):
        model, _ = random_model(kind, seed)
        cache = fixed_cache(model, 2, 80, torch.float32, "cpu")
        places = [t.data_ptr() for pair in cache.states.values() for t in pair]
        plain, ids = model.config.cache(model.config, 2, 80), torch.randint(0, 30, (2, 10))
        with torch.inference_mode():
            for part in ids.split(6, 1):  # the prompt in two pieces
                ours, theirs = (model(part, cache=c, last_only=True)[:, -1] for c in (cache, plain))
                assert torch.equal(ours, theirs) and cache.length == plain.length
            step = step_for(model)(model, cache)
            for _ in range(60):
                step(torch.tensor([1, 2]))
        assert places == [t.data_ptr() for pair in cache.states.values() for t in pair]
        assert cache.length == 70
        for i, (recent, state) in cache.states.items():
            assert recent.abs().sum() > 0 or not recent.numel(), f"layer {i} keeps no inputs"
            assert state.abs().sum() > 0, f"layer {i} has an empty state"


def test_of_equal_blocks_those_of_the_plain_indexer_are_chosen():
    "Many scores are 0: which of them is chosen is `topk`'s own affair, asked the same way."
    torch.manual_seed(0)
    for k in (1, 3, 8):
        scores = torch.randn(4, 1, 12).relu()
        numbers = [2, 7, 9, 12]  # of complete blocks, a row
        complete = torch.arange(12) < torch.tensor(numbers)[:, None, None]
        want = best_blocks(scores, complete, k) | ~complete
        alone = [([row], n) for row, n in enumerate(numbers)]
        assert torch.equal(closed_blocks(scores[:, 0], alone, k) == 0, want[:, 0])
        every = [(slice(None), 12)]
        want = best_blocks(scores, torch.ones_like(complete), k)
        assert torch.equal(closed_blocks(scores[:, 0], every, k) == 0, want[:, 0])


def test_the_model_reads_on_where_lean_steps_ended():
    "What they keep beside keys and values is what the model would have kept."
    for seed in range(12):
        model, _ = random_model("qwen4_exp", seed)
        ids = torch.randint(0, 30, (2, 100))
        cache = fixed_cache(model, 2, 100, torch.float32, "cpu")
        with torch.inference_mode():
            model(ids[:, :10], cache=cache)
            step = step_for(model)(model, cache)
            for new in ids[:, 10:80].T:
                step(new)
            found, wanted = model(ids[:, 80:], cache=cache), model(ids)[:, 80:]
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max(), f"seed {seed}"


def test_streams_are_neither_compiled_nor_captured():
    model, _ = random_model("qwen4_exp", 0)
    with pytest.raises(ValueError, match="does not know the layers of this family"):
        generate(model, torch.tensor([[1]]), 3, fast="compile")
    step = step_for(model)
    assert step_for(random_model("qwen3_5", 0)[0]).same_shapes and not step.same_shapes
    assert issubclass(CAPTURED[step], step)


@pytest.mark.parametrize("last", LAYER_KINDS)
def test_the_length_is_counted_whatever_comes_last(last):
    "Also where no layer looks back: padding in a prompt read in pieces asks for the length."
    rng = random.Random(0)
    config = random_config("qwen3_5", rng)
    kinds = ["linear_attention"] * config.num_hidden_layers
    kinds[-1] = last
    model = Qwen(replace(config, layer_types=kinds)).eval()
    ids, mask = torch.randint(0, 30, (2, 9)), torch.ones(2, 9).long()
    mask[0, :4] = 0
    plain, fast = both(model, ids, 9, mask, stop_ids=(), prefill_chunk=4)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_5"])
def test_a_small_model_in_bfloat16_is_computed_in_float32(kind, monkeypatch):
    model, _ = random_model(kind, 0, torch.bfloat16)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def step():
        cache = fixed_cache(model, 1, 10, torch.bfloat16, "cpu")
        return step_for(model)(model, cache)

    with torch.inference_mode():
        small = step()
        again = step_for(model)(model, small.cache)
        assert not again(torch.tensor([1])).isnan().any(), "a second step on the same cache"
        assert small.model.dtype == small.cache.kv.dtype == torch.float32 and not small.one_row
        monkeypatch.setattr("qwen_nb.lean.FUSE_BELOW", 2 * sum(t.nbytes for t in before.values()))
        large = step()
    assert large.model is model and large.cache.kv.dtype == torch.bfloat16 and large.one_row
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.dtype == torch.bfloat16


def test_prompts_are_read_with_wide_products(monkeypatch):
    entered = []

    @contextmanager
    def wide_products():
        entered.append(1)
        yield

    monkeypatch.setattr(fast_module, "wide_products", wide_products)
    monkeypatch.setattr(fast_module, "bfloat16_pays", lambda: False)
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1)):
        model, _ = random_model("qwen3", 0, dtype)
        generate(model, torch.tensor([[1, 2]]), 3, stop_ids=(), fast=True)
        assert len(entered) == count
    monkeypatch.setattr(fast_module, "bfloat16_pays", lambda: True)
    generate(model, torch.tensor([[1, 2]]), 3, stop_ids=(), fast=True)
    assert len(entered) == 1, "where bfloat16 is fast, nothing needs to look at each function"


def test_draws_are_those_of_multinomial():
    sampling, logits = Sampling(temperature=0.7, top_k=9), torch.randn(4, 50)
    for seed in range(50):
        g, h = (torch.Generator().manual_seed(seed) for _ in "gh")
        assert torch.equal(draw(sampling, logits, g), choose(sampling, logits, h))
        assert torch.equal(g.get_state(), h.get_state())


@pytest.mark.parametrize("kind", KINDS)
def test_the_captured_step(kind):
    "On a CPU its function runs uncaptured: the same places, the same ids."
    for seed in range(3):
        model, rng = random_model(kind, seed)
        ids, mask = random_prompts(model, rng)
        settings = Sampling(temperature=seed / 2, repetition_penalty=1.2)
        for look in (1, 8):
            plain = list(write(model, ids, 30, settings, mask, seed=3))
            step = CAPTURED[step_for(model)]
            ours = list(write_fast(model, ids, 30, settings, mask, 3, look=look, stepper=step))
            assert torch.equal(torch.stack(plain), torch.stack(ours))


def test_a_graph_is_captured_when_it_should_be(monkeypatch):
    "With a stand-in for the graph: after the first step, and again when more is made ready."
    captures, replays = [], []

    class Graph:
        def __init__(self, run, generator):
            captures.append(len(replays))
            self.run = run

        def replay(self):
            replays.append(1)
            self.run()

    class OnGPU(CapturedStep):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            self.captures = True

    monkeypatch.setattr("qwen_nb.captured.captured", Graph)
    model, _ = random_model("qwen3", 0)
    ids = torch.tensor([[1, 2, 3]])
    monkeypatch.setattr("qwen_nb.captured.BETWEEN", 64)
    plain = list(write(model, ids, 200, Sampling()))
    ours = list(write_fast(model, ids, 200, Sampling(), stepper=OnGPU))
    assert torch.equal(torch.stack(plain), torch.stack(ours))
    assert captures == [0, 60, 124, 188], captures  # 3 of the prompt, 1 before the first
    assert len(replays) == 198


@pytest.mark.slow
def test_compiled_layers(capfd):
    from torch._dynamo.testing import CompileCounter

    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    for kind in ("qwen3", "mixture"):
        model, _ = random_model(kind, 2)
        assert len(model.model.layers) > 1
        ids = torch.tensor([[1, 2, 3]])
        plain = generate(model, ids, 140, stop_ids=(), fast=False)
        assert torch.equal(plain, generate(model, ids, 140, stop_ids=(), fast="compile"))
    assert "compiled" in capfd.readouterr().err
    counter = CompileCounter()
    torch._dynamo.reset()
    how = dict(backend=counter, fullgraph=True, dynamic=False)
    halves = [torch.compile(half, **how) for half in (before_attention, after_attention)]
    model, _ = random_model("qwen3", 2)
    list(write_fast(model, ids, 140, Sampling(), stepper=partial(LeanStep, halves=halves)))
    assert counter.frame_count == 2, "each half is compiled once for all layers and lengths"


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model, _ = random_model("qwen3", 0)
    with pytest.raises(ValueError, match="needs a C.. compiler"):
        generate(model, torch.tensor([[1]]), 3, fast="compile")


def test_compiling_is_said_once(capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)  # as if there were a compiler
    model = Qwen.from_pretrained()
    monkeypatch.setattr("qwen_nb.captured.COMPILED", set())
    for _ in range(2):
        stepper_for(model, compiled=True)
    assert capsys.readouterr().err.count("takes a while") == 1
