"""Mixtures of experts against the reference: routing, both layouts, the balancing loss, what is
refused; tests/test_family.py varies the rest."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from qwen_nb.balance import expert_load, load_balancing_loss, router_logits, upcycle
from qwen_nb.compare import record
from qwen_nb.generation import generate
from qwen_nb.inspect import packaged_model
from qwen_nb.loading import family_config
from qwen_nb.mixture import CONFIGS, MoEConfig, count_active, expert_windows, moe_json
from qwen_nb.mlp import SwiGLU
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.moe import SparseMLP, mix_experts, route, unfuse
from qwen_nb.verify import rounding_steps

transformers = pytest.importorskip("transformers")

SIZE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
)


def random_model(family, **changes):
    torch.manual_seed(0)
    own = dict(shared_expert_intermediate_size=28) if family == "Qwen2Moe" else dict(head_dim=16)
    return getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**SIZE | own | changes)
    ).eval()


def near(ours, theirs, steps=64):
    return rounding_steps(ours, theirs).max() <= steps


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(
        json.dumps(
            {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
        )
    )


# ---- the layer


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_routing_equals_the_reference(dtype, norm_topk_prob):
    gate = (
        random_model("Qwen3Moe", norm_topk_prob=norm_topk_prob).to(dtype).model.layers[0].mlp.gate
    )
    logits, weights, chosen = gate(torch.randn(50, 48).to(dtype))
    w, c = route(logits, 2, norm_topk_prob)
    assert torch.equal(w, weights) and torch.equal(c, chosen) and w.dtype == dtype
    assert not torch.equal(route(logits, 2, not norm_topk_prob)[0], weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe"])
@torch.no_grad()
def test_layer_equals_the_reference(family, dtype):
    theirs = random_model(family).to(dtype)
    if dtype == torch.float64:
        theirs.set_experts_implementation("eager")
    ours = SparseMLP(48, 6, 2, 24, False, 28 if family == "Qwen2Moe" else None).to(dtype)
    ours.load_state_dict(unfuse(theirs.model.layers[0].mlp.state_dict()), strict=True)
    steps = 2 if dtype == torch.bfloat16 else 16
    for x in (torch.randn(1, 1, 48), torch.randn(2, 9, 48)):
        assert near(ours(x.to(dtype)), theirs.model.layers[0].mlp(x.to(dtype)), steps)
    ours.norm_topk_prob = True
    assert not near(ours(x.to(dtype)), theirs.model.layers[0].mlp(x.to(dtype)), steps)


@torch.no_grad()
def test_only_chosen_experts_are_called_and_positions_do_not_mix():
    torch.manual_seed(0)
    m, x = SparseMLP(16, 8, 2, 12, True), torch.randn(3, 7, 16)
    called = []
    for e, expert in enumerate(m.experts):
        expert.register_forward_hook(lambda _, args, out, e=e: called.append((e, len(args[0]))))
    y = m(x)
    assert sum(n for _, n in called) == 3 * 7 * 2 and len({e for e, _ in called}) == len(called)
    called.clear()
    assert near(m(x[0, 0]), y[0, 0]) and [n for _, n in called] == [1, 1]
    assert {e for e, _ in called} == set(route(m.gate(x[0, :1]), 2, True)[1][0].tolist())
    assert near(m(x.flip(1)), y.flip(1)) and m(x[:, :0]).shape == (3, 0, 16)
    every = torch.stack([e(x) for e in m.experts], -2)
    w, c = route(m.gate(x).flatten(0, 1), 2, True)
    want = torch.zeros(21, 8).scatter(1, c, w).view(3, 7, 8, 1).mul(every).sum(-2)
    assert near(y, want)


@torch.no_grad()
def test_cost_follows_the_active_experts():
    def flops(E, k, tokens=16):
        m, x = SparseMLP(16, E, k, 12), torch.randn(tokens, 16)
        with FlopCounterMode(display=False) as counter:
            m(x)
        return counter.get_total_flops() / tokens

    for E in (4, 16, 64):
        for k in (1, 3):
            assert flops(E, k) == 2 * (k * 3 * 16 * 12 + 16 * E)


def test_gradients_reach_router_and_chosen_experts_only():
    torch.manual_seed(0)
    m, x = SparseMLP(16, 8, 2, 12, True, 10), torch.randn(1, 16)
    m(x).square().sum().backward()
    chosen = set(route(m.gate(x), 2, True)[1][0].tolist())
    assert {
        e for e, expert in enumerate(m.experts) if expert.up_proj.weight.grad.any()
    } == chosen  # the others have one as well, of zeros
    assert m.gate.weight.grad.abs().sum() > 0 and m.shared_expert_gate.weight.grad.abs().sum() > 0
    w, c = (t.detach() for t in route(m.gate(x), 2, True))
    assert torch.autograd.gradcheck(
        lambda x: mix_experts([e.double() for e in m.experts], x, w.double(), c),
        torch.randn(1, 16, dtype=torch.float64, requires_grad=True),
    )


# ---- checkpoints


@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe"])
@torch.no_grad()
def test_both_layouts(family, tmp_path):
    reference, ids = random_model(family, mlp_only_layers=[1]), torch.randint(0, 97, (2, 30))
    for hub in (True, False):
        reference.save_pretrained(tmp_path / str(hub), save_original_format=hub)
        names = load_file(tmp_path / str(hub) / "model.safetensors").keys()
        assert ("model.layers.0.mlp.experts.3.up_proj.weight" in names) == hub and (
            "model.layers.0.mlp.experts.gate_up_proj" in names
        ) != hub
        ours = Qwen.from_pretrained(tmp_path / str(hub))
        assert type(ours.config) is MoEConfig and isinstance(ours.model.layers[1].mlp, SwiGLU)
        want = reference(ids).logits
        assert (ours(ids) - want).abs().max() <= 1e-5 * want.abs().max()
        assert torch.equal(
            generate(ours, ids, 8, temperature=0.0, stop_ids=()),
            reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
            ),
        )


@torch.no_grad()
def test_a_swapped_half_is_seen(tmp_path):
    reference, ids = random_model("Qwen3Moe"), torch.randint(0, 97, (1, 20))
    reference.save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.experts.gate_up_proj"
    save_file(
        tensors | {name: tensors[name].roll(24, 1).contiguous()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    want = reference(ids).logits
    assert (Qwen.from_pretrained(tmp_path)(ids) - want).abs().max() > 1e-3 * want.abs().max()


def test_fused_tensors_are_cut_into_views():
    stored = {
        "a.mlp.experts.gate_up_proj": torch.randn(3, 8, 5),
        "a.mlp.experts.down_proj": torch.randn(3, 5, 4),
        "a.mlp.gate.weight": torch.randn(3, 5),
        "b.mlp.down_proj.weight": torch.randn(2, 2),
    }
    cut = unfuse(stored)
    assert len(cut) == 9 + 2 and torch.equal(
        cut["a.mlp.experts.2.up_proj.weight"], stored["a.mlp.experts.gate_up_proj"][2, 4:]
    )
    assert (
        cut["a.mlp.experts.1.down_proj.weight"].data_ptr()
        == stored["a.mlp.experts.down_proj"][1].data_ptr()
    )
    assert unfuse(cut) == cut
    for t in (torch.zeros(3, 8), torch.zeros(3, 7, 5)):
        with pytest.raises(ValueError, match="gate_up_proj has shape"):
            unfuse({"experts.gate_up_proj": t})


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda t: t.pop("model.layers.0.mlp.experts.5.up_proj.weight"),
            "1 tensors missing.*experts.5.up_proj",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.experts.6.up_proj.weight": torch.zeros(24, 48)}
            ),
            "1 left over.*experts.6",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.zeros(5, 48)}),
            r"mlp.gate.weight has shape \(5, 48\)",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.experts.0.up_proj.weight_scale_inv": torch.zeros(1)}
            ),
            "left over.*weight_scale_inv",
        ),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, change, match):
    random_model("Qwen3Moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        Qwen.from_pretrained(tmp_path)


# ---- configs


@pytest.mark.parametrize(
    "family, changes, match",
    [
        ("qwen3_moe", dict(num_experts=..., num_local_experts=...), "num_experts missing"),
        ("qwen3_moe", dict(moe_intermediate_size=None), "moe_intermediate_size missing"),
        (
            "qwen2_moe",
            dict(shared_expert_intermediate_size=...),
            "shared_expert_intermediate_size missing",
        ),
        (
            "qwen2_moe",
            dict(shared_expert_intermediate_size=0),
            "shared_expert_intermediate_size is 0",
        ),
        (
            "qwen3_moe",
            dict(num_experts_per_tok=7),
            "num_experts_per_tok is 7, more than num_experts, 6",
        ),
        ("qwen3_moe", dict(num_experts_per_tok=0), "num_experts_per_tok is 0"),
        ("qwen3_moe", dict(num_local_experts="6"), "num_experts is '6'"),
        ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step is 0"),
        ("qwen3_moe", dict(mlp_only_layers="1"), "mlp_only_layers is '1'"),
        ("qwen3_moe", dict(mlp_only_layers=[True]), "mlp_only_layers"),
        ("qwen3_moe", dict(norm_topk_prob="yes"), "norm_topk_prob is 'yes'"),
        (
            "qwen3_moe",
            dict(layer_types=["sliding_attention"] * 3),
            "layer_types.*use_sliding_window decides",
        ),
        ("qwen2_moe", dict(layer_types=["sliding_attention"] * 3), "give no window"),
        (
            "qwen2_moe",
            dict(
                use_sliding_window=True, sliding_window=4, layer_types=None, max_window_layers="2"
            ),
            "max_window_layers is '2'",
        ),
        ("qwen3_moe", dict(use_sliding_window="on"), "use_sliding_window is 'on'"),
        ("qwen2_moe", dict(hidden_act="gelu"), "hidden_act"),
        ("qwen2_moe", dict(num_key_value_heads=3), "does not divide"),
    ],
)
def test_config_refused(tmp_path, family, changes, match):
    random_model({"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}[family]).save_pretrained(
        tmp_path
    )
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=match) as e:
        Qwen.from_pretrained(tmp_path)
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 300


def test_what_a_family_does_not_say():
    hub = SIZE | dict(
        model_type="qwen2_moe", shared_expert_intermediate_size=28
    )  # the released file has no qkv_bias
    c = family_config(hub)
    assert (c.qkv_bias, c.o_bias, c.qk_norm, c.norm_topk_prob, c.mlp_only_layers) == (
        True,
        False,
        False,
        False,
        (),
    )
    c = family_config(
        SIZE
        | dict(
            model_type="qwen3_moe",
            head_dim=16,
            norm_topk_prob=True,
            router_aux_loss_coef=0,
            shared_expert_intermediate_size=28,
        )
    )
    assert (
        c.qkv_bias,
        c.qk_norm,
        c.norm_topk_prob,
        c.router_aux_loss_coef,
        c.shared_expert_intermediate_size,
    ) == (False, True, True, 0, None)
    old, new = (
        SIZE | dict(model_type="qwen3_moe", head_dim=16),
        {"num_local_experts" if k == "num_experts" else k: v for k, v in SIZE.items()}
        | dict(model_type="qwen3_moe", head_dim=16),
    )
    assert family_config(old) == family_config(new) and set(CONFIGS) == {"qwen2_moe", "qwen3_moe"}


@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe"])
def test_config_there_and_back(family):
    source = random_model(family, mlp_only_layers=[1], norm_topk_prob=True).config
    c = family_config(source.to_dict())
    assert family_config(moe_json(c)) == c and moe_json(c)["model_type"] == source.model_type
    theirs = transformers.AutoConfig.for_model(**moe_json(c))
    for k in (*SIZE_OURS, "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"):
        assert k == "head_dim" or getattr(theirs, k, None) == getattr(source, k, None), k
    for wrong in (dict(qk_norm=not c.qk_norm), dict(o_bias=True), dict(windows=[4, None, None])):
        with pytest.raises(ValueError, match="no config.json can describe it"):
            moe_json(replace(c, **wrong))


def test_sizes_of_released_models():
    q3 = dict(vocab_size=151_936, head_dim=128, num_key_value_heads=4, tie_word_embeddings=False)
    assert count_active(
        MoEConfig(hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, **q3)
    ) == (30_532_122_624, 3_353_032_704)
    c = MoEConfig(**SIZE_OURS, decoder_sparse_step=2)
    model = Qwen(c)
    total, active = count_active(c)
    assert total == sum(p.numel() for p in model.parameters()) and total - active == sum(
        p.numel() for e in model.model.layers[1].mlp.experts[2:] for p in e.parameters()
    )


SIZE_OURS = {
    k: v for k, v in SIZE.items() if k not in ("initializer_range", "bos_token_id", "eos_token_id")
} | dict(head_dim=16, shared_expert_intermediate_size=28)


# ---- the balancing loss


@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe"])
@torch.no_grad()
def test_balancing_loss_equals_the_reference(family, tmp_path):
    reference = random_model(family, mlp_only_layers=[0])
    reference.save_pretrained(tmp_path)
    ours, ids, mask = (
        Qwen.from_pretrained(tmp_path),
        torch.randint(0, 97, (3, 12)),
        torch.ones(3, 12, dtype=torch.long),
    )
    mask[0, :5] = mask[2, :1] = 0
    for m in (None, mask):
        with router_logits(ours) as z:
            ours(ids, m)
        want = reference(ids, attention_mask=m, output_router_logits=True).aux_loss
        assert len(z) == 2 and near(load_balancing_loss(z, 2, m), want)
    assert not near(load_balancing_loss(z, 2), want)
    load = expert_load(z, 2, mask)
    assert (
        load.shape == (2, 6)
        and near(load.sum(1), torch.full((2,), 2.0))
        and not torch.equal(load, expert_load(z, 2))
    )
    assert not ours.model.layers[1].mlp.gate._forward_hooks


def test_balancing_loss_is_that_of_the_reference_in_value_and_gradient():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as theirs

    torch.manual_seed(0)
    for k, dtype in ((1, torch.float32), (3, torch.float32), (3, torch.bfloat16)):
        a = [(3 * torch.randn(40, 7)).to(dtype).requires_grad_() for _ in range(3)]
        b = [z.detach().clone().requires_grad_() for z in a]
        mask = (torch.rand(4, 10) < 0.7).long()
        for m in (None, mask):
            ours, want = load_balancing_loss(a, k, m), theirs(tuple(b), 7, k, m)
            assert near(ours.detach(), want.detach())
            for x, y in zip(torch.autograd.grad(ours, a), torch.autograd.grad(want, b)):
                torch.testing.assert_close(
                    x, y, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-7
                )


# ---- a mixture made of a dense model


@torch.no_grad()
def test_upcycled_copies_are_the_dense_model(tmp_path):
    ids = torch.arange(60)[None]
    dense, layers = (
        Qwen.from_pretrained(dtype="float32"),
        QwenConfig.from_pretrained().num_hidden_layers,
    )
    exact = Qwen.from_pretrained(
        upcycle(None, tmp_path / "exact", num_experts=3, noise=0.0, every=2), dtype="float32"
    )
    assert [isinstance(b.mlp, SparseMLP) for b in exact.model.layers] == [
        i % 2 == 1 for i in range(layers)
    ]
    assert near(exact(ids), dense(ids), 2048)
    shaken = Qwen.from_pretrained(upcycle(None, tmp_path / "shaken"), dtype="float32")
    assert not near(shaken(ids), dense(ids), 2048)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "shaken", dtype=torch.float32
    )
    want = theirs(ids).logits
    assert (shaken(ids) - want).abs().max() <= 1e-5 * want.abs().max()
    assert set(record(shaken, ids)) >= {"model.layers.0.mlp.gate", "model.layers.0.mlp"}
    assert (tmp_path / "shaken/tokenizer.json").read_bytes() == (
        packaged_model() / "tokenizer.json"
    ).read_bytes()
    with pytest.raises(ValueError, match="qwen3_moe.*only a dense qwen3"):
        upcycle(tmp_path / "shaken", tmp_path / "twice")


@torch.no_grad()
def test_an_upcycled_model_opens_as_it_is_stored(tmp_path):
    "Its router has the dtype of the rest, or a bfloat16 model stops at its first mixture."
    folder = upcycle(None, tmp_path / "made", num_experts=4)
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    model = Qwen.from_pretrained(folder)
    assert model(torch.arange(9)[None]).dtype == torch.bfloat16


# ---- holes that reviews found


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_window_of_null_is_no_window(family):
    raw = dict(model_type=family, use_sliding_window=True, sliding_window=None)
    assert expert_windows(raw, 6) == [None] * 6
    assert expert_windows(raw | dict(sliding_window=5), 2)[0] == 5
    sizes = SIZE | dict(shared_expert_intermediate_size=28, head_dim=16)
    assert family_config(sizes | raw).windows == [None] * 3


@torch.no_grad()
def test_a_window_of_null_gives_the_references_logits(tmp_path):
    reference = random_model("Qwen3Moe", use_sliding_window=True, sliding_window=None)
    reference.save_pretrained(tmp_path)
    edit(tmp_path, use_sliding_window=True, sliding_window=None)
    ids = torch.randint(0, 97, (1, 30))
    want = reference(ids).logits
    assert (Qwen.from_pretrained(tmp_path)(ids) - want).abs().max() <= 1e-5 * want.abs().max()


def test_an_idle_expert_has_a_gradient_of_zeros():
    pair = [SwiGLU(8, 6), SwiGLU(8, 6)]
    chosen = torch.zeros(2, 1, dtype=torch.long)
    mix_experts(pair, torch.randn(2, 8), torch.ones(2, 1), chosen).sum().backward()
    for p in pair[1].parameters():
        assert p.grad is not None and not p.grad.any()


def defaults(f):
    parameters = inspect.signature(f).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_defaults():
    assert defaults(upcycle) == dict(
        num_experts=8, num_experts_per_tok=2, every=1, noise=0.5, seed=0
    )
    layer = dict(norm_topk_prob=False, shared_expert_intermediate_size=None)
    assert defaults(SparseMLP) == layer
    assert defaults(load_balancing_loss) == defaults(expert_load) == dict(attention_mask=None)
    own = set(defaults(MoEConfig)) - set(defaults(QwenConfig))
    assert {name: defaults(MoEConfig)[name] for name in own} == dict(
        windows=None,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        shared_expert_intermediate_size=None,
        decoder_sparse_step=1,
        mlp_only_layers=(),
        router_aux_loss_coef=0.001,
    )


NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "14_moe.ipynb"
RETURNED = "    return weights.to("
WRONG_ROUTES = {
    "always normed": ("    if norm_topk_prob:", "    if True:"),
    "never normed": ("    if norm_topk_prob:", "    if False:"),
    "softmax over the chosen": (
        RETURNED,
        "    weights = logits.gather(-1, chosen).softmax(-1)\n" + RETURNED,
    ),
}


@pytest.mark.parametrize("name", WRONG_ROUTES)
def test_the_lesson_catches_a_wrong_router(name, monkeypatch):
    "In the check after `route`, which names the setting: not in a later one that blames itself."
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("QWEN_NB_MODEL", raising=False)
    before, after = WRONG_ROUTES[name]
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names, seen = {}, False
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code" or "google.colab" in text or "interact(" in text:
            continue
        if "def route(" in text:
            assert before in text
            text, seen = text.replace(before, after), True
        if "their_weights = " in text:
            with pytest.raises(AssertionError, match="weights, norm_topk_prob (True|False)"):
                exec(text, names)
            assert seen
            return
        exec(text, names)
    raise AssertionError("the lesson has no check after `route`")
