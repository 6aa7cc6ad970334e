"""Every family against transformers on random configs: a small random checkpoint saved by
transformers, opened by us."""

import random

import pytest
import torch

from qwen_nb.generation import generate
from qwen_nb.model import Qwen

transformers = pytest.importorskip("transformers")


# ---- random settings; what is drawn is small, and odd rather than usual


def sizes(rng):
    "What every family has."
    kv = rng.choice([1, 2, 3, 4])
    return dict(
        vocab_size=rng.choice([97, 256]),
        num_hidden_layers=rng.choice([1, 2, 3, 4]),
        num_key_value_heads=kv,
        num_attention_heads=kv * rng.choice([1, 2, 3]),
        intermediate_size=rng.choice([24, 56, 96]),
        hidden_act="silu",
        tie_word_embeddings=rng.random() < 0.5,
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-3]),
        max_position_embeddings=rng.choice([64, 128]),
        rope_parameters=rope(rng),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def rope(rng):
    theta = dict(rope_theta=rng.choice([100.0, 1e4, 1e6]))
    kind = rng.choice(["default", "default", "linear", "yarn"])
    if kind == "default":
        return theta | dict(rope_type=kind)
    scaling = theta | dict(rope_type=kind, factor=rng.choice([1.5, 2.0, 4.0]))
    if kind == "linear":
        return scaling
    may = dict(
        beta_fast=rng.choice([16, 32]),
        beta_slow=rng.choice([1, 2]),
        attention_factor=rng.choice([0.9, 1.2]),
        truncate=False,
    )
    return (
        scaling
        | dict(original_max_position_embeddings=rng.choice([16, 32]))
        | {k: v for k, v in may.items() if rng.random() < 0.3}
    )


def windows(rng, layers):
    "None of the released models uses these."
    if rng.random() < 0.5:
        return {}
    w = dict(
        use_sliding_window=True,
        sliding_window=rng.choice([1, 2, 7, 16, 100]),
        max_window_layers=rng.randint(0, layers),
    )
    if rng.random() < 0.5:
        w["layer_types"] = [
            rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)
        ]
    return w


def qwen2(rng):
    size = sizes(rng)
    size["hidden_size"] = size["num_attention_heads"] * rng.choice([4, 8, 16])
    if rng.random() < 0.2:
        size["head_dim"] = rng.choice([6, 32])  # not a setting of Qwen2Config, and yet it counts
    return transformers.Qwen2Config(**size, **windows(rng, size["num_hidden_layers"]))


def qwen3(rng):
    size = sizes(rng) | dict(
        hidden_size=rng.choice([20, 48, 64]),
        head_dim=rng.choice([4, 8, 16, 32]),
        attention_bias=rng.random() < 0.5,
    )
    return transformers.Qwen3Config(**size, **windows(rng, size["num_hidden_layers"]))


def experts(rng, size):
    "What the two mixtures share."
    n, layers = rng.choice([2, 3, 5, 8]), size["num_hidden_layers"]
    return dict(
        num_experts=n,
        num_experts_per_tok=rng.randint(1, n),
        moe_intermediate_size=rng.choice([12, 24, 40]),
        norm_topk_prob=rng.random() < 0.5,
        decoder_sparse_step=rng.choice([1, 1, 2, 3]),
        mlp_only_layers=sorted(
            rng.sample(range(layers), rng.randint(0, layers - 1) if rng.random() < 0.3 else 0)
        ),
    )


def qwen2_moe(rng):
    size = sizes(rng)
    size |= experts(rng, size) | dict(
        hidden_size=size["num_attention_heads"] * rng.choice([4, 8, 16]),
        shared_expert_intermediate_size=rng.choice([16, 48]),
    )
    return transformers.Qwen2MoeConfig(
        **size, **windows(rng, size["num_hidden_layers"]), qkv_bias=rng.random() < 0.7
    )


def qwen3_moe(rng):
    size = sizes(rng)
    size |= experts(rng, size) | dict(
        hidden_size=rng.choice([20, 48, 64]),
        head_dim=rng.choice([4, 8, 16, 32]),
        attention_bias=rng.random() < 0.5,
    )
    return transformers.Qwen3MoeConfig(
        **size,
        **{k: v for k, v in windows(rng, size["num_hidden_layers"]).items() if k != "layer_types"},
    )


def hybrid(rng):
    "What the two hybrids share."
    size, keys = sizes(rng), rng.choice([1, 2, 3])
    size["rope_parameters"]["partial_rotary_factor"] = rng.choice([0.25, 0.5, 1.0])
    n = size["num_hidden_layers"]
    kinds = rng.choices(["linear_attention", "full_attention"], [2, 1], k=n)
    kinds[rng.randrange(n)] = "full_attention"
    return size | dict(
        hidden_size=rng.choice([20, 48, 64]),
        head_dim=rng.choice([8, 16, 32]),
        attention_bias=rng.random() < 0.5,
        layer_types=kinds if n < 4 or rng.random() < 0.6 else None,
        linear_num_key_heads=keys,
        linear_num_value_heads=keys * rng.choice([1, 2]),
        linear_key_head_dim=rng.choice([6, 8, 16]),
        linear_value_head_dim=rng.choice([4, 8, 16]),
        linear_conv_kernel_dim=rng.choice([2, 3, 4, 5]),
    )


