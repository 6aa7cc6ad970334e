"""Hybrids: the delta rule both ways, the layer in pieces, the mixed cache, and what is refused.
Random configs: test_family.py."""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_nb.attention import causal_mask
from qwen_nb.delta import delta_rule, delta_rule_chunked, l2_norm
from qwen_nb.deltanet import GatedDeltaNet, log_decay
from qwen_nb.generation import generate
from qwen_nb.hybrid import MixedCache, cache_parts, memory_shapes
from qwen_nb.inspect import load_reference, packaged_model
from qwen_nb.loading import family_config
from qwen_nb.model import Qwen
from qwen_nb.qwen3_5 import HybridConfig, layer_kinds
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.writing import pad_left

transformers = pytest.importorskip("transformers")
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs  # noqa: E402

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    max_position_embeddings=128,
    initializer_range=0.2,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MIXED = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]


def save(folder, kind, **more):
    "A random checkpoint of the reference, its vectors shaken; the model."
    torch.manual_seed(0)
    name = {"qwen3_5": "Qwen3_5TextConfig", "next": "Qwen3NextConfig"}[kind]
    model = {"qwen3_5": transformers.Qwen3_5ForCausalLM, "next": transformers.Qwen3NextForCausalLM}[
        kind
    ](getattr(transformers, name)(**SIZES | more)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
            if n.endswith("A_log"):
                p.sub_(4)  # memories long enough to matter
    model.save_pretrained(folder)
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "The same weights in both, the last layer a linear one."
    folder = tmp_path_factory.mktemp("hybrid")
    reference = save(folder, "qwen3_5", layer_types=MIXED)
    return Qwen.from_pretrained(folder, dtype="float32"), reference


def ids(rows=2, seq=40):
    return torch.randint(0, 97, (rows, seq), generator=torch.Generator().manual_seed(1))


def close(a, b, share=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=share * b.abs().max().item())


def write(model, ids, mask=None, new=16, **kw):
    return generate(
        model,
        ids,
        new,
        mask,
        **dict(temperature=None if "num_beams" in kw else 0.0, repetition_penalty=1.0, stop_ids=())
        | kw,
    )


def one_sentence(match, call):
    with pytest.raises(ValueError, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 400


# ---- the rule


def inputs(seed, seq, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(2, 3, seq, *shape, generator=g, dtype=dtype)

    return [
        l2_norm(randn(6)),
        l2_norm(randn(6)),
        randn(5),
        -randn().abs() * 10.0 ** (seed % 5 - 3),
        randn().sigmoid(),
    ]


@pytest.mark.parametrize(
    "seed, seq, size", [(0, 1, 64), (1, 63, 64), (2, 130, 64), (3, 40, 7), (4, 40, 1), (5, 65, 16)]
)
def test_chunks_equal_the_loop(seed, seq, size):
    a, b = ([x.clone().requires_grad_() for x in inputs(seed, seq)] for _ in "ab")
    state = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for ours, loop in zip(delta_rule_chunked(*a, state, size=size), delta_rule(*b, state)):
        close(ours, loop, 1e-12)
        (ours.sin().sum() + loop.sin().sum()).backward(retain_graph=True)
    for x, y in zip(a, b):
        close(x.grad, y.grad, 1e-11)


@pytest.mark.parametrize(
    "name, ours",
    [
        ("torch_recurrent_gated_delta_rule", delta_rule),
        ("torch_chunk_gated_delta_rule", delta_rule_chunked),
    ],
)
def test_rule_equals_the_reference(name, ours):
    for seed, seq in ((1, 150), (3, 64), (4, 5)):
        q, k, v, g, beta = inputs(seed, seq, torch.float32)
        state = torch.randn(2, 3, 6, 5)
        read, end = getattr(theirs, name)(
            *(x.transpose(1, 2) for x in (q * 6**0.5, k, v)),
            g=g.transpose(1, 2),
            beta=beta.transpose(1, 2),
            initial_state=state,
            output_final_state=True,
        )
        mine = ours(q, k, v, g, beta, state)
        close(mine[0], read.transpose(1, 2))
        close(mine[1], end)


def test_chunks_survive_instant_forgetting():
    """Differences of large cumulated decays overflow if they are not masked before exp, and the
    gradients become NaN."""
    q, k, v, _, beta = inputs(0, 64, torch.float32)
    g = torch.full_like(beta, -40.0, requires_grad=True)
    read, state = delta_rule_chunked(q, k, v, g, beta)
    close(read.detach(), delta_rule(q, k, v, g.detach(), beta)[0])
    (read.sum() + state.sum()).backward()
    assert g.grad.isfinite().all()


# ---- the model


def test_every_layer_and_the_logits(pair):
    ours, reference = pair
    with torch.no_grad():
        close(ours(ids()), reference(ids()).logits)


def test_all_layers_linear(tmp_path):
    reference = save(tmp_path, "qwen3_5", layer_types=["linear_attention"] * 4)
    ours = Qwen.from_pretrained(tmp_path, dtype="float32")
    with torch.no_grad():
        close(ours(ids()), reference(ids(), use_cache=False).logits)
    assert torch.equal(write(ours, ids(), use_cache=False), write(ours, ids()))


def test_cache_in_any_pieces(pair):
    ours, _ = pair
    with torch.no_grad():
        whole = ours(ids())
    for lengths in ([1] * 40, [2, 3, 35], [39, 1], [5] * 8):
        cache = MixedCache(ours.config, 2, 40)
        with torch.no_grad():
            close(
                torch.cat([ours(piece, cache=cache) for piece in ids().split(lengths, 1)], 1), whole
            )
        assert cache.length == 40
    one_sentence(
        "room for 40 positions; 40 are filled and 1 more", lambda: ours(ids()[:, :1], cache=cache)
    )


def test_states_do_not_grow(pair):
    ours, _ = pair
    small, large = (MixedCache(ours.config, 1, room, torch.bfloat16) for room in (10, 1000))
    kinds = ours.config.layer_types
    for a, b, kind in zip(small.layers, large.layers, kinds):
        assert (sum(t.nbytes for t in a) == sum(t.nbytes for t in b)) == (
            kind == "linear_attention"
        )
    assert {
        pair[1].dtype for pair, kind in zip(small.layers, kinds) if kind == "linear_attention"
    } == {torch.float32}
    token, once = cache_parts(ours.config)
    assert sum(t.nbytes for pair in large.layers for t in pair) == once + 1000 * token


@pytest.mark.parametrize("pad", [1, 5, 11])
def test_padding_on_the_left(pair, pad):
    """Equal to the reference and to the row alone, in one go and in pieces, some of which are
    padding only."""
    ours, reference = pair
    prompts = [ids()[0, :12].tolist(), ids()[1, : 12 - pad].tolist()]
    batch, mask = pad_left(prompts, pad_id=3)
    with torch.no_grad():
        close(
            ours(batch, mask)[mask.bool()],
            reference(batch, attention_mask=mask).logits[mask.bool()],
        )
        close(ours(batch, mask)[1, pad:], ours(torch.tensor(prompts[1:]))[0])
        unmasked = ours(batch)[1, pad:]
    assert (unmasked - ours(torch.tensor(prompts[1:]))[0]).abs().max() > 1e-2
    expected = reference.generate(batch, attention_mask=mask, max_new_tokens=16)
    for chunk in (None, 1, 3, 5):
        assert torch.equal(write(ours, batch, mask, prefill_chunk=chunk), expected)


def test_padding_anywhere(pair):
    "A hole in the middle, and padding at the end that a later piece goes on from."
    ours, reference = pair
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 6:9] = mask[1, 15:] = 0
    where, cache = torch.arange(20)[None], MixedCache(ours.config, 2, 20)
    with torch.no_grad():
        b = reference(ids(2, 20), attention_mask=mask, position_ids=where).logits
        close(ours(ids(2, 20), mask, where)[mask.bool()], b[mask.bool()])
        pieces = [
            ours(ids(2, 20)[:, a : a + 8], mask[:, : a + 8], where[:, a : a + 8], cache)
            for a in (0, 8, 16)
        ]
        close(torch.cat(pieces, 1)[mask.bool()], b[mask.bool()])


def test_beams(pair):
    ours, reference = pair
    expected = reference.generate(
        ids(1, 9), attention_mask=torch.ones(1, 9, dtype=torch.long), max_new_tokens=12, num_beams=4
    )
    assert torch.equal(write(ours, ids(1, 9), new=12, num_beams=4), expected)


def packed(lengths, rows=1):
    """Documents of these lengths one behind the other, the same in each row: their mask and
    positions. Length below 0: padding."""
    documents = torch.cat([torch.full((abs(n),), i) for i, n in enumerate(lengths)])
    real = torch.cat([torch.full((abs(n),), n > 0) for n in lengths])
    mask = (
        causal_mask(len(real), len(real)) & ((documents[:, None] == documents) & real)[None, None]
    )
    return mask.expand(rows, -1, -1, -1), torch.cat([torch.arange(abs(n)) for n in lengths]).expand(
        rows, -1
    )


@pytest.mark.parametrize(
    "lengths", [(4, 6), (1, 1, 30), (90, 3, 70), (-5, 20, 8), (12, -4, 7, -3), (66, 66)]
)
def test_several_documents_in_a_row(pair, lengths):
    """Logits of each, and the gradient of all, as if each document were alone, by our model and
    by the reference."""
    ours, reference = copy.deepcopy(pair[0]).train(), copy.deepcopy(pair[1]).train()
    (mask, where), n = packed(lengths, 2), sum(map(abs, lengths))
    rows, ends = ids(2, n), [sum(map(abs, lengths[: i + 1])) for i in range(len(lengths))]
    kept = [(end - length, end) for end, length in zip(ends, lengths) if length > 0]
    out = ours.head(ours.model(rows, where, mask))
    theirs = [reference(rows[:, a:b]).logits for a, b in kept]
    for (a, b), t in zip(kept, theirs):
        close(out[:, a:b], t)
    torch.cat([out[:, a:b] for a, b in kept], 1).logsumexp(-1).sum().backward()
    torch.cat(theirs, 1).logsumexp(-1).sum().backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in ours.named_parameters():
        assert (p.grad - grads[name]).norm() <= 1e-4 * grads[name].norm(), name


def test_rows_with_other_documents(pair):
    "Each row of a batch is cut in its own places."
    with torch.no_grad():
        (m1, w1), (m2, w2), (m3, w3) = packed((4, 6)), packed((7, 2, 1)), packed((10,))
        rows = ids(3, 10)
        both = pair[0].model(rows, torch.cat([w1, w2, w3]), torch.cat([m1, m2, m3]))
        for i, (m, w) in enumerate(((m1, w1), (m2, w2), (m3, w3))):
            close(both[i : i + 1], pair[0].model(rows[i : i + 1], w, m))


def test_several_documents_and_a_cache_are_refused(pair):
    mask, where = packed((4, 6))
    one_sentence(
        "several documents",
        lambda: pair[0].model(ids(1, 10), where, mask, MixedCache(pair[0].config, 1, 10)),
    )


def test_training_in_bfloat16(pair):
    "Gradients reach every parameter, and autocast leaves the rule in float32."
    ours = copy.deepcopy(pair[0]).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(ids()).float().logsumexp(-1).mean()
    loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0
        for p in ours.parameters()
    )
    with torch.no_grad():
        assert (loss - pair[0](ids()).logsumexp(-1).mean()).abs() < 0.05


def test_first_values():
    layer = GatedDeltaNet(32, 4, 256, 8, 8)
    layer.first_values(torch.Generator().manual_seed(0))
    fade = -log_decay(torch.zeros(1, 1, 256), layer.A_log, layer.dt_bias)
    assert (
        0.0009 < fade.min() < 0.01
        and 0.5 < fade.max() < 1.7
        and layer.conv1d.weight.abs().max() <= 0.5
    )


# ---- files


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_released_file_with_pictures(tmp_path):
    """Vision tower and multi-token prediction are left out, the text model's settings come from
    text_config; nothing else may be left over."""
    torch.manual_seed(0)
    vision = dict(
        depth=1,
        hidden_size=16,
        intermediate_size=16,
        num_heads=2,
        out_hidden_size=32,
        num_position_embeddings=16,
        patch_size=4,
    )
    text = SIZES | dict(
        rope_parameters=dict(
            rope_type="default",
            rope_theta=1e7,
            partial_rotary_factor=0.5,
            mrope_section=[1, 2, 1],
            mrope_interleaved=True,
        )
    )
    reference = transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    ).eval()
    reference.save_pretrained(tmp_path)
    assert any(
        name.startswith("model.visual.") for name in load_file(tmp_path / "model.safetensors")
    )
    edit(tmp_path, lambda t: t.update({"mtp.fc.weight": torch.zeros(2)}))
    with torch.no_grad():
        close(Qwen.from_pretrained(tmp_path)(ids()), reference(ids()).logits)
    edit(tmp_path, lambda t: t.update({"model.audio.weight": torch.zeros(2)}))
    one_sentence("1 left over.*model.audio.weight", lambda: Qwen.from_pretrained(tmp_path))
    edit(
        tmp_path,
        lambda t: (t.pop("model.audio.weight"), t.update({"model.norm.weight": torch.zeros(32)})),
    )
    one_sentence("model.norm.weight twice.*one text model", lambda: Qwen.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "more",
    [
        dict(num_experts=0),
        dict(num_experts=5, mlp_only_layers=[0, 2]),
        dict(num_experts=4, decoder_sparse_step=3, norm_topk_prob=False),
        dict(num_experts=3, layer_types=MIXED),
    ],
)
def test_qwen3_next(tmp_path, more):
    reference = save(
        tmp_path,
        "next",
        **dict(num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20)
        | more,
    )
    ours = Qwen.from_pretrained(tmp_path, dtype="float32")
    with torch.no_grad():
        close(ours(ids()), reference(ids()).logits)
    assert torch.equal(
        write(ours, ids()),
        reference.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=16),
    )


