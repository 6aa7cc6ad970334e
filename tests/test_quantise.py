"""Weights in 8 and 4 bits: codes, kernels against the plain product, whole models from their files,
folders of codes, and what is refused."""

import copy
import json
import random
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qwen_nb import packed
from qwen_nb.cli import main
from qwen_nb.coded import QuantisedEmbedding, QuantisedLinear, QuantisedMatrix
from qwen_nb.fast import why_plain
from qwen_nb.fixed import FixedCache
from qwen_nb.generation import generate
from qwen_nb.gptq import as_stored, gptq, gptq_codes
from qwen_nb.hub import find_model, read_json
from qwen_nb.inspect import packaged_model
from qwen_nb.lean import LeanStep
from qwen_nb.model import Qwen
from qwen_nb.packed import KERNELS, digits_of, pack_nibbles, unpack_nibbles, works
from qwen_nb.quantise import from_codes, from_codes_with_zero, to_codes, to_codes_with_zero
from qwen_nb.quantised_model import (
    from_words,
    held_bytes,
    open_quantised,
    quantise_model,
    rounded_layers,
    save_quantized,
    to_words,
)
from qwen_nb.writing import Context

IDS = torch.tensor([[5, 17, 3, 250, 81, 7, 7, 44, 9]])


def random_matrix(outputs, inputs, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=g)


def layer_of(w, bits, group=None):
    dtype = torch.bfloat16 if bits == 4 else torch.float32
    codes, scales = to_codes(w, bits, group, dtype)
    return QuantisedLinear(codes if bits == 8 else pack_nibbles(codes), scales)


