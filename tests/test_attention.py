"""Attention: masks, the fast path, the cache slot, padding, gradients, copied heads."""

import itertools
import math
import sys

import pytest
import torch
from torch.nn import functional as F

from qwen_nb.attention import attend, attend_explicit, causal_mask, record_attention, repeat_kv
from qwen_nb.budget import attend_blocks
from qwen_nb.compare import record
from qwen_nb.gqa import Attention
from qwen_nb.heads import copied_heads
from qwen_nb.inspect import load_reference
from qwen_nb.verify import rounding_steps
from qwen_nb.yarn import Rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
HEADS = [(4, 4, 8), (8, 4, 16), (14, 2, 8), (6, 1, 10)]  # query heads, key/value heads, head_dim


def near(ours, theirs, steps=32):
    return rounding_steps(ours, theirs).max() <= steps


def exact(q, k, v, mask):
    "Attention in float64, softmax too."
    n = q.shape[1] // k.shape[1]
    q, k, v = q.double(), repeat_kv(k, n).double(), repeat_kv(v, n).double()
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def draw(heads, kv_heads, head_dim, q_len, k_len, dtype=torch.float32, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, h, n, head_dim, generator=g).to(dtype)
        for h, n in ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    ]


# ---- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k_len", [1, 2, 5, 9])
def test_mask_against_its_definition(k_len):
    for q_len in range(1, k_len + 1):
        for pad in range(k_len):
            real = torch.arange(k_len) >= pad
            want = [
                [j == i or (j < i and bool(real[j])) for j in range(k_len)]
                for i in range(k_len - q_len, k_len)
            ]
            assert causal_mask(q_len, k_len, real[None])[0, 0].tolist() == want
            assert causal_mask(q_len, k_len, real[None].long())[0, 0].tolist() == want


def test_mask_shapes_and_no_empty_row():
    assert causal_mask(3, 7).shape == (1, 1, 3, 7)
    mask = causal_mask(3, 7, torch.zeros(4, 7))
    assert mask.shape == (4, 1, 3, 7) and mask.any(-1).all()


@pytest.mark.parametrize(
    "bad",
    [
        dict(q_len=5, k_len=4),
        dict(q_len=2, k_len=4, is_real=torch.ones(1, 2)),
        dict(q_len=2, k_len=4, is_real=torch.ones(1, 5)),
    ],
)
def test_mask_refuses(bad):
    with pytest.raises(ValueError, match="keys"):
        causal_mask(**bad)


# ---- heads -----------------------------------------------------------------------------------


def test_repeat_is_the_references():
    from transformers.models.qwen3.modeling_qwen3 import repeat_kv as theirs

    x = torch.randn(2, 3, 5, 4)
    for n in (1, 2, 7):
        assert torch.equal(repeat_kv(x, n), theirs(x, n))
    assert not torch.equal(repeat_kv(x, 2), x.repeat(1, 2, 1, 1))


def test_key_heads_must_divide_query_heads():
    with pytest.raises(ValueError, match="8 query heads cannot share 3"):
        Attention(32, 8, 3, 4)


# ---- the fast path ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_fast_equals_exact(heads, dtype):
    for q_len, k_len in ((1, 1), (1, 9), (2, 9), (8, 9), (9, 9), (33, 40)):
        q, k, v = draw(*heads, q_len, k_len, dtype)
        real = torch.ones(2, k_len)
        real[1, : min(3, k_len - 1)] = 0
        for mask in (None, causal_mask(q_len, k_len), causal_mask(q_len, k_len, real)):
            want = exact(q, k, v, causal_mask(q_len, k_len) if mask is None else mask).to(dtype)
            assert attend(q, k, v, mask).shape == q.shape
            assert near(attend(q, k, v, mask), want, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_explicit_equals_exact(dtype):
    q, k, v = draw(8, 4, 16, 9, 9, dtype)
    mix, weights = attend_explicit(q, k, v, causal_mask(9, 9))
    assert mix.dtype == weights.dtype == dtype and weights.shape == (2, 8, 9, 9)
    assert near(
        mix.to(torch.float32 if dtype == torch.float64 else dtype),
        exact(q, k, v, causal_mask(9, 9)).to(torch.float32 if dtype == torch.float64 else dtype),
        16,
    )


def test_a_mask_of_its_own_for_every_head():
    q, k, v = draw(4, 2, 8, 1, 6)
    mask = torch.ones(1, 4, 1, 6, dtype=torch.bool)
    for h in range(4):
        mask[0, h, 0, h] = False
    assert near(attend(q, k, v, mask), exact(q, k, v, mask).float())


def test_no_mask_with_a_cache_is_still_causal():
    q, k, v = draw(4, 2, 8, 3, 9)
    want = exact(q, k, v, causal_mask(3, 9)).float()
    assert near(attend(q, k, v), want)
    built_in = F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), is_causal=True)
    assert not near(built_in, want, 1000)  # the trap: its triangle begins at the first key