def test_qwen3_next_of_another_shape(tmp_path):
    save(tmp_path, "next", num_experts=0)
    name = "model.layers.0.linear_attn.in_proj_ba.weight"
    edit(tmp_path, lambda t: t.update({name: t[name][1:].clone()}))
    one_sentence(r"in_proj_ba.weight has shape \(7, 32\)", lambda: Qwen.from_pretrained(tmp_path))


RAW = transformers.Qwen3_5TextConfig(**SIZES).to_dict()


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(layer_types=["linear_attention"] * 3), "layer_types"),
        (dict(layer_types=["sliding_attention"] * 4), "layer_types"),
        (dict(layer_types="linear"), "layer_types"),
        (dict(linear_num_key_heads=3), "linear_num_key_heads"),
        (dict(linear_num_value_heads=0), "linear_num_value_heads"),
        (dict(linear_conv_kernel_dim="4"), "linear_conv_kernel_dim"),
        (
            dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.2)),
            "partial_rotary_factor",
        ),
        (
            dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor="half")),
            "partial_rotary_factor",
        ),
        (
            dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=2)),
            "partial_rotary_factor",
        ),
        (dict(rope_parameters=dict(rope_type="longrope")), "longrope"),
        (dict(rope_parameters=[1]), "rope"),
        (dict(attn_output_gate=False), "attn_output_gate"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(text_config=3), "text_config"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(num_hidden_layers="4", layer_types=None), "num_hidden_layers"),
        (dict(full_attention_interval=0, layer_types=None), "full_attention_interval"),
        (
            dict(model_type="qwen3_next", num_experts=2, num_experts_per_tok=3),
            "num_experts_per_tok",
        ),
        (dict(model_type="qwen3_next", shared_expert_intermediate_size=0), "shared_expert"),
        (dict(model_type="qwen3_next", mlp_only_layers="all"), "mlp_only_layers"),
        (dict(model_type="qwen3_next", decoder_sparse_step=0), "decoder_sparse_step"),
    ],
)
def test_config_refused(changes, match):
    one_sentence(match, lambda: Qwen(family_config(json.loads(json.dumps(RAW)) | changes)))


