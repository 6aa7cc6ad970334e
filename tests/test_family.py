"""Every family against transformers on random configs: a small random checkpoint saved by transformers, opened by us."""
import random

import pytest
import torch

from qwen_nb.generate import generate
from qwen_nb.model import Qwen

transformers = pytest.importorskip("transformers")


# ---- random settings; what is drawn is small, and odd rather than usual

def sizes(rng):
    "What every family has. A wide `initializer_range`: with the usual 0.02 a tiny model hardly looks at its input."
    kv = rng.choice([1, 2, 3, 4])
    return dict(vocab_size=rng.choice([97, 256]), num_hidden_layers=rng.choice([1, 2, 3, 4]), num_key_value_heads=kv,
                num_attention_heads=kv * rng.choice([1, 2, 3]), intermediate_size=rng.choice([24, 56, 96]), hidden_act="silu",
                tie_word_embeddings=rng.random() < .5, rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-3]), max_position_embeddings=rng.choice([64, 128]),
                initializer_range=rng.choice([.1, .3]), rope_parameters=rope(rng), bos_token_id=None, eos_token_id=None, pad_token_id=None)


def rope(rng):
    theta = dict(rope_theta=rng.choice([100., 1e4, 1e6]))
    kind = rng.choice(["default", "default", "linear", "yarn"])
    if kind == "default": return theta | dict(rope_type=kind)
    scaling = theta | dict(rope_type=kind, factor=rng.choice([1.5, 2.0, 4.0]))
    if kind == "linear": return scaling
    may = dict(beta_fast=rng.choice([16, 32]), beta_slow=rng.choice([1, 2]), attention_factor=rng.choice([.9, 1.2]), truncate=False)
    return scaling | dict(original_max_position_embeddings=rng.choice([16, 32])) | {k: v for k, v in may.items() if rng.random() < .3}


def qwen2(rng):
    size = sizes(rng)
    size["hidden_size"] = size["num_attention_heads"] * rng.choice([4, 8, 16])
    if rng.random() < .2: size["head_dim"] = rng.choice([6, 32])  # not a setting of Qwen2Config, and yet it counts
    return transformers.Qwen2Config(**size)


def qwen3(rng):
    size = sizes(rng) | dict(hidden_size=rng.choice([20, 48, 64]), head_dim=rng.choice([4, 8, 16, 32]), attention_bias=rng.random() < .5)
    return transformers.Qwen3Config(**size)


FAMILIES = {"Qwen2ForCausalLM": qwen2, "Qwen3ForCausalLM": qwen3}  # class in transformers → rng → one of its configs


# ---- the comparison

def checkpoint(folder, family, seed):
    "A random checkpoint in the folder; the reference and what it was drawn with."
    rng = random.Random(f"{family} {seed}")
    torch.manual_seed(seed)
    config = FAMILIES[family](rng)
    reference = getattr(transformers, family)(config).float().eval()
    with torch.no_grad():  # biases and norms start as zeros and ones, which would hide a mistake
        for p in reference.parameters():
            if p.dim() == 1: p.add_(.3 * torch.randn_like(p))
    reference.save_pretrained(folder)
    reference.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return reference, rng, config


def compare(folder, family, seed, length=40, new=12):
    "Logits to 1e-5 of their scale, cached greedy ids the same, with and without padding on the left. The message names the config."
    reference, rng, config = checkpoint(folder, family, seed)
    ids, mask = torch.randint(0, config.vocab_size, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, :rng.choice([0, 1, length // 2])] = 0
    try:
        ours = Qwen.from_pretrained(folder, dtype="float32")
        with torch.no_grad(): a, b = ours(ids, mask), reference(ids, attention_mask=mask).logits
        error, scale = (a - b)[mask.bool()].abs().max().item(), b[mask.bool()].abs().max().item()
        assert error <= 1e-5 * scale, f"logits differ by {error:.2g} at a scale of {scale:.2g}"
        for prompt, m in ((ids[:1, :5], mask[:1, :5]), (ids, mask)):
            a = generate(ours, prompt, new, m, temperature=0., stop_ids=())
            b = reference.generate(prompt, attention_mask=m, max_new_tokens=new)
            assert torch.equal(a, b), f"greedy ids after {prompt.shape[1]} are {a[:, -new:].tolist()}, theirs {b[:, -new:].tolist()}"
    except Exception as e:
        raise AssertionError(f"{family}, seed {seed}: {type(e).__name__}: {e}\n{config.to_diff_dict()}") from e


def cases(n): return [([*FAMILIES][i % len(FAMILIES)], i) for i in range(n)]  # the families in turn


@pytest.mark.parametrize("family, seed", cases(10))
def test_equals_transformers(tmp_path, family, seed): compare(tmp_path, family, seed)


@pytest.mark.slow
def test_equals_transformers_on_many_configs(tmp_path):
    failed = []
    for family, seed in cases(210):
        try: compare(tmp_path / f"{seed}", family, seed)
        except AssertionError as e: failed.append(str(e))
    assert not failed, f"{len(failed)} of 210 failed\n" + "\n".join(failed)
