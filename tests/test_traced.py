"""Programs that trace a model: export, compile, vmap, the meta device, ONNX. All equal to eager."""

import pytest
import torch

from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.qwen3_next import NextConfig
from qwen_nb.windows import WindowConfig

SIZES = dict(
    vocab_size=90,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
MIXED = SIZES | dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    full_attention_interval=2,
    partial_rotary_factor=0.5,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
PACKAGED = ["qwen1", "qwen2", "qwen3", "qwen3_moe", "qwen3_5"]
SELDOM = [pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "windows", "qwen3_next")]
ALL = [*(name for name in PACKAGED if name != "qwen2"), *SELDOM]


def opened(name):
    torch.manual_seed(0)
    if name == "windows":
        return Qwen(WindowConfig(**SIZES, windows=[None, 5])).eval()
    if name == "qwen3_next":
        return Qwen(NextConfig(**MIXED)).eval()
    return Qwen.from_pretrained(None if name == "qwen3" else packaged_model(name), torch.float32)


def ids_of(model, n=40, rows=1):
    ids = torch.arange(n * rows).view(rows, n)
    return ids % model.config.vocab_size


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.fixture(scope="module", params=ALL)
def model(request):
    with torch.no_grad():
        yield opened(request.param)


def test_exported_with_an_open_length(model):
    "Past the training length of Qwen1 too, and wider than the window."
    s = torch.export.Dim("s", min=2, max=512)
    program = torch.export.export(model, (ids_of(model),), dynamic_shapes=({1: s},)).module()
    for n in (2, 40, 77, 300):
        close(program(ids_of(model, n)), model(ids_of(model, n)))


def test_vmap_and_meta(model):
    ids = ids_of(model, 12, 2)
    weights = dict(model.named_parameters())

    def one(row):
        return torch.func.functional_call(model, weights, (row[None],))[0]

    close(torch.func.vmap(one)(ids), model(ids))
    with torch.device("meta"):
        planned = Qwen(model.config)
    found = planned(torch.zeros(1, 8, dtype=torch.long, device="meta"))
    assert found.shape == (1, 8, model.config.vocab_size)


@torch.no_grad()
def test_compiled_in_one_piece():
    model, ids = opened("qwen3"), torch.arange(24)[None]
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="eager")(ids), model(ids))


@pytest.mark.slow
def test_each_compiled_in_one_piece(model):
    torch._dynamo.reset()
    ids = ids_of(model, 24)
    close(torch.compile(model, fullgraph=True, backend="eager")(ids), model(ids))


def test_a_hybrid_with_padding_compiled_in_one_piece():
    "Equal to eager for any padding; several documents in a row stop it, with a sentence."
    model, ids = opened("qwen3_5"), torch.arange(48).view(2, 24)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for gap in (7, 3, 0):
        mask = torch.ones_like(ids)
        mask[1, :gap] = 0
        with torch.no_grad():
            close(compiled(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()])
    layer, x = model.model.layers[0].linear_attn, torch.randn(1, 6, model.config.hidden_size)
    several = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    several = several & (torch.arange(6) < 3)[:, None].eq(torch.arange(6) < 3)
    with torch.no_grad(), pytest.raises(RuntimeError, match="several documents.*without compile"):
        torch.compile(layer, fullgraph=True, backend="eager")(x, several)


@pytest.mark.slow
def test_exported_as_it_stands_and_with_padding(model):
    fixed = torch.export.export(model, (ids_of(model),)).module()
    close(fixed(ids_of(model)), model(ids_of(model)))
    b, s = torch.export.Dim("b", min=2, max=16), torch.export.Dim("s", min=2, max=512)
    ids = ids_of(model, 30, 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    shapes = {0: b, 1: s}
    program = torch.export.export(model, (ids, mask), dynamic_shapes=(shapes, shapes)).module()
    ids, mask = ids_of(model, 41, 3), torch.ones(3, 41, dtype=torch.long)
    mask[2, :9] = 0
    close(program(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()])


@pytest.mark.slow
def test_compiled_by_inductor(model):
    torch._dynamo.reset()
    ids = ids_of(model, 24)
    try:
        found = torch.compile(model, fullgraph=True)(ids)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip("there is no C++ compiler")
    close(found, model(ids))


@pytest.mark.slow
def test_onnx(model, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    s = torch.export.Dim("s", min=2, max=512)
    program = torch.onnx.export(
        model, (ids_of(model),), dynamo=True, dynamic_shapes=({1: s},), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for n in (2, 77, 300):
        found = session.run(None, {"input_ids": ids_of(model, n).numpy()})[0]
        close(torch.tensor(found), model(ids_of(model, n)))


def test_packed_documents_stop_an_exported_hybrid():
    "An exported program cannot take documents apart: it must not go on as if there were one."
    layer = opened("qwen3_5").model.layers[0].linear_attn
    x = torch.randn(1, 6, layer.in_proj_qkv.in_features)
    one = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    several = one & (torch.arange(6) < 3)[:, None].eq(torch.arange(6) < 3)

    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, mask):
            return self.layer(x, mask)

    with torch.no_grad():
        program = torch.export.export(Alone().eval(), (x, one)).module()
        close(program(x, one), layer(x, one))
        with pytest.raises(RuntimeError, match="several documents"):
            program(x, several)


@pytest.mark.parametrize("bad", [[[0, 90]], [[-1, 3]]])
def test_ids_out_of_range_are_refused_all_the_same(bad):
    with pytest.raises(ValueError, match="expected 0 to 89"):
        Qwen(QwenConfig(**SIZES))(torch.tensor(bad))


def test_where_it_lies_and_what_it_is():
    kinds = dict(
        qwen1="qwen", qwen2="qwen2", qwen3="qwen3", qwen3_moe="qwen3_moe", qwen3_5="qwen3_5_text"
    )
    for name, kind in kinds.items():
        model = opened(name)
        assert (model.dtype, model.device.type) == (torch.float32, "cpu")
        assert model.config.model_type == kind
    assert opened("qwen3_next").config.model_type == "qwen3_next"
    assert opened("qwen3").bfloat16().dtype == torch.bfloat16
    with torch.device("meta"):
        assert Qwen(QwenConfig(**SIZES)).device.type == "meta"