def test_config_that_says_little():
    """What the reference takes where a file says nothing: one of every four layers is attention, a
    quarter of each head turns."""
    for family, kv in (("qwen3_5_text", 4), ("qwen3_next", 2)):
        c = family_config(
            dict(
                model_type=family,
                vocab_size=97,
                hidden_size=64,
                intermediate_size=32,
                num_hidden_layers=5,
                num_attention_heads=4,
            )
        )
        assert (
            c.layer_types == ["linear_attention"] * 3 + ["full_attention", "linear_attention"]
            and c.turned() == 64
        )
        assert (
            c.num_key_value_heads,
            c.head_dim,
            c.linear_num_value_heads,
            c.tie_word_embeddings,
        ) == (kv, 256, 32, False)
    assert (
        family_config(
            dict(
                model_type="qwen3_5",
                tie_word_embeddings=True,
                text_config=RAW
                | dict(partial_rotary_factor=1.0, rope_parameters=dict(rope_theta=5.0)),
            )
        ).turned()
        == 16
    )


def test_released_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen(HybridConfig()).parameters()) == 752_393_024


def test_the_packaged_sibling():
    "Opens, gives the reference's logits and, through the mixed cache, writes the reference's ids."
    folder = packaged_model("qwen3_5")
    ours, reference = Qwen.from_pretrained(folder, dtype="float32"), load_reference(folder)[0]
    story = torch.tensor(
        [
            Tokenizer.from_pretrained(folder).encode(
                "Max is in the attic.\nAnna is in the attic.\nMax has the ball.\n"
                "Max gave the ball to Anna.\nWho has the ball?"
            )
        ]
    )
    with torch.no_grad():
        close(ours(story), reference(story).logits)
    reference.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    expected = reference.generate(story, attention_mask=torch.ones_like(story), max_new_tokens=40)
    assert ours.config.cache is MixedCache and torch.equal(write(ours, story, new=40), expected)


