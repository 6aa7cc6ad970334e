"""Quantised checkpoints as others write them, packed here in NumPy by the formats' own rules."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qwen_nb.hub import open_weights
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.quantised import dequantised
from qwen_nb.real import verify_model

FP8 = torch.float8_e4m3fn


def is_linear(name):
    return name.endswith("proj.weight")


def nibbles(q, order):
    "(rows, columns) of 0 to 15 → (rows, columns / 8) int32; bits 4 i hold column order[i]."
    q = q.astype(np.uint32).reshape(len(q), -1, 8)
    packed = np.zeros(q.shape[:2], np.uint32)
    for i, column in enumerate(order):
        packed |= q[:, :, column] << np.uint32(4 * i)
    return torch.from_numpy(packed.view(np.int32).copy())


IN_ORDER, EVEN_FIRST = range(8), (0, 2, 4, 6, 1, 3, 5, 7)


def four_bits(w, size):
    "Numbers 0 to 15, zeros 1 to 15 and scales, (inputs, outputs) and (groups, outputs)."
    w = w.float().numpy().T
    groups = w.reshape(-1, size, w.shape[1])
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    scales = ((high - low) / 15 + 1e-4).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 1, 15).astype(int)
    q = np.round(groups / scales[:, None].astype(np.float32)) + zeros[:, None]
    return np.clip(q, 0, 15).astype(int).reshape(w.shape), zeros, scales


def by_four_bits(q, zeros, scales, groups):
    "(outputs, inputs): what the formats say that these numbers are."
    return torch.from_numpy(scales[groups].astype(np.float32) * (q - zeros[groups])).T


def gptq(w, size=32, sort=True):
    q, zeros, scales = four_bits(w, size)
    groups = np.arange(len(q)) // size
    if sort:  # desc_act: inputs of a group lie apart
        shuffled = np.random.default_rng(0).permutation(len(q))
        q, groups = q[shuffled], groups[shuffled]
    parts = dict(
        qweight=nibbles(q.T, IN_ORDER).T.contiguous(),
        qzeros=nibbles(zeros - 1, IN_ORDER),
        scales=torch.from_numpy(scales),
        g_idx=torch.from_numpy(groups.astype(np.int32)),
        bias=torch.zeros(q.shape[1], dtype=torch.float16),
    )
    return parts, by_four_bits(q, zeros, scales, groups)


def awq(w, size=32):
    q, zeros, scales = four_bits(w, size)
    parts = dict(
        qweight=nibbles(q, EVEN_FIRST),
        qzeros=nibbles(zeros, EVEN_FIRST),
        scales=torch.from_numpy(scales),
    )
    return parts, by_four_bits(q, zeros, scales, np.arange(len(q)) // size)


def fp8_blocks(w, block=48):
    "Squares that do not divide the matrix."
    w, scales = w.float(), torch.ones(-(-w.shape[0] // block), -(-w.shape[1] // block))
    q, back = torch.empty_like(w).to(FP8), torch.empty_like(w)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = w[here].abs().max() / 448
            q[here] = (w[here] / scales[i, j]).to(FP8)
            back[here] = q[here].float() * scales[i, j]
    return dict(weight=q, weight_scale_inv=scales), back


def rows_of(dtype, largest):
    def pack(w):
        scale = w.float().abs().amax(1, keepdim=True) / largest
        q = w.float() / scale
        q = (q if dtype == FP8 else q.round()).to(dtype)
        return dict(weight=q, weight_scale=scale.bfloat16()), q.float() * scale.bfloat16().float()

    return pack


def whole(w):
    scale = w.float().abs().max() / 448
    q = (w.float() / scale).to(FP8)
    parts = dict(weight=q, weight_scale=scale.reshape(1), input_scale=torch.ones(1))
    return parts, q.float() * scale


KINDS = {
    "fp8": (fp8_blocks, dict(quant_method="fp8", weight_block_size=[48, 48])),
    "fp8 rows": (
        rows_of(FP8, 448),
        dict(quant_method="compressed-tensors", format="float-quantized"),
    ),
    "fp8 whole": (whole, dict(quant_method="compressed-tensors", format="float-quantized")),
    "int8 rows": (
        rows_of(torch.int8, 127),
        dict(quant_method="compressed-tensors", format="int-quantized"),
    ),
    "gptq": (gptq, dict(quant_method="gptq", bits=4, group_size=32, desc_act=True)),
    "awq": (awq, dict(quant_method="awq", bits=4, group_size=32, version="gemm")),
}


def quantised_folder(folder, source, pack, said):
    "A copy of a model with packed layers; also the weights that it should open as."
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("qwen*", "*.jsonl"))
    stored, want = {}, {}
    for name, w in open_weights(source).items():
        if not is_linear(name):
            stored[name] = want[name] = w
            continue
        parts, want[name] = pack(w)
        layer = name.removesuffix(".weight")
        for part, t in parts.items():
            if part != "bias" or not layer.endswith(("q_proj", "k_proj", "v_proj")):
                stored[f"{layer}.{part}"] = t.contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | dict(quantization_config=said)))
    return want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sibling", ["", "qwen2", "qwen3_moe"])
def test_opens_as_its_numbers_say(kind, sibling, tmp_path, capsys):
    want = quantised_folder(tmp_path / "q", packaged_model() / sibling, *KINDS[kind])
    model = Qwen.from_pretrained(tmp_path / "q", dtype="float32")
    method = KINDS[kind][1]["quant_method"]
    assert f"quantised by {method} are opened as float32" in capsys.readouterr().err
    found = model.state_dict()
    for name, w in model.config.rename(want).items():
        assert torch.equal(found[name], w.float()), name
    assert {p.dtype for p in Qwen.from_pretrained(tmp_path / "q").parameters()} == {torch.bfloat16}


def test_a_quantised_folder_is_verified(tmp_path):
    pytest.importorskip("transformers")
    quantised_folder(tmp_path / "q", packaged_model(), *KINDS["awq"])
    assert verify_model(tmp_path / "q")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(quant_method="bitsandbytes"), r"quantised \(bitsandbytes"),
        (dict(quant_method="gptq", bits=3), r"quantised \(GPTQ\): 3 bits"),
        (dict(quant_method="awq", version="gemv"), r"quantised \(AWQ\): 4 bits, version gemv"),
        (dict(quant_method="compressed-tensors", format="pack-quantized"), "compressed-tensors"),
        (dict(quant_method="fp8"), "weight_block_size"),
        (dict(quant_method="fp8", weight_block_size=[128, 128]), "does not fit"),
        (None, "weight_block_size"),
    ],
)
def test_refused_by_name(change, said, tmp_path):
    quantised_folder(tmp_path / "q", packaged_model(), *KINDS["fp8"])
    path = tmp_path / "q/config.json"
    raw = json.loads(path.read_text()) | dict(quantization_config=change)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=said):
        Qwen.from_pretrained(tmp_path / "q")


def test_fp8_without_scales_is_refused():
    with pytest.raises(ValueError, match=r"quantised \(FP8\): w.weight has no w.weight_scale"):
        dequantised({"w.weight": torch.ones(2, 2).to(FP8)}, {})


def test_parts_that_do_not_fit_are_one_sentence():
    parts, _ = gptq(torch.randn(16, 64))
    stored = {f"a.{name}": t for name, t in parts.items()}
    said = dict(quantization_config=KINDS["gptq"][1])
    with pytest.raises(ValueError, match="no qzeros or no scales"):
        dequantised({k: t for k, t in stored.items() if k != "a.qzeros"}, said)
    with pytest.raises(ValueError, match="do not fit"):
        dequantised(stored | {"a.scales": torch.ones(1, 3)}, said)


def test_nothing_quantised_is_handed_on():
    stored = {"w": torch.ones(2)}
    assert dequantised(stored, {}) is stored