def test_more_queries_than_keys():
    with pytest.raises(ValueError, match="5 queries but 3 keys"):
        attend(*draw(4, 2, 8, 5, 3))


@pytest.mark.parametrize(
    "q_len,k_len,masked", [(9, 9, False), (9, 9, True), (3, 9, False), (1, 9, False)]
)
def test_gradients_of_the_fast_path(q_len, k_len, masked):
    ours, theirs = (draw(8, 4, 16, q_len, k_len) for _ in range(2))
    for t in ours + theirs:
        t.requires_grad_()
    mask = causal_mask(q_len, k_len)
    attend(*ours, mask if masked else None).pow(2).sum().backward()
    exact(*theirs, mask).pow(2).sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_unsplit_layouts():
    "Heads that come as a transposed view, as they do in the module."
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(8, 4, 16, 9, 9))
    assert near(attend(q, k, v), exact(q, k, v, causal_mask(9, 9)).float())
    assert near(attend(q[:, :, -1:], k, v), exact(q[:, :, -1:], k, v, causal_mask(1, 9)).float())


# ---- blocks, for training --------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
def test_blocks_equal_exact_and_so_do_their_gradients(heads):
    for seq, size in itertools.product((1, 2, 9, 33), (1, 4, 8, 64)):
        real = torch.ones(2, seq)
        real[1, : min(3, seq - 1)] = 0
        for mask in (None, causal_mask(seq, seq), causal_mask(seq, seq, real)):
            ours, theirs = (draw(*heads, seq, seq, torch.float64) for _ in range(2))
            for t in ours + theirs:
                t.requires_grad_()
            got, want = (
                attend_blocks(*ours, mask, size),
                exact(*theirs, causal_mask(seq, seq) if mask is None else mask),
            )
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
            got.pow(2).sum().backward()
            want.pow(2).sum().backward()
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-12)


def test_blocks_hand_on_what_is_not_theirs(monkeypatch):
    handed = []
    monkeypatch.setattr(
        sys.modules[attend_blocks.__module__],
        "attend",
        lambda *args: handed.append(args) or attend(*args),
    )
    q, k, v = draw(4, 2, 8, 9, 9, torch.float64)
    ahead, own = torch.ones(1, 1, 9, 9, dtype=torch.bool), causal_mask(9, 9).repeat(1, 4, 1, 1)
    own[:, 1, 3, 1] = False
    for mask in (ahead, own):
        torch.testing.assert_close(attend_blocks(q, k, v, mask, 4), exact(q, k, v, mask))
    torch.testing.assert_close(
        attend_blocks(q, k, v, None, 4, longest=8), exact(q, k, v, causal_mask(9, 9))
    )
    torch.testing.assert_close(
        attend_blocks(q[:, :, -3:], k, v), exact(q[:, :, -3:], k, v, causal_mask(3, 9))
    )
    assert len(handed) == 4
    attend_blocks(q, k, v, causal_mask(9, 9), 4)
    assert len(handed) == 4


def test_training_goes_in_blocks_once_they_are_there():
    assert Attention.training_mix is attend_blocks


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_training_goes_in_blocks(monkeypatch, autocast, qk_norm):
    "And is no further from float32 than the kernel, in the gradients too, give or take a half."
    used, x = [], torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        Attention,
        "training_mix",
        staticmethod(lambda *args: used.append(args) or attend_blocks(*args)),
    )
    torch.manual_seed(0)
    layer, rope = Attention(32, 4, 2, 16, qk_norm=qk_norm), Rotary(16)(torch.arange(70)[None])

    def run(layer, autocast=False):
        layer.zero_grad()
        dtype = layer.q_proj.weight.dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x.to(dtype), *(t.to(dtype) for t in rope))
        out.float().pow(2).sum().backward()
        return out.float().detach(), *(p.grad.float() for p in layer.parameters())

    want = run(layer)
    if not autocast:
        layer.bfloat16()
    kernel, blocks = run(layer.eval(), autocast), run(layer.train(), autocast)
    assert len(used) == 2  # in float32 and in bfloat16, but not in eval mode
    for a, b, c in zip(blocks, kernel, want):
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 1e-3 * c.norm()