# ---- codes


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [None, 8, 32])
def test_no_weight_is_off_by_more_than_half_a_step(bits, group):
    w = random_matrix(7, 64) * torch.logspace(-6, 6, 7)[:, None]
    w[2] = 0
    codes, scales = to_codes(w, bits, group)
    most = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and codes.abs().max() == most
    assert scales.shape == (7, 64 // (group or 64))
    apart = (from_codes(codes, scales) - w).abs()
    half = scales.repeat_interleave(group or 64, 1) / 2
    assert (apart <= half * 1.0001).all()
    assert not from_codes(codes, scales)[2].any()
    with pytest.raises(ValueError, match="64 inputs cannot be cut into groups of 24"):
        to_codes(w, bits, 24)


def test_with_a_zero_point_zero_comes_back_and_no_code_is_outside():
    w = torch.cat([random_matrix(4, 32), random_matrix(4, 32).abs() + 3, torch.zeros(1, 32)])
    w[:, 5] = 0
    codes, scales, zeros = to_codes_with_zero(w, 4, 16)
    back = from_codes_with_zero(codes, scales, zeros)
    assert codes.max() <= 15 and codes.dtype == torch.uint8 and (zeros == zeros.round()).all()
    assert 0 <= zeros.min() and zeros.max() <= 15
    assert not back[:, 5].any()
    # the zero is rounded, so that the end may be cut by half a step more
    assert ((back - w).abs() <= scales.repeat_interleave(16, 1) * 1.001).all()


def test_nibbles_and_words_as_compressed_tensors_lays_them():
    codes = torch.arange(-8, 8, dtype=torch.int8)[None].repeat(3, 1)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    for bits, own in ((4, pack_nibbles(codes)), (8, codes)):
        words = to_words(own)
        assert words.dtype == torch.int32
        each = 32 // bits
        for j in range(16):  # by the format's words: place j of a word lies in bits j * bits
            place = words[:, j // each].long() >> bits * (j % each) & 2**bits - 1
            assert (place - 2 ** (bits - 1) == codes[:, j]).all()
        assert torch.equal(from_words(words, bits), own)


# ---- products


def test_digits_say_the_number_and_fit_a_byte():
    x = random_matrix(6, 50) * torch.logspace(-20, 20, 6)[:, None]
    x[1, 3] *= 1000
    x[4] = 0
    digits, size = digits_of(x)
    assert digits.abs().max() <= 64 and (digits == digits.round()).all()
    powers = torch.tensor([1.0, 126.0, 126.0**2], dtype=torch.float64)[:, None, None]
    again = (digits.double() / powers).sum(0) * size.double() / 63
    assert ((again - x).abs() <= size * 6e-7).all()


SHAPES = [(64, 128), (16, 32), (48, 96), (200, 64), (4096 + 64, 32)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_the_kernel_equals_the_plain_product_within_its_bound(bits, shape, rows):
    kind = KERNELS[0] if bits == 8 else KERNELS[1]
    if not works(kind):
        pytest.skip(f"{kind.__name__} is not here")
    layer = layer_of(random_matrix(*shape), bits, 32 if bits == 4 else None)
    x = random_matrix(rows, shape[1], 1)
    x[:, 3] *= 100
    wanted, w = layer(x), layer.plain_weight()
    before = layer.stored()
    layer.pack()
    if shape[0] % 16 and bits == 4:
        assert layer.kernel is None  # 200 outputs: the plain product stays
        return
    assert type(layer.kernel) is kind and layer.codes is None
    size, weight_sum = x.abs().amax(-1, keepdim=True), w.abs().sum(1)
    if bits == 8:  # each input is off by half of its last digit; float32's own sums
        bound = size * weight_sum * 6e-7 + (x.abs() @ w.abs().T) * 1e-6
    else:  # bfloat16: the inputs, the weights and the result
        bound = (x.abs() @ w.abs().T) * 2.0**-7 + wanted.abs() * 2.0**-8
    assert ((layer(x) - wanted).abs() <= bound).all()
    for found, kept in zip(layer.stored(), before):
        assert torch.equal(found, kept)


def test_rows_do_not_touch_each_other():
    layer = layer_of(random_matrix(64, 64), 8).pack()
    x = random_matrix(5, 64, 1)
    alone = torch.cat([layer(row[None]) for row in x])
    x[4] *= 1e4
    assert torch.equal(layer(x)[:4], alone[:4])


def test_a_kernel_that_is_wrong_or_gone_is_not_used(monkeypatch):
    class Wrong(packed.ThreeDigits):
        def __call__(self, x):
            return super().__call__(x) * 1.01

    class Gone(packed.ThreeDigits):
        def __init__(self, codes, scales):
            self.product = torch.ops.quantized.no_such_product

    assert not works(Wrong) and not works(Gone)
    monkeypatch.setattr(packed, "KERNELS", (Wrong, Gone))
    layer = layer_of(random_matrix(64, 64), 8).pack()
    assert layer.kernel is None
    assert layer(torch.ones(1, 64)).shape == (1, 64)


def test_other_dtypes_and_places_keep_codes_and_scales():
    for bits in (8, 4):
        layer = layer_of(random_matrix(32, 64), bits, 32 if bits == 4 else None)
        layer.bias = nn.Parameter(torch.ones(32))
        x, w, scales = random_matrix(2, 3 * 64).view(2, 3, 64), layer.plain_weight(), layer.scales
        plain = F.linear(x, w, layer.bias)
        layer.pack().to(torch.bfloat16)
        assert layer.bias.dtype == torch.bfloat16
        assert torch.equal(layer.stored()[1], scales)
        y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16 and y.shape == plain.shape
        assert ((y - plain).norm() / plain.norm()) < 2e-2
        assert layer(x[:, :0].bfloat16()).shape == (2, 0, 32)
        assert torch.equal(layer.state_dict()["scales"], scales)


def test_the_embedding_gives_the_rows_of_the_plain_weight():
    for bits in (8, 4):
        layer = layer_of(random_matrix(40, 64), bits, 32 if bits == 4 else None)
        rows = QuantisedEmbedding(*layer.stored(), torch.float32)
        ids = torch.tensor([[3, 39, 0], [3, 3, 1]])
        assert torch.equal(rows(ids), F.embedding(ids, layer.plain_weight()))


# ---- whole models


def dense_of(quantised, name):
    "The plain model with the weights that the codes stand for."
    model = Qwen.from_pretrained(name and packaged_model(name), torch.float32)
    for path, m in quantised.named_modules():
        if isinstance(m, QuantisedMatrix) and path != "lm_head":
            model.get_submodule(path).weight.data.copy_(m.plain_weight())
    if "lm_head" in dict(model.named_modules()):
        model.lm_head.weight.data.copy_(quantised.lm_head.plain_weight())
    return model


FAMILIES = ["qwen1", "qwen2", None, "qwen3_moe", "qwen3_5"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_packaged_models(tmp_path, name, bits):
    folder = name and packaged_model(name)
    model = Qwen.from_pretrained(folder, torch.float32, quantize=f"int{bits}")
    left = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    assert not rounded_layers(model)
    assert all("proj" not in n or n.endswith(("_a", "_b")) for n in left)
    dense = dense_of(model, name)
    wanted, found = dense(IDS), model(IDS)
    apart = ((found - wanted).norm() / wanted.norm()).item()
    assert apart < (1e-4 if bits == 8 else 5e-2)
    if bits == 8:
        assert torch.equal(
            generate(model, IDS, 8, temperature=0.0), generate(dense, IDS, 8, temperature=0.0)
        )

    save_quantized(model, tmp_path / "out")
    again = Qwen.from_pretrained(tmp_path / "out", torch.float32)
    assert torch.equal(again(IDS), found)
    assert again.bits == bits
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written < 1.15 * held_bytes(model)
    with pytest.raises(FileExistsError, match="holds weights already"):
        save_quantized(again, tmp_path / "out")


def test_from_file_equals_from_model():
    folder = find_model(None)
    raw = read_json(folder, "config.json")
    for bits in (8, 4):
        a = open_quantised(Qwen, folder, raw, torch.float32, quantize=f"int{bits}", packed=False)
        b = quantise_model(Qwen.from_pretrained(None, torch.float32), bits, packed=False)
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())
        c = Qwen.from_pretrained(None, quantize=f"int{bits}")
        assert c.dtype == torch.bfloat16 and c(IDS).dtype == torch.bfloat16


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="quantize is 'int5'; expected one of int8, int4"):
        Qwen.from_pretrained(None, quantize="int5")
    model = Qwen.from_pretrained(None, quantize="int8")
    out = save_quantized(model, tmp_path / "out")
    with pytest.raises(ValueError, match="holds 8 bits a weight and quantize is 'int4'"):
        Qwen.from_pretrained(out, quantize="int4")
    raw = json.loads((out / "config.json").read_text())
    weights = raw["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["symmetric"] = False
    (out / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="in another way than symmetrically"):
        Qwen.from_pretrained(out)
    weights["symmetric"], raw["num_hidden_layers"] = True, 5
    (out / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="tensors missing"):
        Qwen.from_pretrained(out)


# ---- GPTQ


def by_inverses(w, H, rounding):
    "The formula of arXiv:2210.17323 as it stands: an inverse for each column."
    w, codes = w.double().clone(), []
    for i in range(len(w)):
        inverse = torch.linalg.inv(H.double()[i:, i:])
        code = rounding(w[i])
        w[i:] += inverse[:, 0] / inverse[0, 0] * (code - w[i])
        codes.append(code)
    return torch.stack(codes)


@pytest.mark.parametrize("seed", range(5))
def test_gptq_equals_explicit_inverses_and_lowers_the_error(seed):
    x = random_matrix(300, 12, seed) @ random_matrix(12, 12, seed + 50)
    H, w = x.double().T @ x.double(), random_matrix(6, 12, seed + 100)
    codes, scales = gptq(w, H, bits=4, damp=0.0)
    for row, scale, found in zip(w, scales[:, 0].double(), codes):
        by_hand = by_inverses(row, H, lambda v: (v / scale).round().clamp(-7, 7) * scale)
        assert torch.equal(found.double(), (by_hand / scale).round())
    updated, nearest = from_codes(codes, scales), from_codes(*to_codes(w, 4))
    assert (x @ (updated - w).T).norm() < 0.9 * (x @ (nearest - w).T).norm()
    alone, _ = gptq(w, torch.eye(12), bits=4)
    assert torch.equal(alone, to_codes(w, 4)[0])
    for dead in (torch.zeros(12, 12), H * 0 + 1):  # inputs that are always zero, always equal
        assert torch.isfinite(from_codes(*gptq(w, dead, 4, 4))).all()


@pytest.mark.parametrize("name", [None, "qwen3_moe", "qwen3_5"])
def test_gptq_of_whole_models(name):
    folder = name and packaged_model(name)
    model = Qwen.from_pretrained(folder, torch.float32)
    codes = gptq_codes(model, [IDS, IDS.flip(1)], 4)
    made = Qwen.from_pretrained(folder, torch.float32)
    quantise_model(made, 4, as_stored(codes, 4), packed=False)
    for layer in codes:  # the codes say what the model has become
        found, wanted = made.get_submodule(layer), model.get_submodule(layer)
        assert torch.equal(found.plain_weight(), wanted.weight)
    assert torch.isfinite(made(IDS)).all()


# ---- commands


def run(*argv):
    "The command's exit status."
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    return end.value.code


def test_the_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Max is in the attic.\nAnna has the ball.\n" * 40)
    model = str(find_model(None))
    for more in ([], ["--bits", "4"], ["--bits", "4", "--gptq", str(text)]):
        out = tmp_path / f"out{len(more)}"
        assert run("quantize", model, str(out), *more) == 0
        assert "of what it was" in capsys.readouterr().err
        assert (
            run(
                "generate",
                "Max is in the",
                "--model",
                str(out),
                "--greedy",
                "--max-new-tokens",
                "4",
            )
            == 0
        )
        assert capsys.readouterr().out.strip()
    assert run("quantize", model, str(tmp_path / "out0")) == 2
    assert "holds weights already" in capsys.readouterr().err
    text.write_text("short")
    assert run("quantize", model, str(tmp_path / "new"), "--gptq", str(text)) == 2
    assert "GPTQ learns from some pages" in capsys.readouterr().err
    assert run("generate", "Max is in the", "--quantize", "int8", "--greedy") == 0


# ---- memory


PEAK = """
import sys, torch
from pathlib import Path
from qwen_nb.lean import LeanStep
from qwen_nb.model import Qwen
from qwen_nb.quantised_model import held_bytes
Qwen.from_pretrained(None, quantize=sys.argv[2])   # all modules are there, all kernels tried
def own(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if key in l)
    return int(line.split()[1]) * 1024
import threading, time
most, stop = [0], []
def watch():
    while not stop:
        most[0] = max(most[0], own("RssAnon")); time.sleep(.002)
torch.set_num_threads(1)
before = own("RssAnon")
t = threading.Thread(target=watch); t.start()
model = Qwen.from_pretrained(sys.argv[1], quantize=sys.argv[2])
stop.append(1); t.join()
print(most[0] - before, held_bytes(model))
"""


def big_checkpoint(folder, **sizes):
    "A random checkpoint, in bfloat16."
    from qwen_nb.durable import save_pretrained
    from qwen_nb.model import QwenConfig

    torch.manual_seed(0)
    model = Qwen(QwenConfig(**sizes)).to(torch.bfloat16)
    return save_pretrained(model, folder)


SIZES = {  # many matrices, whose working copies could leave holes; and two that are most of it all
    "layers": dict(intermediate_size=2048, num_hidden_layers=24, vocab_size=4096),
    "head": dict(
        intermediate_size=1024,
        num_hidden_layers=4,
        vocab_size=65536,
        tie_word_embeddings=False,
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_peak_memory_of_a_load(tmp_path, quantize, size):
    """Some rows at work, and no more than one large matrix twice, while little else is there.

    Where what was freed stays with the allocator, "layers" takes 1.1 to 1.3 times what it holds,
    each time another; where a head comes last and is copied twice, "head" takes 1.5 to 1.9."""
    folder = big_checkpoint(tmp_path / "m", hidden_size=512, **SIZES[size])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), quantize],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, held = map(int, done.stdout.split())
    assert peak < 1.1 * held, f"{peak:,} bytes for a model that holds {held:,}"


@torch.no_grad()
def test_an_embedding_that_is_the_head_has_no_codes_of_its_own_in_four_bits(tmp_path):
    if not works(KERNELS[1]) or packed.block_size() == 1:
        pytest.skip("the kernel, or its order, is not here")
    plain = Qwen.from_pretrained(None, torch.float32)
    apart = quantise_model(copy.deepcopy(plain), 4, packed=False)
    model = quantise_model(plain, 4)
    rows, head = model.model.embed_tokens, model.lm_head
    assert rows.kernel is head.kernel is not None and rows.codes is rows.scales is None
    each = torch.arange(rows.num_embeddings)
    assert torch.equal(rows(each), apart.model.embed_tokens(each))
    assert torch.equal(rows.plain_weight(), apart.model.embed_tokens.plain_weight())
    found, codes = held_bytes(model), rows.stored()[0].nbytes
    assert held_bytes(copy.deepcopy(model)) == found
    low = copy.deepcopy(model).to(torch.bfloat16)  # opened and laid out again
    assert low.model.embed_tokens.kernel is low.lm_head.kernel
    for name, t in apart.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    again = Qwen.from_pretrained(save_quantized(model, tmp_path / "out"), torch.float32)
    assert again.model.embed_tokens.codes is not None  # until the head is used
    assert torch.equal(again(IDS), model(IDS))
    assert again.model.embed_tokens.codes is None and held_bytes(again) == found
    head.unpack()  # alone
    assert torch.equal(rows(each), apart.model.embed_tokens(each))
    assert held_bytes(model) > found + codes


def test_rows_are_found_in_blocks():
    for block in (32, 64):
        codes = torch.randint(-8, 8, (3 * block, 10), dtype=torch.int8)
        layout = packed.in_blocks(pack_nibbles(codes), block)
        rows = torch.randint(0, 3 * block, (50,))
        assert torch.equal(packed.rows_of_blocks(layout, block, rows), codes[rows])


# ---- the fast way


FAST_KINDS = ["qwen1", "qwen2", "qwen3", "yarn", "linear", "windows"]
FAST_KINDS += ["mixture", "shared", "qwen4_exp"]
MIXTURES = ("mixture", "shared", "qwen4_exp")


def random_codes(kind, seed, bits, dtype=torch.float32):
    "A tiny model of a family, in codes; widths that a kernel takes, and some that none does."
    from test_fast import random_config, random_prompts

    rng = random.Random(f"codes {kind} {seed}")
    torch.manual_seed(seed)
    config = random_config(kind, rng)
    if kind == "qwen4_exp":  # its other sizes hang on these
        config.hidden_size = config.hidden_size if seed % 3 == 0 else 64
    elif seed % 3:  # the kernel for 4 bits wants groups of 32 inputs and 16 outputs
        config.hidden_size = 64
        config.intermediate_size = rng.choice([64, 96])
        config.num_attention_heads = config.num_key_value_heads = 2
        config.head_dim = 32
    model = Qwen(config).eval()
    for p in model.parameters():
        p.data = p.data + torch.randn_like(p) * 0.3
    ids, mask = random_prompts(model, rng)
    return quantise_model(model.to(dtype), bits), ids, mask


def kernels_of(model):
    return {type(m.kernel) for m in model.modules() if isinstance(m, QuantisedMatrix)}


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_in_8_bits_the_fast_way_writes_the_same_ids(kind):
    with_kernel = 0
    for seed in range(8):
        model, ids, mask = random_codes(kind, seed, 8)
        assert why_plain(model) is None
        with_kernel += KERNELS[0] in kernels_of(model)
        settings = dict(stop_ids=())
        if seed % 2:
            settings |= dict(temperature=0.9, top_k=20, seed=seed, repetition_penalty=1.3)
        plain = generate(model, ids, 60, mask, fast=False, **settings)
        fast = generate(model, ids, 60, mask, fast=True, **settings)
        assert torch.equal(plain, fast), f"{kind}, seed {seed}"
    assert with_kernel or not works(KERNELS[0])


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_where_inputs_are_rounded_the_fast_way_differs_in_ties_alone(kind):
    from test_fast import nearly_best

    for seed in range(4):
        model, ids, mask = random_codes(kind, seed, 4)
        fast = generate(model, ids, 30, mask, stop_ids=(), fast=True)
        if kind in MIXTURES:  # a tie between experts changes more than a rounding
            assert fast.shape == (len(ids), ids.shape[1] + 30)
            continue
        assert nearly_best(model, fast, mask, ids.shape[1], 0.02), f"{kind}, seed {seed}"
        worst = fast.clone()
        worst[:, ids.shape[1]] = model(ids, mask)[:, -1].argmin(-1)
        assert not nearly_best(model, worst, mask, ids.shape[1], 0.02), "the worst token is seen"


def errors_in_bfloat16(kind, seed, bits, hurt=None):
    """How far the logits of plain and of lean steps are from those of the same weights in float32,
    as shares of these: two numbers."""
    model, ids, mask = random_codes(kind, seed, bits, torch.bfloat16)
    batch, prompt, new = *ids.shape, 20
    text = generate(model, ids, new, mask, stop_ids=(), fast=True)
    plain, lean, exact = (
        Context(m, batch, prompt + new, mask) for m in (model, model, as_floats(model))
    )
    lean.cache = FixedCache(model.config, batch, prompt + new, torch.bfloat16)
    for context in (plain, lean, exact):
        context.read(text[:, :prompt])
    step, errors, size = LeanStep(model, lean.cache, mask), torch.zeros(2), 0.0
    if hurt:
        hurt(step)
    for i in range(prompt, prompt + new):
        right = exact.read(text[:, i : i + 1])
        found = plain.read(text[:, i : i + 1]), step(text[:, i])
        errors += torch.stack([(logits.float() - right).square().sum() for logits in found])
        size += right.square().sum()
    return (errors / size).sqrt()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [k for k in FAST_KINDS if k not in MIXTURES])
@torch.inference_mode()
def test_in_bfloat16_lean_steps_are_as_near_the_weights_as_plain_ones(kind, bits):
    "Both round; neither is the other's measure. Over four seeds the lean one loses no more."
    errors = torch.stack([errors_in_bfloat16(kind, seed, bits) for seed in range(4)])
    plain, lean = errors.square().mean(0).sqrt().tolist()
    assert lean < 1.1 * plain, (
        f"{kind}: plain steps are off by {plain:.4f}, lean ones by {lean:.4f}"
    )

    def too_large(step):
        step.last_norm.mul_(1.1)

    assert errors_in_bfloat16(kind, 1, bits, too_large)[1] > 1.1 * plain, "10 % too much is seen"


@pytest.mark.parametrize("bits, limit", [(8, 1e-5), (4, 3e-2)])
def test_a_lean_step_of_codes_is_near_the_dequantised_weights(bits, limit):
    for seed in (1, 2, 4):
        model, ids, mask = random_codes("qwen3", seed, bits)
        plain = quantise_model(as_floats(model), bits, packed=False)
        cache = FixedCache(model.config, 1, 40)
        with torch.inference_mode():
            model(ids[:1], cache=cache)
            step, written = LeanStep(model, cache), ids[:1]
            for new in (3, 5, 7):
                found = step(torch.tensor([new]))
                written = torch.cat([written, torch.tensor([[new]])], 1)
                wanted = plain(written)[:, -1]
                assert (found - wanted).norm() < limit * wanted.norm()


def as_floats(model):
    "The plain model that the codes stand for, in float32."
    config = copy.copy(model.config)
    config.tie_word_embeddings = False
    floats = Qwen(config).eval()
    weights = {n: m.plain_weight() for n, m in model.named_modules() if hasattr(m, "plain_weight")}
    state = {f"{n}.weight": w for n, w in weights.items()} | dict(model.named_parameters())
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    floats.load_state_dict(state)
    return floats


def test_layers_side_by_side_and_the_functions_that_ask():
    for bits in (8, 4):
        group = 32 if bits == 4 else None
        layers = [layer_of(random_matrix(n, 64, n), bits, group) for n in (32, 64)]
        for packs in (False, True):
            if packs:
                [layer.pack() for layer in layers]
            x, bias, start = random_matrix(3, 64), torch.ones(96), random_matrix(3, 96)
            both = torch.cat([layer.weight for layer in layers])
            wanted = torch.cat([layer(x) for layer in layers], -1)
            assert torch.equal(F.linear(x, both), wanted)
            assert torch.equal(F.linear(x, both, bias), wanted + 1)
            assert torch.equal(torch.addmm(start, x, both.t()), start + wanted)
    rows = QuantisedEmbedding(*layers[0].unpack().stored())
    assert torch.equal(F.embedding(torch.tensor([3, 1]), rows.weight), rows(torch.tensor([3, 1])))
    with pytest.raises(TypeError, match="relu"):
        torch.relu(both)


def test_compile_says_that_it_takes_no_codes(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    model = Qwen.from_pretrained(None, quantize="int8")
    with pytest.raises(ValueError, match="codes: leave out fast"):
        generate(model, IDS, 2, fast="compile")


# ---- many rows, and waiting


def test_two_digits_where_bfloat16_has_no_more():
    x = random_matrix(32, 2048).bfloat16()
    assert packed.enough_digits(x) == 2
    assert packed.enough_digits(x[:1]) == packed.enough_digits(x.float()) == 3
    x[3, 5] = 1000.0  # the others of its row would keep few bits
    assert packed.enough_digits(x) == 3
    layer = layer_of(random_matrix(48, 2048, 1), 8)
    for rows in (x, random_matrix(32, 2048, 2).bfloat16()):
        exact = F.linear(rows.double(), layer.plain_weight().double())
        layer.pack()
        apart = (layer(rows).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        layer.unpack()
        assert apart.max() < 2.0**-8


@pytest.mark.parametrize("group", [32, 64])
def test_four_bits_opened_for_many_rows(group, monkeypatch):
    layer = layer_of(random_matrix(128, 256), 4, group)
    x, w = random_matrix(100, 256, 1).bfloat16(), layer.plain_weight()
    if not works(KERNELS[1]) or layer.pack().kernel.block == 1:
        pytest.skip("the kernel, or its order, is not here")
    assert torch.equal(packed.open_weight(layer.kernel), w.bfloat16().T)
    for pays in (True, False):
        monkeypatch.setattr(packed, "bfloat16_pays", lambda: pays)
        bound = (x.float().abs() @ w.abs().T) * 2.0**-7
        assert ((layer(x).float() - F.linear(x.float(), w)).abs() <= bound).all()


def test_blocks_are_as_the_kernels_function_lays_them():
    if not works(KERNELS[1]) or packed.block_size() == 1:
        pytest.skip("the kernel, or its order, is not here")
    block = packed.block_size()
    codes = torch.randint(-8, 8, (2 * block, 96), dtype=torch.int8)
    own = packed.in_blocks(pack_nibbles(codes), block)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 2)
    assert torch.equal(own.flatten(), theirs.flatten())
    assert torch.equal(packed.out_of_blocks(own, block), codes)


def test_a_stored_folder_waits_for_its_first_use(tmp_path):
    for quantize in ("int8", "int4"):
        made = Qwen.from_pretrained(None, quantize=quantize)
        again = Qwen.from_pretrained(save_quantized(made, tmp_path / quantize))
        assert kernels_of(again) == {type(None)} != kernels_of(made)
        found = {}

        def read(i):
            found[i] = again(IDS)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert all(torch.equal(logits, made(IDS)) for logits in found.values()) and len(found) == 4
        assert kernels_of(again) == kernels_of(made)
        waiting = Qwen.from_pretrained(tmp_path / quantize)
        for name, t in waiting.state_dict().items():
            assert torch.equal(t, made.state_dict()[name]), name
        assert torch.equal(*(generate(m, IDS, 9, fast=True) for m in (waiting, made)))


def test_a_quantised_model_is_not_saved_as_one_of_floats(tmp_path):
    "Its norms alone would be written, and nobody could open them."
    from qwen_nb.durable import save_pretrained

    with pytest.raises(ValueError, match="codes of 8 bits.*save_quantized"):
        save_pretrained(Qwen.from_pretrained(quantize="int8"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
