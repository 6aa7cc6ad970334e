"""The decoder against transformers on random checkpoints, and what it says to bad ones."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_nb.inspect import packaged_model
from qwen_nb.loading import parse_config
from qwen_nb.model import Qwen, QwenConfig, positions

transformers = pytest.importorskip("transformers")


def draw_vectors(reference):
    "Biases and norms start as zeros and ones, which would hide a mistake: draw them."
    for name, weight in reference.named_parameters():
        if weight.dim() == 1:
            mean = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(weight, mean, 0.5)


def random_checkpoint(folder, seed):
    "A small random Qwen2 or Qwen3, saved by transformers; its logits on some ids."
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv, groups, family = (
        rng.choice([1, 2, 4]),
        rng.choice([1, 2, 3]),
        rng.choice(["Qwen2", "Qwen3"]),
    )
    size = dict(
        vocab_size=rng.choice([97, 256]),
        num_hidden_layers=rng.choice([1, 2, 3]),
        num_key_value_heads=kv,
        num_attention_heads=kv * groups,
        intermediate_size=rng.choice([40, 96]),
        tie_word_embeddings=rng.random() < 0.5,
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        max_position_embeddings=128,
    )
    if family == "Qwen2":
        size |= dict(hidden_size=kv * groups * 8 * rng.choice([1, 2]))
    else:
        size |= dict(
            hidden_size=rng.choice([48, 64]),
            head_dim=rng.choice([8, 16, 32]),
            attention_bias=rng.random() < 0.5,
        )
    rope = dict(rope_theta=rng.choice([1e4, 1e6]), rope_type="default")
    if rng.random() < 0.5:
        rope |= dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    config = getattr(transformers, f"{family}Config")(**size, rope_parameters=rope)
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    draw_vectors(reference)
    reference.save_pretrained(folder)
    ids = torch.randint(0, size["vocab_size"], (2, 40))
    with torch.no_grad():
        return ids, reference(ids).logits


@pytest.mark.parametrize("seed", range(12))
def test_equals_transformers(tmp_path, seed):
    ids, theirs = random_checkpoint(tmp_path, seed)
    with torch.no_grad():
        ours = Qwen.from_pretrained(tmp_path, dtype="float32")(ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_norms_are_drawn_around_one_and_biases_around_zero():
    config = transformers.Qwen3Config(
        vocab_size=11,
        hidden_size=256,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        attention_bias=True,
    )
    torch.manual_seed(0)
    reference = transformers.Qwen3ForCausalLM(config)
    draw_vectors(reference)
    means = {n: p.mean().item() for n, p in reference.named_parameters() if p.dim() == 1}
    assert len(means) == 9
    for name, mean in means.items():
        assert abs(mean - ("norm" in name)) < 0.3, (name, mean)


def test_positions_count_tokens_not_columns():
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 0, 1, 0]])
    want = [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 0, 0, 0], [0, 1, 1, 2, 2]]
    for seq in range(1, 6):
        assert positions(mask, seq).tolist() == [row[-seq:] for row in want]
        assert positions(mask.bool(), seq).tolist() == [row[-seq:] for row in want]


class Spy:
    "In place of a model's rotary: keeps the positions it was asked for."

    def __init__(self, rotary):
        self.rotary, self.asked = rotary, []

    def __call__(self, position_ids, dtype, cache):
        self.asked.append(position_ids.tolist())
        return self.rotary(position_ids, dtype, cache)


class Cache:
    "Keys and values of every layer."

    def __init__(self):
        self.kv, self.length = {}, 0

    def update(self, layer_idx, k, v):
        if layer_idx in self.kv:
            old_k, old_v = self.kv[layer_idx]
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        self.kv[layer_idx] = k, v
        return k, v


@torch.no_grad()
def test_the_model_uses_positions_of_tokens():
    "No logit shows it: RoPE sees distances only. So it is looked at where positions are used."
    model = Qwen.from_pretrained(dtype="float32")
    spy = model.model.rotary = Spy(model.model.rotary)
    ids = torch.randint(0, 512, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    model(ids, attention_mask=mask)
    model(ids)
    assert spy.asked == [[[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]], [[0, 1, 2, 3, 4, 5]]]

    for mask, want in ((None, [[4, 5]]), (mask, [[4, 5], [1, 2]])):
        cache = Cache()
        model(ids[:, :4], None if mask is None else mask[:, :4], cache=cache)
        cache.length = 4
        model(ids[:, 4:], mask, cache=cache)
        assert spy.asked[-1] == want


def test_the_check_above_can_fail(tmp_path):
    ids, theirs = random_checkpoint(tmp_path, 0)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        ours = Qwen.from_pretrained(tmp_path, dtype="float32")(ids)
    assert (ours - theirs).abs().max() > 1e-3 * theirs.abs().max()


@pytest.fixture
def copy(tmp_path):
    "A copy of the packaged model to damage."
    folder = tmp_path / "model"
    shutil.copytree(packaged_model(), folder)
    return folder


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_sentence(match, call, kind=(ValueError, FileNotFoundError)):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 400


def test_dtype_is_as_stored_unless_asked():
    assert {p.dtype for p in Qwen.from_pretrained().parameters()} == {torch.bfloat16}
    assert {p.dtype for p in Qwen.from_pretrained(dtype=torch.float64).parameters()} == {
        torch.float64
    }
    assert {p.dtype for p in Qwen.from_pretrained(dtype="float16", device="cpu").parameters()} == {
        torch.float16
    }


def test_rotary_tables_survive_a_change_of_dtype():
    ids = torch.arange(40)[None]
    half = Qwen.from_pretrained(dtype="float32").bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(
            half(ids), Qwen.from_pretrained(dtype="bfloat16")(ids), rtol=0, atol=0
        )


def test_weights_can_be_trained_and_saved_over(copy):
    "Memory-mapped weights are private: training does not write into the file."
    before = (copy / "model.safetensors").read_bytes()
    model = Qwen.from_pretrained(copy, dtype="bfloat16")
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert (copy / "model.safetensors").read_bytes() == before


def test_missing_tensor(copy):
    rewrite(copy, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    one_sentence(
        "1 tensors missing.*model.layers.1.mlp.up_proj.weight", lambda: Qwen.from_pretrained(copy)
    )


def test_tensor_left_over(copy):
    rewrite(copy, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}))
    one_sentence("1 left over", lambda: Qwen.from_pretrained(copy))


def test_wrong_shape(copy):
    rewrite(copy, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    one_sentence(r"model.norm.weight has shape \(3,\)", lambda: Qwen.from_pretrained(copy))


def test_tied_head_that_is_stored_as_well(copy):
    "The real Qwen3-0.6B stores lm_head.weight though it is tied."
    rewrite(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in Qwen.from_pretrained(copy).state_dict()
    rewrite(copy, lambda t: t["lm_head.weight"].add_(1))
    one_sentence("tie_word_embeddings", lambda: Qwen.from_pretrained(copy))
    rewrite(copy, lambda t: t.pop("model.embed_tokens.weight"))
    one_sentence("model.embed_tokens.weight", lambda: Qwen.from_pretrained(copy))


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(model_type="llama"), "model_type is 'llama'"),
        (dict(model_type=None), "model_type is None"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(use_sliding_window=True, sliding_window=0), "sliding_window is 0"),
        (dict(num_key_value_heads=3), "does not divide"),
        (dict(hidden_size="128"), "hidden_size is '128'"),
        (dict(head_dim=-4), "head_dim"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(num_hidden_layers=True), "num_hidden_layers"),
        (dict(rms_norm_eps="small"), "rms_norm_eps"),
        (dict(rope_theta="big"), "rope_theta"),
        (dict(rope_theta=-1), "rope_theta"),
        (dict(head_dim=31), "head_dim|head dimension|even"),
        (dict(rope_scaling={"rope_type": "longrope"}), "longrope"),
        (dict(rope_scaling=[4]), "rope"),
        (dict(rope_scaling={"rope_type": "yarn"}), "factor"),
        (dict(rope_scaling={"factor": 4.0}), "type"),
        (
            dict(rope_scaling={"rope_type": "default", "partial_rotary_factor": 0.25}),
            "partial_rotary_factor",
        ),
    ],
)
def test_config_refused(copy, changes, match):
    set_config(copy, **changes)
    one_sentence(match, lambda: Qwen.from_pretrained(copy))


def test_config_with_a_setting_missing(copy):
    config = json.loads((copy / "config.json").read_text())
    config.pop("hidden_size")
    (copy / "config.json").write_text(json.dumps(config))
    one_sentence("hidden_size missing", lambda: Qwen.from_pretrained(copy))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00\xff"])
def test_config_that_is_not_one(copy, text):
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    one_sentence("config.json", lambda: Qwen.from_pretrained(copy))


def test_folder_without_config_or_weights(copy):
    (copy / "model.safetensors").rename(copy / "other")
    one_sentence("model.safetensors", lambda: Qwen.from_pretrained(copy))
    (copy / "config.json").unlink()
    one_sentence("config.json", lambda: Qwen.from_pretrained(copy))


@pytest.mark.parametrize(
    "kw, match",
    [
        (dict(dtype="float7"), "float7"),
        (dict(dtype=torch.int8), "int8"),
        (dict(device="abacus"), "abacus"),
        (dict(device="cuda:99"), "cuda:99"),
        (dict(device="meta"), "meta"),
    ],
)
def test_dtype_or_device_refused(kw, match):
    one_sentence(match, lambda: Qwen.from_pretrained(**kw))


def test_calls_with_wrong_shapes():
    model = Qwen.from_pretrained()
    one_sentence(r"\(batch, seq\)", lambda: model(torch.arange(4)))
    one_sentence(
        "attention_mask",
        lambda: model(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 3)),
    )
    one_sentence("512", lambda: model(torch.tensor([[512]])))


def test_old_and_new_spelling_of_rope_agree():
    raw = json.loads((packaged_model() / "config.json").read_text())
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")} | dict(
        rope_parameters=yarn | dict(rope_theta=raw["rope_theta"])
    )
    old = raw | dict(rope_scaling={("type" if k == "rope_type" else k): v for k, v in yarn.items()})
    a, b = Qwen(QwenConfig(**parse_config(new))), Qwen(QwenConfig(**parse_config(old)))
    tables = [m.model.rotary(torch.arange(9)[None]) for m in (a, b, Qwen.from_pretrained())]
    assert torch.equal(tables[0][0], tables[1][0]) and not torch.equal(tables[0][0], tables[2][0])