# ---- the module ------------------------------------------------------------------------------


def ours_like(theirs, layer_idx=0):
    c = theirs.config
    a = Attention(
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        theirs.head_dim,
        theirs.q_proj.bias is not None,
        theirs.o_proj.bias is not None,
        hasattr(theirs, "q_norm"),
        c.rms_norm_eps,
        layer_idx,
    )
    a.load_state_dict(theirs.state_dict(), strict=True)
    return a.to(theirs.q_proj.weight.dtype).eval()


def random_layer(family, heads, kv_heads, head_dim, bias):
    "One attention of the reference with random weights, scales of the norms included."
    import transformers

    name = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    extra = (
        dict(head_dim=head_dim, attention_bias=bias)
        if family == "qwen3"
        else dict(hidden_size=heads * head_dim)
    )
    config = getattr(transformers, f"{name}Config")(
        **{
            **dict(
                hidden_size=48,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                num_hidden_layers=1,
            ),
            **extra,
        }
    )
    config._attn_implementation = "eager"
    module = getattr(
        __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"]),
        f"{name}Attention",
    )
    torch.manual_seed(0)
    layer = module(config, 0).eval()
    for n, p in layer.named_parameters():
        if "norm" in n or "bias" in n:
            torch.nn.init.uniform_(p, 0.3, 2)
    return layer


LAYERS = [
    ("qwen2", 14, 2, 4, True),
    ("qwen2", 4, 4, 8, True),
    ("qwen3", 6, 2, 16, False),
    ("qwen3", 4, 1, 10, True),
    ("qwen3", 3, 3, 16, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@torch.no_grad()
def test_equals_the_references_layer(layer, dtype):
    theirs = random_layer(*layer).to(dtype)
    ours, x = (
        ours_like(theirs),
        torch.randn(
            2, 11, theirs.config.hidden_size, generator=torch.Generator().manual_seed(1)
        ).to(dtype),
    )
    cos, sin = Rotary(theirs.head_dim)(torch.arange(11)[None], dtype)
    minus = torch.zeros(11, 11, dtype=dtype).masked_fill(
        ~causal_mask(11, 11)[0, 0], torch.finfo(dtype).min
    )
    want = theirs(x, position_embeddings=(cos, sin), attention_mask=minus[None, None])[0]
    q, k, v = ours.qkv(x, cos, sin)
    mix = attend_explicit(q, k, v, causal_mask(11, 11))[0]
    assert near(ours.o_proj(mix.transpose(1, 2).flatten(-2)), want, 8)
    one = (
        torch.float32 if dtype == torch.float64 else dtype
    )  # the reference's softmax is float32 even in float64, the kernel's is not
    assert near(ours(x, cos, sin).to(one), want.to(one), 32)


class Cache:
    def __init__(self):
        self.kv = {}

    def update(self, i, k, v):
        if i in self.kv:
            k, v = (torch.cat(pair, 2) for pair in zip(self.kv[i], (k, v)))
        self.kv[i] = k, v
        return k, v


@pytest.mark.parametrize("layer", LAYERS[:3], ids=str)
@torch.no_grad()
def test_cache_in_any_pieces(layer):
    ours = ours_like(random_layer(*layer), layer_idx=5)
    x, (cos, sin) = (
        torch.randn(2, 7, ours.q_proj.in_features),
        Rotary(ours.head_dim)(torch.arange(7)[None]),
    )
    whole = ours(x, cos, sin)
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, 7), n) for n in (0, 1, 2, 6)
    ):
        edges, cache, outs = [0, *cuts, 7], Cache(), []
        for a, b in zip(edges, edges[1:]):
            outs.append(ours(x[:, a:b], cos[:, a:b], sin[:, a:b], cache=cache))
        assert (
            near(torch.cat(outs, 1), whole, 64)
            and list(cache.kv) == [5]
            and cache.kv[5][0].shape[2] == 7
        )


@torch.no_grad()
def test_padding_does_not_leak():
    ours = ours_like(random_layer(*LAYERS[2]))
    x, rotary = torch.randn(1, 5, ours.q_proj.in_features), Rotary(ours.head_dim)
    alone = ours(x, *rotary(torch.arange(5)[None]))
    padded = torch.cat([torch.full((1, 3, x.shape[-1]), 1e4), x], 1)
    real = torch.arange(8)[None] >= 3
    out = ours(padded, *rotary((real.cumsum(-1) - 1).clamp_min(0)), causal_mask(8, 8, real))
    assert out.isfinite().all() and near(out[:, 3:], alone, 64)
    assert not near(ours(padded, *rotary(torch.arange(8)[None]))[:, 3:], alone, 1000)


