"""Files as people have them: names with prefixes, two dtypes, packed numbers, other heads, settings
in older and newer places. Each opens as it should, or is named for what it is."""

import json
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from siblings import SIBLINGS

from qwen_nb.files import check_plain, how_packed, left_aside, one_dtype, own_name, text_only
from qwen_nb.generation import generate, max_positions
from qwen_nb.inspect import packaged_model
from qwen_nb.loading import family_config, text_settings
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.tokenizer import PlainTokenizer, Tokenizer

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
RAW = SIZES | dict(model_type="qwen3", tie_word_embeddings=True, rope_theta=1e6)
IDS = torch.arange(50)[None]


def model():
    torch.manual_seed(0)
    return Qwen(QwenConfig(**SIZES)).eval()


def folder(path, tensors, raw=RAW):
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw))
    return path


def refused(path, *parts):
    with pytest.raises(ValueError) as e:
        Qwen.from_pretrained(path)
    for part in parts:
        assert part in str(e.value), f"{part} is not in: {e.value}"
    assert "\n" not in str(e.value)


# ---- names

PREFIXES = {
    "_orig_mod.model.": "_orig_mod.",
    "module.model.": "module.",
    "module._orig_mod.model.": "module._orig_mod.",
    "model.language_model.": "",
    "language_model.model.": "language_model.",
    "model._orig_mod.": "",
    "model._fsdp_wrapped_module.": "",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(tmp_path, prefix):
    wanted = model()
    own = {k.replace("model.", prefix, 1): v for k, v in wanted.state_dict().items()}
    own[PREFIXES[prefix] + "lm_head.weight"] = wanted.model.embed_tokens.weight.detach().clone()
    assert torch.equal(Qwen.from_pretrained(folder(tmp_path, own))(IDS), wanted(IDS))


def test_a_file_without_the_first_level(tmp_path):
    wanted = model()
    own = {k.removeprefix("model."): v for k, v in wanted.state_dict().items()}
    own["rotary_emb.inv_freq"] = torch.ones(4)
    own["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert torch.equal(Qwen.from_pretrained(folder(tmp_path, own))(IDS), wanted(IDS))


def test_names_of_other_generations_stay():
    for sibling in ("", *SIBLINGS):
        stored = load_file(packaged_model(sibling) / "model.safetensors")
        assert text_only(stored).keys() == stored.keys() and left_aside(stored) == ""
    assert own_name("module") == "module"


def test_what_is_left_aside_is_told(tmp_path, capsys):
    own = model().state_dict() | {"visual.merger.weight": torch.ones(2), "mtp.x": torch.ones(2)}
    Qwen.from_pretrained(folder(tmp_path, own))
    assert capsys.readouterr().err.splitlines() == [
        "left aside: the vision tower (1 tensor), the multi-token-prediction head (1 tensor)"
    ]


def test_what_is_unknown_is_not_left_aside(tmp_path):
    own = model().state_dict()
    refused(folder(tmp_path, own | {"model.audio.w": torch.ones(2)}), "1 left over", "audio.w")
    twice = own | {"module.model.norm.weight": torch.ones(32)}
    refused(folder(tmp_path, twice), "model.norm.weight twice", "module.model.norm.weight")


@pytest.mark.parametrize(
    "name, words",
    [
        ("score.weight", "classifier of texts"),
        ("classifier.weight", "classifier of tokens"),
        ("v_head.summary.weight", "value head"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
    ],
)
def test_other_heads_are_named(tmp_path, name, words):
    own = model().state_dict() | {name: torch.ones(2, 2)}
    refused(folder(tmp_path, own), name, words)


def test_no_head_at_all(tmp_path):
    raw = RAW | dict(tie_word_embeddings=False)
    refused(folder(tmp_path, model().state_dict(), raw), "no lm_head.weight", "hidden states")


# ---- numbers


def mixed(**dtypes):
    return {
        k: v.to(dtypes["norm"] if "norm" in k else dtypes["rest"])
        for k, v in model().state_dict().items()
    }


@pytest.mark.parametrize(
    "said, want", [({}, "bfloat16"), (dict(torch_dtype="float32"), "float32"),
                   (dict(dtype="float16"), "float16")]
)  # fmt: skip
def test_two_dtypes_become_one(tmp_path, said, want):
    own = mixed(norm=torch.float32, rest=torch.bfloat16)
    opened = Qwen.from_pretrained(folder(tmp_path, own, RAW | said))
    assert {str(p.dtype) for p in opened.parameters()} == {f"torch.{want}"}
    assert opened(IDS).isfinite().all()
    asked = Qwen.from_pretrained(tmp_path, dtype="float64")
    assert {p.dtype for p in asked.parameters()} == {torch.float64}


def test_one_dtype_stays_whatever_the_config_says():
    assert one_dtype(model().state_dict(), dict(torch_dtype="bfloat16")) is None


def packed(kind):
    own, found = model().state_dict(), {}
    for name, t in own.items():
        if "proj" not in name:
            found[name] = t
            continue
        whole, half = torch.ones(2, 2, dtype=torch.int32), torch.ones(2, 2).half()
        at = name.removesuffix("weight")
        if kind == "FP8":
            found |= {name: t.to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(1, 1)}
        if kind == "FP8 without scales":
            found[name] = t.to(torch.float8_e4m3fn)
        if kind in ("AWQ", "GPTQ"):
            found |= {at + "qweight": whole, at + "qzeros": whole.clone(), at + "scales": half}
        if kind == "GPTQ":
            found[at + "g_idx"] = whole.clone()
        if kind == "MLX":
            found |= {name: whole.to(torch.uint32), at + "scales": half, at + "biases": half + 1}
        if kind == "bitsandbytes":
            found |= {name: whole.to(torch.uint8), name + ".absmax": torch.ones(2)}
        if kind == "compressed-tensors":
            found |= {at + "weight_packed": whole, at + "weight_scale": half}
    return found


KINDS = "FP8", "FP8 without scales", "AWQ", "GPTQ", "MLX", "bitsandbytes", "compressed-tensors"


@pytest.mark.parametrize("kind", KINDS)
def test_packed_numbers_are_named(tmp_path, kind):
    refused(folder(tmp_path, packed(kind)), "quantised", kind.split()[0])
    said = dict(quantization_config=dict(quant_method=kind.split()[0].lower()))
    if kind == "MLX":
        said = dict(quantization=dict(bits=4, group_size=64))
    refused(folder(tmp_path, packed(kind), RAW | said), "quantised", kind.split()[0])


def test_a_config_that_still_speaks_of_packing(tmp_path):
    said = dict(quantization_config=dict(quant_method="bitsandbytes"))
    wanted = model()
    own = Qwen.from_pretrained(folder(tmp_path, wanted.state_dict(), RAW | said))
    assert torch.equal(own(IDS), wanted(IDS))
    assert how_packed({}, said) is None and check_plain({}, said) is None


def test_the_command_ends_in_one_sentence(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(packaged_model() / name, tmp_path)
    folder(tmp_path, packed("AWQ"))
    code = "import sys; from qwen_nb.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", code, "generate", "Max", "--model", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "quantised (AWQ" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_runtime_error_is_told_in_a_line(monkeypatch, capsys):
    from qwen_nb import cli, report_commands

    def stops(args):
        raise RuntimeError("expected m1 and m2 to have the same dtype\nat::native")

    monkeypatch.setattr(report_commands, "run_verify", stops)
    with pytest.raises(SystemExit) as e:
        cli.main(["verify"])
    said = capsys.readouterr().err
    assert e.value.code == 2 and "PyTorch stopped: expected m1" in said and "native" not in said
    deep = cli.sentence(RecursionError("too deep"), "qwen-nb chat")
    assert deep == "RecursionError: too deep"        # of Python, or of a learner's own piece


# ---- settings

YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=64)


def test_rope_scaling_beside_rope_parameters():
    newer = dict(rope_type="default", rope_theta=1e6)
    old = family_config(RAW | dict(rope_scaling=YARN))
    without = {k: v for k, v in RAW.items() if k != "rope_theta"}
    for raw in (RAW, without):
        assert family_config(raw | dict(rope_parameters=newer, rope_scaling=YARN)) == old
    assert old.rope_theta == 1e6 and max_positions(old) == 256
    both = newer | dict(rope_scaling=None)
    assert family_config(without | dict(rope_parameters=both, rope_scaling=None)).rope_theta == 1e6
    outside = {k: v for k, v in YARN.items() if not k.startswith("original")}
    for at_top in (32, None):
        raw = RAW | dict(rope_scaling=outside, original_max_position_embeddings=at_top)
        assert max_positions(family_config(raw)) == 4 * (at_top or 64)


@pytest.mark.parametrize("original", [{}, dict(original_max_position_embeddings=None)])
def test_yarn_without_its_original_length(original):
    config = family_config(RAW | dict(rope_scaling=dict(type="yarn", factor=4.0) | original))
    assert max_positions(config) == 256
    torch.manual_seed(0)
    assert generate(Qwen(config).eval(), torch.zeros(1, 100).long(), 2).shape == (1, 102)


def test_every_older_form_of_rope_equals_the_reference():
    transformers = pytest.importorskip("transformers")
    forms = [
        dict(rope_theta=5e5),
        dict(rope_parameters=dict(rope_theta=5e5, rope_type="default")),
        dict(rope_theta=5e5, rope_scaling=YARN),
        dict(rope_theta=5e5, rope_scaling=dict(rope_type="linear", factor=2.0)),
        dict(rope_parameters=YARN | dict(rope_theta=5e5, rope_type="yarn")),
        dict(rope_theta=5e5, rope_scaling=dict(type="yarn", factor=4.0)),
        dict(rope_theta=5e5, rope_scaling=YARN, rope_parameters=dict(rope_type="default")),
    ]
    base = {k: v for k, v in RAW.items() if k not in ("rope_theta", "model_type")}
    for form in forms:
        config = transformers.Qwen3Config(**base, **json.loads(json.dumps(form)))
        theirs = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(config)
        ours = family_config(base | form | dict(model_type="qwen3")).rotary()
        torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
        assert ours.attention_factor == theirs.attention_scaling


def test_where_a_text_models_settings_stand():
    nested = dict(model_type="a", tie_word_embeddings=True, text_config=dict(vocab_size=3))
    assert text_settings(nested) == dict(model_type="a", vocab_size=3, tie_word_embeddings=True)
    inner = dict(model_type="b", tie_word_embeddings=False)
    assert text_settings(nested | dict(text_config=inner)) == inner | dict(tie_word_embeddings=True)
    assert text_settings(dict(model_type="c", text_config=None)) == dict(model_type="c")
    with pytest.raises(ValueError, match="text_config is 3"):
        text_settings(dict(text_config=3))


def test_the_packaged_hybrid_is_nested_as_released_ones_are():
    raw = json.loads((packaged_model("qwen3_5") / "config.json").read_text())
    assert raw["model_type"] == "qwen3_5" and raw["text_config"]["model_type"] == "qwen3_5_text"
    transformers = pytest.importorskip("transformers")
    path = packaged_model("qwen3_5")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = Qwen.from_pretrained(path, torch.float32)
    with torch.no_grad():
        a, b = ours(IDS), theirs(IDS).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


# ---- a token that somebody has added


@pytest.mark.parametrize("kind", [PlainTokenizer, Tokenizer])
def test_tokens_added_with_the_library(tmp_path, kind):
    theirs = tokenizers.Tokenizer.from_file(str(packaged_model() / "tokenizer.json"))
    theirs.add_tokens(["2012-7", "caf\u00e9", "2012"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = kind.from_pretrained(tmp_path)
    texts = ["in 2012-7 it was 2012", "<|im_start|>user\nMax 2012-7<|im_end|>\n", "cafe\u0301",
             "Max is in the attic.", "", "2012-72012-7"]  # fmt: skip
    for text in texts:
        ids = ours.encode(text, allow_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        plain = set(ours.encode(text)) & set(ours.special.values())
        assert not plain, "ordinary text became an added token"
    if kind is Tokenizer:
        ours.save(tmp_path / "again")
        again = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
        for text in texts:
            assert again.encode(text).ids == theirs.encode(text).ids


def test_a_token_that_swallows_blanks_is_refused_where_it_stands(tmp_path):
    theirs = tokenizers.Tokenizer.from_file(str(packaged_model() / "tokenizer.json"))
    theirs.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("Max", allow_special=True) == ours.encode("Max")
    with pytest.raises(ValueError, match="'<x>' may swallow blanks"):
        ours.encode("Max <x>", allow_special=True)
