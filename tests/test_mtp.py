"The head that guesses ahead: names, shapes, equality with the reference's parts, refusals."

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_nb.durable import save_pretrained
from qwen_nb.model import Qwen
from qwen_nb.mtp import MTPHead, open_mtp
from qwen_nb.qwen3_5 import HybridConfig
from qwen_nb.qwen3_5_moe import MoEHybridConfig, fuse
from qwen_nb.qwen3_next import NextConfig

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
)
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=12,
)
CONFIGS = {
    "qwen3_5": HybridConfig(**SIZES),
    "qwen3_5_moe": MoEHybridConfig(**SIZES, **EXPERTS),
    "qwen3_next": NextConfig(**SIZES, **EXPERTS),
}


def shaken(module):
    for p in module.parameters():
        p.data = torch.randn_like(p) * (0.2 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return module


@pytest.fixture
def folder_with_head(tmp_path):
    def make(family, rename=lambda tensors: tensors):
        torch.manual_seed(0)
        model = shaken(Qwen(CONFIGS[family]))
        save_pretrained(model, tmp_path, dtype=torch.float32)
        path = tmp_path / "model.safetensors"
        head = shaken(MTPHead(CONFIGS[family]))
        own = rename({f"mtp.{name}": t for name, t in head.state_dict().items()})
        save_file(load_file(path) | own, path)
        return tmp_path, model.eval(), head.eval()

    return make


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_opened_and_the_model_stays_as_it_was(folder_with_head, family, capsys):
    folder, model, head = folder_with_head(family)
    opened = Qwen.from_pretrained(folder)
    assert "the multi-token-prediction head (" in capsys.readouterr().err
    ids = torch.randint(97, (2, 20))
    with torch.no_grad():
        assert torch.equal(opened(ids), model(ids))
        states = model.model(ids, torch.arange(20)[None])[:, :-1]
        again = open_mtp(opened)
        assert {n: p.shape for n, p in again.named_parameters()} == {
            n: p.shape for n, p in head.named_parameters()
        }
        ours, theirs = again(opened, ids[:, 1:], states), head(model, ids[:, 1:], states)
    torch.testing.assert_close(ours, theirs)
    assert ours.shape == states.shape


def test_experts_in_one_tensor_and_a_deeper_name(folder_with_head):
    def rename(tensors):
        return {f"language_model.{name}": t for name, t in fuse(tensors).items()}

    folder, _, head = folder_with_head("qwen3_5_moe", rename)
    again = open_mtp(Qwen.from_pretrained(folder)).state_dict()
    assert all(torch.equal(t, again[name]) for name, t in head.state_dict().items())


def test_equal_to_the_references_parts(folder_with_head):
    pytest.importorskip("transformers")
    from transformers import Qwen3_5TextConfig
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    folder, model, head = folder_with_head("qwen3_5")
    rope = dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25)
    c = Qwen3_5TextConfig(**SIZES, rope_parameters=rope, attn_implementation="eager")
    c._attn_implementation = "eager"
    ids = torch.randint(97, (2, 20))
    weights = head.state_dict()

    def norm(name):
        made = theirs.Qwen3_5RMSNorm(32, 1e-6)
        made.weight.data = weights[f"{name}.weight"]
        return made

    block = theirs.Qwen3_5DecoderLayer(c, 3)
    inside = {n.removeprefix("layers.0."): t for n, t in weights.items() if "layers.0." in n}
    block.load_state_dict(inside, strict=True)
    rotary = theirs.Qwen3_5TextRotaryEmbedding(c)
    with torch.no_grad():
        states = model.model(ids, torch.arange(20)[None])[:, :-1]
        embedded = model.model.embed_tokens(ids[:, 1:])
        both = norm("pre_fc_norm_embedding")(embedded), norm("pre_fc_norm_hidden")(states)
        x = torch.cat(both, -1) @ weights["fc.weight"].T
        turned = rotary(x, torch.arange(19)[None].expand(3, 1, -1))
        causal = torch.full((19, 19), -torch.inf).triu(1)[None, None]
        x = norm("norm")(block(x, position_embeddings=turned, attention_mask=causal))
        ours = head(model, ids[:, 1:], states)
        assert (ours - x).abs().max() <= 1e-5 * x.abs().max()
        assert (head(model, ids[:, :-1], states) - x).abs().max() > 0.1 * x.abs().max()


def test_what_is_refused(folder_with_head, tmp_path):
    with pytest.raises(ValueError, match="no head that guesses ahead"):
        open_mtp(Qwen.from_pretrained())
    extra = {"mtp.embed_tokens.weight": torch.zeros(97, 32)}
    folder, *_ = folder_with_head("qwen3_5", lambda tensors: tensors | extra)
    with pytest.raises(ValueError, match="1 left over.*embed_tokens"):
        open_mtp(Qwen.from_pretrained(folder))