def qwen3_5(rng):
    return transformers.Qwen3_5TextConfig(**hybrid(rng))


def qwen3_next(rng):
    size = hybrid(rng)
    size |= (
        experts(rng, size)
        | dict(shared_expert_intermediate_size=rng.choice([16, 48]))
        | (dict(num_experts=0) if rng.random() < 0.2 else {})
    )
    return transformers.Qwen3NextConfig(**size)


def qwen3_5_moe(rng):
    size = {k: v for k, v in hybrid(rng).items() if k != "intermediate_size"}
    n = rng.choice([2, 3, 5, 8])
    return transformers.Qwen3_5MoeTextConfig(
        **size,
        num_experts=n,
        num_experts_per_tok=rng.randint(1, n),
        moe_intermediate_size=rng.choice([12, 24, 40]),
        shared_expert_intermediate_size=rng.choice([16, 48]),
    )


# ---- files with a vision tower, whose text part is opened


def with_tower(rng, kind, text):
    "A nested config: the text's settings, a small tower, and the tie flag at both levels."
    tower = dict(depth=1, hidden_size=16, num_heads=2, patch_size=4)
    if kind == "Qwen2VL":
        tower |= dict(embed_dim=16, hidden_size=text["hidden_size"])
    else:
        tower |= dict(intermediate_size=16, out_hidden_size=text["hidden_size"])
    if kind.startswith("Qwen3"):
        tower |= dict(num_position_embeddings=16)
    if kind.startswith("Qwen3VL"):
        tower |= dict(deepstack_visual_indexes=[0])
    tied = rng.random() < 0.5
    return getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=tower, tie_word_embeddings=tied
    )


def three_axes(rng, size, head_dim):
    "The text's settings with sections for time, row and column."
    half = head_dim // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    return size | dict(rope_parameters=size["rope_parameters"] | dict(mrope_section=section))


def qwen2_vl(rng, kind="Qwen2VL"):
    size = sizes(rng)
    head_dim = rng.choice([8, 16])
    size["hidden_size"] = size["num_attention_heads"] * head_dim
    size = three_axes(rng, size, head_dim) | windows(rng, size["num_hidden_layers"])
    return with_tower(rng, kind, size)


def qwen2_5_vl(rng):
    return qwen2_vl(rng, "Qwen2_5_VL")


def qwen3_vl(rng):
    head_dim = rng.choice([8, 16, 32])
    size = sizes(rng) | dict(
        hidden_size=rng.choice([20, 48, 64]), head_dim=head_dim, attention_bias=rng.random() < 0.5
    )
    return with_tower(rng, "Qwen3VL", three_axes(rng, size, head_dim))


def qwen3_vl_moe(rng):
    head_dim = rng.choice([8, 16, 32])
    size = sizes(rng)
    size |= experts(rng, size) | dict(
        hidden_size=rng.choice([20, 48, 64]), head_dim=head_dim, attention_bias=rng.random() < 0.5
    )
    del size["norm_topk_prob"]
    return with_tower(rng, "Qwen3VLMoe", three_axes(rng, size, head_dim))


def qwen3_5_seeing(rng):
    return with_tower(rng, "Qwen3_5", hybrid(rng))


def qwen3_5_moe_seeing(rng):
    return with_tower(rng, "Qwen3_5Moe", qwen3_5_moe(rng).to_dict())


def qwen4_exp(rng):
    "Budgets and blocks shorter and longer than the 40 tokens, n-grams in some layer or in none."
    size = hybrid(rng)
    turned = int(size["head_dim"] * size["rope_parameters"]["partial_rotary_factor"])
    block, heads, order = rng.choice([1, 2, 3, 4, 7]), rng.choice([1, 2]), rng.choice([2, 3, 4])
    kinds = size["layer_types"] or ["linear_attention"] * 3 + ["full_attention"]
    linear = [i + 1 for i, kind in enumerate(kinds) if kind == "linear_attention"]
    mixture = {k: v for k, v in experts(rng, size).items() if k not in DENSE}
    return transformers.Qwen4ExpTextConfig(
        **{k: v for k, v in size.items() if k not in ("intermediate_size", "eos_token_id")},
        **mixture,
        shared_expert_intermediate_size=rng.choice([16, 48]),
        output_gate_type=rng.choice(["sigmoid", "silu", None]),
        hc_count=rng.choice([2, 3, 4]),
        hc_lowrank=rng.choice([3, 8]),
        indexer_n_heads=rng.choice([1, 2, 4]),
        indexer_kv_heads=1,
        indexer_head_dim=max(turned, rng.choice([4, 16])),
        indexer_compress_ratio=block,
        indexer_budget=block * rng.choice([1, 2, 3, 20]),
        ple_layer_ids=sorted(rng.sample(linear, rng.randint(0, min(2, len(linear))))),
        ple_embed_dim=(order - 1) * heads * rng.choice([3, 8]),
        ple_conv_kernel_size=rng.choice([2, 3, 4]),
        ngram_size=order,
        heads_per_ngram=heads,
        ngram_vocab_size_base=rng.choice([20, 300]),
        make_ngram_vocab_size_divisible_by=rng.choice([1, 16]),
        split_ngram_parts=rng.choice([1, 2, 5]),
        seed=rng.choice([0, 1234]),
        eos_token_id=rng.choice([3, [5, 7]]),
    )