# ---- the pretrained weights ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_every_stage_of_every_layer(dtype):
    reference, tokenizer = load_reference(dtype=dtype)
    ids = tokenizer(
        "Max has the ball.\nAnna is in the attic.\nWho has the ball? Max.\n", return_tensors="pt"
    ).input_ids
    seen, inner = record(reference, ids), record_attention(reference, ids)
    cos, sin = Rotary(reference.config.head_dim, reference.config.rope_parameters["rope_theta"])(
        torch.arange(ids.shape[1])[None], dtype
    )
    for i, block in enumerate(reference.model.layers):
        ours, x = ours_like(block.self_attn, i), seen[f"model.layers.{i}.input_layernorm"]
        q, k, v = ours.qkv(x, cos, sin)
        mix, weights = attend_explicit(q, k, v, causal_mask(ids.shape[1], ids.shape[1]))
        for name, got in dict(q=q, k=k, v=v, weights=weights, mix=mix).items():
            assert near(got, inner[i][name], 8), (i, name)


def test_the_spy_wants_eager_and_leaves_no_trace():
    from transformers.models.qwen3 import modeling_qwen3

    before = modeling_qwen3.eager_attention_forward
    reference, _ = load_reference(attn_implementation="sdpa")
    with pytest.raises(ValueError, match="eager"):
        record_attention(reference, torch.tensor([[1, 2, 3]]))
    with pytest.raises((AttributeError, TypeError)):
        record_attention(reference, "not ids")
    assert modeling_qwen3.eager_attention_forward is before


# ---- copying heads from one run to another ---------------------------------------------------


@torch.no_grad()
def test_copied_heads():
    model, tokenizer = load_reference()
    told, other = (
        tokenizer(f"{name} has the ball.\nWho has the ball?", return_tensors="pt").input_ids
        for name in ("Max", "Tom")
    )
    before, at = model(told).logits, told.shape[1] - 1
    own, source = record_attention(model, told), record_attention(model, other)
    with copied_heads(model, 1, at, own[1]["mix"]):
        assert near(model(told).logits, before)
    with copied_heads(model, 1, at, source[1]["mix"], which=[]):
        assert torch.equal(model(told).logits, before)

    with copied_heads(model, 1, at, source[1]["mix"], which=[2]):
        changed, inside = model(told).logits, record(model, told)["model.layers.1.self_attn.o_proj"]
    assert torch.equal(changed[:, :at], before[:, :at]) and not near(changed, before, 1000)
    mix = own[1]["mix"].clone()
    mix[:, 2, at] = source[1]["mix"][:, 2, at]
    o_proj = model.model.layers[1].self_attn.o_proj
    assert near(inside, o_proj(mix.transpose(1, 2).flatten(-2)))

    with pytest.raises(RuntimeError, match="mine"), copied_heads(model, 1, at, source[1]["mix"]):
        raise RuntimeError("mine")
    assert torch.equal(model(told).logits, before)


@torch.no_grad()
def test_the_name_travels_in_two_hops():
    "What 06_attention and 06b_heads say of the packaged model."
    model, tokenizer = load_reference()
    start = "Max is in the garden.\nAnna is in the attic.\n"
    end = " has the ball.\nAnna has the key.\nWho has the ball?"
    told, other = (
        tokenizer(start + name + end, return_tensors="pt").input_ids for name in ("Max", "Anna")
    )
    (holder,) = (told != other)[0].nonzero().flatten().tolist()
    reader, ask = holder + 5, told.shape[1] - 1
    weights = torch.stack([t["weights"][0] for t in record_attention(model, told)])
    found = weights[:, :, reader, holder]
    assert divmod(found.argmax().item(), 8) == (0, 4) and 0.85 < found.max() < 0.95
    assert weights[:, :, ask, [0, holder]].sum(-1).max() < 0.25
    assert weights[1, :, ask, reader].min() > 0.95

    source = record_attention(model, other)
    answer = lambda: tokenizer.decode(model(told).logits[0, -1].argmax())
    assert answer() == " Max"
    for layer, at, want in ((0, reader, " Anna"), (1, ask, " Anna"), (0, holder + 3, " Max")):
        with copied_heads(model, layer, at, source[layer]["mix"]):
            assert answer() == want, (layer, at)