# ---- holes that reviews found

TOWER = dict(
    depth=1,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    out_hidden_size=32,
    num_position_embeddings=16,
    patch_size=4,
)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("at_top", [True, False])
def test_the_tie_at_the_top_counts(tmp_path, at_top, inside):
    "A nested config names it twice; the class that reads the whole file goes by the top one."
    text = SIZES | dict(tie_word_embeddings=inside)
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=TOWER, tie_word_embeddings=at_top
    )
    reference = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["tie_word_embeddings"] is at_top
    assert saved["text_config"]["tie_word_embeddings"] is inside
    ours = Qwen.from_pretrained(tmp_path, dtype="float32")
    assert ours.config.tie_word_embeddings is at_top
    with torch.no_grad():
        close(ours(ids()), reference(ids()).logits)


def test_a_tie_that_only_one_place_names():
    for at_top, inside, want in ((True, {}, True), (None, dict(tie_word_embeddings=True), True)):
        text = {k: v for k, v in RAW.items() if k != "tie_word_embeddings"} | inside
        raw = dict(model_type="qwen3_5", text_config=text)
        if at_top is not None:
            raw["tie_word_embeddings"] = at_top
        assert family_config(raw).tie_word_embeddings is want


@pytest.mark.parametrize("rule", [delta_rule, delta_rule_chunked])
def test_two_tokens_by_hand(rule):
    "The example of the lesson: 0.15 w1 + w2 = 10, read 11.5."
    k = torch.tensor([[1, 0], [0.6, 0.8]])[None, None]
    v, beta = torch.tensor([[[[10.0], [20.0]]]]), torch.tensor([[[1, 0.5]]])
    read, state = rule(k, k, v, torch.tensor([[[1, 0.5]]]).log(), beta)
    torch.testing.assert_close(read.flatten(), torch.tensor([10, 11.5]))
    torch.testing.assert_close(state.flatten(), torch.tensor([10.1, 6.8]))


def test_shapes_of_the_memory():
    config = HybridConfig()
    assert memory_shapes(config, 7) == dict(
        full_attention=((2, 7, 256), (2, 7, 256)),
        linear_attention=((6144, 3), (16, 128, 128)),
    )
    assert config.conv_channels() == 6144


def test_defaults():
    def of(f):
        parameters = inspect.signature(f).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    assert of(delta_rule) == dict(state=None)
    assert of(delta_rule_chunked) == dict(state=None, size=64)
    assert of(GatedDeltaNet) == dict(kernel=4, eps=1e-6, layer_idx=0)
    assert of(layer_kinds) == dict(every=4)
    assert of(cache_parts) == dict(bytes_per_number=2)
    assert layer_kinds(5) == ["linear_attention"] * 3 + ["full_attention", "linear_attention"]
