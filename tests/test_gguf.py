"""GGUF files: blocks and readers against the `gguf` library, files that lie, whole models there and
back, and the command."""

import io
import random
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from qwen_nb.blocks import BLOCK_TYPES, pack_q8_0
from qwen_nb.chat import Chat
from qwen_nb.gguf import gguf_tensor, read_gguf, write_gguf
from qwen_nb.hub import find_model, read_json
from qwen_nb.inspect import packaged_model
from qwen_nb.mixture import MoEConfig
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.real import verify_model
from qwen_nb.to_gguf import FILE_TYPES, save_gguf
from qwen_nb.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = [t for t in BLOCK_TYPES.values() if t.name[0] == "Q"]


def finite(blocks, kind):
    "Random bytes whose float16 scales are ordinary numbers."
    two = dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
    for at in (two | {"Q6_K": (208,)}).get(kind.name, (0,)):
        scale = torch.randn(len(blocks), 1).half()
        blocks[:, at : at + 2] = scale.view(torch.uint8)
    return blocks


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda t: t.name)
def test_blocks_are_unpacked_as_by_the_library(kind):
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(1)
    blocks = finite(torch.randint(256, (500, kind.bytes), dtype=torch.uint8), kind)
    number = gguf.GGMLQuantizationType[kind.name]
    assert gguf.GGML_QUANT_SIZES[number] == (kind.numbers, kind.bytes)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), number).copy())
    assert torch.equal(kind.unpack(blocks), theirs)


def test_q8_0_is_packed_as_by_the_library():
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(2)
    x = torch.randn(400, 64) * torch.logspace(-4, 3, 400)[:, None]
    x[3] = 0
    x[4] = torch.arange(64) - 32.5  # halves
    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert pack_q8_0(x).numpy().tobytes() == theirs.tobytes()


# --- files ---


SETTINGS = {
    "general.architecture": "qwen3",
    "a.b": 7,
    "on": False,
    "f": 0.5,
    "words": ["a", "ö", ""],
    "kinds": [1, -3],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    torch.manual_seed(0)
    tensors = {kind: (torch.randn(2, 3, 32), kind) for kind in FILE_TYPES}
    write_gguf(path, SETTINGS, tensors | {"v": (torch.randn(5), "F32")})
    return path


def test_the_library_reads_what_we_write(small):
    gguf = pytest.importorskip("gguf")
    theirs, ours = gguf.GGUFReader(small), read_gguf(small)
    assert ours.metadata == SETTINGS
    found = {name: theirs.get_field(name).contents() for name in SETTINGS}
    assert found == SETTINGS
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    for t in theirs.tensors:
        x = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        assert torch.equal(x.float(), gguf_tensor(ours, t.name, torch.float32))


def test_the_library_writes_what_we_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
    writer.add_uint64("long", 2**40)
    writer.add_int8("short", -3)
    writer.add_float64("wide", 0.1)
    writer.add_array("floats", [0.5, 1.5])
    writer.add_custom_alignment(64)
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    for kind in ("Q4_0", "Q5_0", "Q8_0", "BF16"):
        number = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(x.numpy(), number)
        writer.add_tensor(kind, packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "x.gguf")
    wanted = {"long": 2**40, "short": -3, "wide": 0.1, "floats": [0.5, 1.5]}
    assert wanted.items() <= file.metadata.items()
    for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        theirs = torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        assert torch.equal(gguf_tensor(file, t.name, torch.float32), theirs.float())
        assert (gguf_tensor(file, t.name, torch.float32) - x).abs().max() < 1


def test_broken_files_are_opened_or_refused_in_one_sentence(small, tmp_path):
    whole, draw, refused = small.read_bytes(), random.Random(0), 0
    for _ in range(500):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(raw), 520))
            what = draw.random()
            if what < 0.6:
                raw[at] = draw.choice([0, 1, 255, draw.randrange(256)])
            elif what < 0.8:
                del raw[at : at + draw.randint(1, 9)]
            else:
                raw = raw[: draw.randrange(len(raw))] or bytearray(b"G")
        (tmp_path / "bad.gguf").write_bytes(raw)
        try:
            file = read_gguf(tmp_path / "bad.gguf")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        for name in file.tensors:
            gguf_tensor(file, name)
    assert refused > 150


# --- models ---