DENSE = "decoder_sparse_step", "mlp_only_layers"  # in Qwen4-exp every layer is a mixture


FAMILIES = {
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Qwen3_5ForCausalLM": qwen3_5,
    "Qwen3NextForCausalLM": qwen3_next,
    "Qwen3_5MoeForCausalLM": qwen3_5_moe,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl_moe,
    "Qwen3_5ForConditionalGeneration": qwen3_5_seeing,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5_moe_seeing,
    "Qwen4ExpForCausalLM": qwen4_exp,
}  # class in transformers → rng → one of its configs


# ---- the comparison


def checkpoint(folder, family, seed):
    "A random checkpoint in the folder; the reference and what it was drawn with."
    rng = random.Random(f"{family} {seed}")
    torch.manual_seed(seed)
    config = FAMILIES[family](rng)
    text = config.get_text_config()
    text.initializer_range = config.initializer_range = (
        rng.choice([1, 1.5]) / text.hidden_size**0.5
    )  # with the usual 0.02 a tiny model hardly looks at its input
    reference = getattr(transformers, family)(config).float().eval()
    remembers = family == "Qwen3NextForCausalLM" or seed % 4 == 0
    # The usual decays forget within a token: the gated norm then sees the sign of q·k, not the
    # state, and where q·k is about 0, rounding.
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for name, p in reference.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            if name.endswith("A_log") and remembers:
                p.uniform_(-5, 0)
    reference.save_pretrained(folder)
    reference.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return reference, rng, text


def can_cache(config):
    """Not with a window of 1: transformers 5.23's own cache then keeps `keys[:, :, -0:]`, which is
    everything (cache_utils.py, DynamicSlidingWindowLayer)."""
    return getattr(config, "sliding_window", None) != 1


def compare(folder, family, seed, length=40, new=12):
    """Logits to 1e-5 of their scale, cached greedy ids the same, with and without padding on the
    left. The message names the config."""
    reference, rng, config = checkpoint(folder, family, seed)
    ids, mask = (
        torch.randint(0, config.vocab_size, (2, length)),
        torch.ones(2, length, dtype=torch.long),
    )
    mask[1, : rng.choice([0, 1, length // 2])] = 0
    try:
        ours = Qwen.from_pretrained(folder, dtype="float32")
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        # So the reference's generate counts them; by itself it counts the padding too, which is
        # the same but for rounding.
        with torch.no_grad():
            a, b = ours(ids, mask), reference(ids, attention_mask=mask, position_ids=places).logits
        error, scale = (a - b)[mask.bool()].abs().max().item(), b[mask.bool()].abs().max().item()
        assert error <= 1e-5 * scale, f"logits differ by {error:.2g} at a scale of {scale:.2g}"
        for prompt, m in ((ids[:1, :5], mask[:1, :5]), (ids, mask)):
            a = generate(ours, prompt, new, m, temperature=0.0, stop_ids=())
            b = reference.generate(
                prompt, attention_mask=m, max_new_tokens=new, use_cache=can_cache(config)
            )
            assert torch.equal(a, b), (
                f"greedy ids after {prompt.shape[1]} are {a[:, -new:].tolist()}, "
                f"theirs {b[:, -new:].tolist()}"
            )
    except Exception as e:
        raise AssertionError(
            f"{family}, seed {seed}: {type(e).__name__}: {e}\n{config.to_diff_dict()}"
        ) from e


def cases(n):
    return [([*FAMILIES][i % len(FAMILIES)], i) for i in range(n)]  # the families in turn


@pytest.mark.parametrize("family, seed", cases(len(FAMILIES)))
def test_equals_transformers(tmp_path, family, seed):
    compare(tmp_path, family, seed)


def test_the_comparison_can_fail(tmp_path, monkeypatch):
    "And then names the config."
    from qwen_nb.yarn import Rotary

    monkeypatch.setattr(
        "qwen_nb.model.Rotary", lambda head_dim, theta, *rest: Rotary(head_dim, 2 * theta, *rest)
    )
    with pytest.raises(
        AssertionError,
        match=r"(?s)Qwen3ForCausalLM, seed 1: AssertionError: logits differ.*'head_dim': \d+",
    ):
        compare(tmp_path, "Qwen3ForCausalLM", 1)


@pytest.mark.slow
def test_equals_transformers_on_many_configs(tmp_path):
    failed = []
    for family, seed in cases(300):
        try:
            compare(tmp_path / f"{seed}", family, seed)
        except AssertionError as e:
            failed.append(str(e))
    assert not failed, f"{len(failed)} of 300 failed\n" + "\n".join(failed)
