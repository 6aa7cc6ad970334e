"""What the tests of training share: the settings of a small run, and how to look at it."""

import pytest
import torch

from qwen_nb.durable import checkpoints, load_checkpoint
from qwen_nb.log import read_log
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.train import init_weights

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


QUICK = dict(
    SMALL,
    steps=6,
    batch_size=4,
    seq_len=32,
    lr=3e-3,
    warmup=2,
    save_every=2,
    keep=0,
    log_every=1,
    eval_every=0,
    sample=0,
    peak_tflops=1.0,
)


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 600
    return str(e.value)


def small(**kw):
    return init_weights(
        Qwen(QwenConfig(**dict(SMALL, vocab_size=448, rope_theta=1e4) | kw)), seed=1
    )


def losses(out):
    return [line["loss"] for line in read_log(out)]


def final_weights(out):
    return load_checkpoint(checkpoints(out)[-1])["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


FAMILIES = dict(
    qwen3={},
    qwen2=dict(qkv_bias=True, qk_norm=False),
    untied=dict(tie_word_embeddings=False),
    yarn=dict(rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)),
)


def stop_at(step):
    def watch(lines):
        if lines[-1]["step"] == step:
            raise KeyboardInterrupt

    return watch


def stop(*args):
    raise KeyboardInterrupt