def tiny(config, folder):
    "A folder with random weights of this config and the packaged tokenizer."
    import json

    from safetensors.torch import save_file

    torch.manual_seed(0)
    raw = dict(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((packaged_model() / name).read_bytes())
    model = Qwen(QwenConfig.from_pretrained(folder))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


BASE = dict(
    vocab_size=520, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
    rms_norm_eps=1e-5, hidden_act="silu", rope_theta=5000.0, tie_word_embeddings=False,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
CONFIGS = {
    "qwen2": BASE | dict(model_type="qwen2"),
    "qwen3": BASE | dict(model_type="qwen3", head_dim=16, rope_scaling=YARN),
    "qwen3 with biases": BASE | dict(model_type="qwen3", head_dim=16, attention_bias=True),
    "qwen3_moe": BASE | EXPERTS | dict(model_type="qwen3_moe", norm_topk_prob=True, head_dim=8),
    "qwen2_moe": BASE
    | EXPERTS
    | dict(model_type="qwen2_moe", norm_topk_prob=False, shared_expert_intermediate_size=56),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name, tmp_path):
    folder = tiny(CONFIGS[name], tmp_path / "model")
    save_gguf(folder, tmp_path / "m.gguf", "F32")
    model, again = Qwen.from_pretrained(folder), Qwen.from_pretrained(tmp_path / "m.gguf")
    ids = torch.arange(40)[None] * 7
    with torch.no_grad():
        logits, off = model(ids), (model(ids) - again(ids)).abs().max()
    assert off <= 1e-6 * logits.abs().max()  # experts lie elsewhere in memory
    assert model.config == again.config
    assert isinstance(again.config, MoEConfig) == ("moe" in name)
    theirs = Tokenizer.from_pretrained(tmp_path / "m.gguf").vocabulary
    assert theirs == Tokenizer.from_pretrained(folder).vocabulary


@pytest.mark.parametrize("sibling", ["", "qwen2", "qwen3_moe"])
def test_siblings_by_file_and_by_folder(sibling, tmp_path):
    folder, path = packaged_model() / sibling, tmp_path / "only" / "model.gguf"
    path.parent.mkdir()
    save_gguf(folder, path)
    model, again = Qwen.from_pretrained(folder), Qwen.from_pretrained(path.parent)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    theirs = again.state_dict()
    for key, w in model.state_dict().items():
        if w.dim() > 1 and "mlp.gate." not in key:
            assert torch.equal(w, theirs[key]), key
    said = read_json(folder, "tokenizer_config.json")
    assert (
        read_json(find_model(path), "tokenizer_config.json")["chat_template"]
        == (said["chat_template"])
    )


def in_parts(path, folder, cuts):
    "The file's tensors in parts as llama-gguf-split names and marks them."
    folder.mkdir()
    file, count = read_gguf(path), len(cuts) + 1
    names = [*file.tensors]
    wanted = file.metadata | {"split.count": count, "split.tensors.count": len(names)}
    marks = {name: wanted[name] for name in wanted if name.startswith("split.")}
    for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(names)])):
        some = {n: (gguf_tensor(file, n), "F32") for n in names[a:b]}
        settings = (marks if i else wanted) | {"split.no": i}
        write_gguf(folder / f"m-{i + 1:05}-of-{count:05}.gguf", settings, some)
    return sorted(folder.iterdir())


def test_a_file_in_parts(tmp_path):
    save_gguf(packaged_model("qwen2"), tmp_path / "m.gguf", "F32")
    parts, ids = in_parts(tmp_path / "m.gguf", tmp_path / "p", [5, 11]), torch.arange(30)[None]
    want = Qwen.from_pretrained(tmp_path / "m.gguf")(ids)
    for place in (tmp_path / "p", parts[0], parts[2]):
        assert torch.equal(Qwen.from_pretrained(place)(ids), want), place
        assert Tokenizer.from_pretrained(place).special
    parts[1].rename(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(ValueError, match="m-00002-of-00003.gguf is not beside it"):
        Qwen.from_pretrained(parts[0])
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match="3 parts hold .* expected"):
        Qwen.from_pretrained(parts[0])
    parts[0].rename(tmp_path / "p.gguf")
    with pytest.raises(ValueError, match="one of 3 parts; expected a name that ends in -00001"):
        Qwen.from_pretrained(tmp_path / "p.gguf")


def test_chat_and_verify(tmp_path, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "m.gguf"
    save_gguf(None, path, "Q8_0")
    model, tokenizer = Qwen.from_pretrained(path), Tokenizer.from_pretrained(path)
    said = Chat(model, tokenizer).say("Max has the ball. Who has the ball?")
    answer = "".join(text for _, text in said)
    assert "Max" in answer
    assert verify_model(path)


def test_command(tmp_path):
    from qwen_nb.cli import main

    save_gguf(None, tmp_path / "m.gguf")
    said = []
    for model in ([], ["--model", str(tmp_path / "m.gguf")]):
        with redirect_stdout(io.StringIO()) as out:
            words = ["generate", "Anna is in the", "--temperature", "0", "--max-new-tokens", "8"]
            with pytest.raises(SystemExit) as done:
                main([*words, *model])
        assert done.value.code == 0
        said.append(out.getvalue())
    assert said[0] == said[1] and said[0]


def test_tool(tmp_path, capsys):
    tool = runpy.run_path(ROOT / "tools/to_gguf.py")["main"]
    assert not tool([str(packaged_model()), str(tmp_path / "m.gguf"), "--type", "F16"])
    assert "matrices in F16" in capsys.readouterr().out
    assert {t.type.name for t in read_gguf(tmp_path / "m.gguf").tensors.values()} == {"F16", "F32"}
    said = tool([str(packaged_model() / "qwen3_5"), str(tmp_path / "m.gguf")])
    assert "model_type is 'qwen3_5" in said


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.gguf"):
        find_model(tmp_path / "no.gguf")
    with pytest.raises(FileNotFoundError, match="no.gguf"):
        find_model("no.gguf")
    (tmp_path / "page.gguf").write_bytes(b"<html>not found</html>" * 9)
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        Qwen.from_pretrained(tmp_path / "page.gguf")
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="2 GGUF files, b.gguf, page.gguf: name one"):
        find_model(tmp_path)
