"RoPE against transformers over random settings, and the things a notebook is too short for."

import copy
import inspect
import json
import linecache
import math
import pickle
import random
from pathlib import Path

import pytest
import torch

from qwen_nb.compare import first_difference, record
from qwen_nb.diagnose import exercise
from qwen_nb.inspect import load_reference
from qwen_nb.model import Qwen
from qwen_nb.rope import apply_rope, cos_sin, inverse_frequencies, rotate_half
from qwen_nb.verify import check, check_fails
from qwen_nb.yarn import Rotary, read_scaling, yarn_frequencies, yarn_ramp

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "05_rope.ipynb"
TURNED_NOTEBOOK = NOTEBOOK.with_name("05_turned.ipynb")
YARN_NOTEBOOK = NOTEBOOK.with_name("05a_yarn.ipynb")


def reference(head_dim, theta, scaling, max_position_embeddings=32_768):
    "The reference's rotary module for these numbers."
    pytest.importorskip("transformers")
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        num_hidden_layers=1,
        max_position_embeddings=max_position_embeddings,
    )
    config.rope_parameters = {"rope_theta": theta, **scaling}
    config.standardize_rope_params()
    return Qwen3RotaryEmbedding(config)


def random_numbers(rng):
    return dict(
        head_dim=2 * rng.choice([1, 2, 4, 16, 32, 40, 64, 128]),
        theta=rng.choice([100.0, 1e4, 500_000, 1_000_000, 1e7, rng.uniform(50, 1e6)]),
    )


def random_yarn(rng):
    "A YaRN scaling with any of its optional settings, in either spelling."
    scaling = {
        rng.choice(["type", "rope_type"]): "yarn",
        "factor": rng.choice([1, 1.0, 2, 4.0, 40, rng.uniform(1, 64)]),
        "original_max_position_embeddings": rng.choice(
            [256, 4096, 32_768, 131_072, rng.randint(64, 10**6)]
        ),
    }
    optional = dict(
        beta_fast=rng.choice([32, 24.5, 64]),
        beta_slow=rng.choice([1, 0.5, 2.0]),
        truncate=rng.random() < 0.5,
        attention_factor=rng.choice([None, rng.uniform(0.5, 2)]),
        mscale=rng.choice([None, 0, 0.707, 1.0]),
        mscale_all_dim=rng.choice([None, 0.0, 1.0, 0.8]),
    )
    return scaling | {k: v for k, v in optional.items() if rng.random() < 0.5}


def far_positions(rng, n=64):
    return torch.tensor([[rng.randrange(131_072) for _ in range(n)] for _ in range(2)])


@pytest.mark.parametrize("seed", range(100))
def test_yarn_equals_the_reference(seed):
    rng = random.Random(seed)
    numbers, scaling = random_numbers(rng), random_yarn(rng)
    theirs = reference(**numbers, scaling=dict(scaling))
    ours = Rotary(**numbers, scaling=scaling)
    assert torch.equal(ours.inv_freq, theirs.inv_freq), (numbers, scaling)
    assert ours.attention_factor == theirs.attention_scaling, (numbers, scaling)
    positions = far_positions(rng)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for a, b in zip(ours(positions, dtype), theirs(torch.zeros(1, dtype=dtype), positions)):
            assert a.dtype == dtype and torch.equal(a, b), (numbers, scaling, dtype)


@pytest.mark.parametrize("seed", range(30))
def test_linear_and_default_equal_the_reference(seed):
    rng = random.Random(seed)
    numbers, positions = random_numbers(rng), far_positions(rng)
    for scaling in (
        {},
        {"rope_type": "default"},
        {"type": "default", "rope_theta": numbers["theta"]},
        {"type": "linear", "factor": rng.uniform(1, 9)},
    ):
        theirs, ours = (
            reference(**numbers, scaling=dict(scaling)),
            Rotary(**numbers, scaling=scaling),
        )
        assert torch.equal(
            torch.stack(ours(positions)), torch.stack(theirs(torch.zeros(1), positions))
        ), (numbers, scaling)


def test_yarn_notices_each_of_its_settings():
    "Each setting changes the result, so the equality above is not empty."
    base = dict(head_dim=64, theta=1e6, factor=4.0, original_max_position_embeddings=32_768)

    def result(**kw):
        inv_freq, factor = yarn_frequencies(**(base | kw))
        return [*inv_freq.tolist(), factor]

    for kw in (
        dict(factor=5.0),
        dict(original_max_position_embeddings=4096),
        dict(beta_fast=16),
        dict(beta_slow=4),
        dict(truncate=False),
        dict(attention_factor=1.0),
        dict(mscale=0.7, mscale_all_dim=1.0),
        dict(theta=1e4),
    ):
        assert result(**kw) != result(), kw


def test_yarn_takes_its_original_context_from_the_config_if_it_must():
    "As transformers does."
    scaling = {"rope_type": "yarn", "factor": 4.0}
    theirs = reference(64, 1e6, dict(scaling), max_position_embeddings=4096)
    assert torch.equal(
        Rotary(64, 1e6, scaling, max_position_embeddings=4096).inv_freq, theirs.inv_freq
    )
    assert not torch.equal(
        Rotary(64, 1e6, scaling, max_position_embeddings=8192).inv_freq, theirs.inv_freq
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
BAD = [
    ({"rope_type": kind}, kind)
    for kind in ("longrope", "llama3", "dynamic", "mrope", "su", "proportional", "YARN", "")
] + [
    ({"factor": 4.0}, "None"),
    ({"rope_type": ["yarn"]}, "yarn"),
    ({"type": 3}, "3"),
    ("yarn", "yarn"),
    ([YARN], "expected a dict"),
    ({"rope_type": "linear"}, "lacks factor"),
    ({"rope_type": "yarn", "factor": 4.0}, "lacks original_max_position_embeddings"),
    ({"type": "yarn", "original_max_position_embeddings": 4096}, "lacks factor"),
    (YARN | {"factor": None}, "lacks factor"),
    (YARN | {"factor": 0.5}, "at least 1"),
    (YARN | {"factor": -4.0}, "at least 1"),
    ({"type": "linear", "factor": -4.0}, "at least 1"),
    ({"factor": 4.0, "original_max_position_embeddings": 4096}, "None"),
    ({"type": None, "factor": 4.0}, "None"),
    (YARN | {"mscale": -1.0}, "mscale"),
    (YARN | {"original_max_position_embeddings": None}, "lacks original"),
    (YARN | {"factor": "4"}, "'4'"),
    (YARN | {"factor": True}, "True"),
    (YARN | {"factor": float("nan")}, "nan"),
    (YARN | {"factor": float("inf")}, "inf"),
    (YARN | {"original_max_position_embeddings": 0}, "above 0"),
    (YARN | {"beta_fast": 0}, "beta_fast"),
    (YARN | {"beta_fast": 1, "beta_slow": 32}, "below beta_slow"),
    (YARN | {"attention_factor": -1.0}, "attention_factor"),
    (YARN | {"truncate": "no"}, "truncate"),
    (YARN | {"mscale": [1]}, "mscale"),
    (YARN | {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (YARN | {"rope_theta": 1e6}, "rope_theta"),
]


@pytest.mark.parametrize("scaling, says", BAD)
def test_what_is_not_supported_is_refused_in_one_sentence(scaling, says):
    with pytest.raises(ValueError) as e:
        Rotary(64, 1e4, scaling)
    assert says in str(e.value) and "\n" not in str(e.value)
    if "has type" in str(e.value):
        assert "default, linear, yarn" in str(e.value)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {},
        {"rope_type": "default"},
        {"rope_theta": 1e4},
        {"type": "default", "rope_theta": 10_000},
    ],
)
def test_nothing_to_scale(scaling):
    assert read_scaling(scaling, 1e4) == ("default", {})
    assert torch.equal(Rotary(64, 1e4, scaling).inv_freq, inverse_frequencies(64, 1e4))


@pytest.mark.parametrize(
    "scaling, means",
    [
        (YARN | {"type": "linear"}, YARN),
        (YARN | {"rope_type": None, "type": "yarn"}, YARN),
        (YARN | dict.fromkeys(["beta_fast", "beta_slow", "mscale", "attention_factor"]), YARN),
        (YARN | {"truncate": None}, YARN),
        (YARN | {"mscale": 2.0}, YARN),
        (YARN | {"mscale_all_dim": 2.0}, YARN),
        (YARN | {"mscale": 2.0, "mscale_all_dim": 0}, YARN),
        (YARN | {"attention_factor": 1.2, "mscale": 1.0, "mscale_all_dim": 0.5},
         YARN | {"attention_factor": 1.2}),
        ({"type": "linear", "factor": 1}, None),
        ({"rope_type": "default", "factor": 4.0}, None),
        ({"partial_rotary_factor": 1.0, "rope_theta": 1e4}, None),
        ({"partial_rotary_factor": None, "rope_theta": None}, None),
    ],
)
def test_two_entries_that_mean_the_same(scaling, means):
    "The rules of the text that no published model shows: null, two types, one weight, …"
    ours, plain = Rotary(64, 1e4, scaling), Rotary(64, 1e4, means)
    assert torch.equal(ours.inv_freq, plain.inv_freq)
    assert ours.attention_factor == plain.attention_factor
    assert type(ours.attention_factor) is float


@pytest.mark.parametrize(
    "more",
    [
        {"mscale": 1.0, "mscale_all_dim": 0.5},
        {"mscale": 0.5, "mscale_all_dim": 1.0},
        {"original_max_position_embeddings": 6},
        {"beta_fast": 4, "beta_slow": 4, "truncate": False},
        {"factor": 1},
        {"type": "linear"},
    ],
)
def test_corners_of_yarn_equal_the_reference(more):
    "Two weights, a ramp of no length, a factor of 1, two types."
    theirs, ours = reference(64, 1e4, YARN | more), Rotary(64, 1e4, YARN | more)
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    assert ours.attention_factor == theirs.attention_scaling
    assert type(ours.attention_factor) is float


def test_the_two_weights_are_a_quotient():
    ours = Rotary(64, 1e4, YARN | {"mscale": 1.0, "mscale_all_dim": 0.5})
    s = math.log(4.0)
    assert ours.attention_factor == (0.1 * s + 1) / (0.1 * 0.5 * s + 1)


def test_a_ramp_of_no_length_keeps_its_first_pair():
    assert yarn_ramp(64, 1e4, 6).tolist() == [0.0] + [1.0] * 31


def test_the_callers_dict_is_left_alone():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    Rotary(64, 1e4, scaling, max_position_embeddings=4096)
    assert scaling == {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("head_dim", [0, 1, 33, -2])
def test_odd_heads_are_refused(head_dim):
    with pytest.raises(ValueError, match=str(head_dim)):
        Rotary(head_dim)


@pytest.mark.parametrize("theta", [0, 1, -1e4, float("nan"), float("inf")])
def test_a_senseless_base_is_refused(theta):
    with pytest.raises(ValueError, match="rope_theta"):
        Rotary(64, theta)


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(8),
        torch.arange(8.0)[None],
        torch.arange(8)[None].bfloat16(),
        torch.zeros(3, 1, 8, dtype=torch.int64),
        torch.ones(1, 8, dtype=torch.bool),
    ],
)
def test_positions_of_another_shape_or_dtype_are_refused(positions):
    with pytest.raises(ValueError, match="position_ids"):
        Rotary(64)(positions)


def test_frequencies_are_real_float32_numbers_wherever_they_are_made():
    "A model may be planned on the meta device or under bfloat16: the frequencies must not follow."
    want = Rotary(64, 1e6, YARN).inv_freq
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            rotary = Rotary(64, 1e6, YARN)
    finally:
        torch.set_default_dtype(before)
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, want)


def test_without_scaling_too():
    with torch.device("meta"):
        made_there = inverse_frequencies(64, 1e6)
    assert torch.equal(made_there, inverse_frequencies(64, 1e6))
    cos, sin = cos_sin(torch.arange(4)[None].to("meta"), made_there)
    assert cos.device.type == sin.device.type == "meta"


def test_casting_a_model_leaves_its_rotary_alone():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.rotary = torch.nn.Parameter(torch.zeros(1)), Rotary(64, 1e6)

    model = Model().to(torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16 and model.rotary.inv_freq.dtype == torch.float32
    assert list(model.state_dict()) == ["weight"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(Rotary(64, 1e6)))):
        assert torch.equal(getattr(twin, "rotary", twin).inv_freq, model.rotary.inv_freq)


def test_tables_follow_the_positions():
    cos, sin = Rotary(64)(torch.arange(5)[None].to("meta"), torch.bfloat16)
    assert (
        cos.device.type == sin.device.type == "meta"
        and cos.shape == (1, 5, 64)
        and cos.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0, 1, 4095, 131_000])
def test_offsets_gaps_and_batches(dtype, offset):
    "The positions count, not the column: a token's turn does not depend on who stands beside it."
    torch.manual_seed(0)
    x, rotary = torch.randn(2, 3, 6, 64, dtype=dtype), Rotary(64, 1e6)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [9, 2, 50, 51, 7, 7]]) + offset
    whole = apply_rope(x, *rotary(positions, dtype))
    assert whole.dtype == dtype and whole.shape == x.shape
    for b in range(2):
        for s in range(6):
            alone = apply_rope(
                x[b : b + 1, :, s : s + 1], *rotary(positions[b : b + 1, s : s + 1], dtype)
            )
            torch.testing.assert_close(
                alone[0, :, 0],
                whole[b, :, s],
                rtol=0,
                atol=4 * torch.finfo(dtype).eps * x.abs().max().item(),
            )


def test_one_row_of_positions_serves_a_batch():
    x, tables = torch.randn(4, 2, 5, 8), Rotary(8)(torch.arange(5)[None])
    assert torch.equal(
        apply_rope(x, *tables), torch.cat([apply_rope(row[None], *tables) for row in x])
    )


def test_lengths_stay_and_position_zero_does_nothing():
    x = torch.randn(1, 2, 7, 32)
    turned = apply_rope(x, *Rotary(32)(torch.arange(7)[None]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0]) and not torch.equal(turned[:, :, 1], x[:, :, 1])
    assert torch.equal(rotate_half(rotate_half(x)), -x)


def test_gradients_flow():
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = cos_sin(torch.arange(3)[None], inverse_frequencies(8), torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), x)


# The formulas of the lessons, typed from their text and from nothing else.


def typed_speeds(d, theta):
    "05: the exponent, the power, one divided by it; float32."
    j = torch.arange(d // 2)
    return 1 / theta ** (2 * j / d)


def typed_yarn(d, theta, s, L):
    "05a: the ramp's ends at whole pairs, what is kept of the speed, the mix, the factor."

    def pair_with(r):
        return d * math.log(L / (r * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(32)), 0)
    high = min(math.ceil(pair_with(1)), d - 1)
    j = torch.arange(d // 2)
    gamma = torch.clamp((j - low) / (high - low), 0, 1)
    kappa = 1 - gamma
    slowed = 1 / (s * theta ** (2 * j / d))
    return slowed * (1 - kappa) + 1 / theta ** (2 * j / d) * kappa, 0.1 * math.log(s) + 1


def typed_tables(speeds, factor, positions):
    "Angles in float32, times the factor, then the dtype of a float64 model."
    angles = positions[..., None].float() * speeds
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos() * factor, angles.sin() * factor]).double()


@pytest.mark.parametrize("d, theta", [(128, 1e6), (64, 1e6), (32, 1e4), (128, 1e4), (256, 5e6)])
def test_the_printed_formula_of_rope_is_what_is_computed(d, theta):
    "With 0 rounding steps in the tables of a float64 model, as 05 and 08 compare them."
    positions = torch.arange(0, 40_960, 13)[None]
    printed = typed_tables(typed_speeds(d, theta), 1.0, positions)
    ours = torch.stack(Rotary(d, theta)(positions, torch.float64))
    theirs = torch.stack(reference(d, theta, {})(torch.zeros(1, dtype=torch.float64), positions))
    check(printed, ours, steps=0)
    check(printed, theirs, steps=0)


@pytest.mark.parametrize("d", [128, 64])
def test_the_printed_formulas_of_yarn_are_what_is_computed(d):
    "With the numbers of Qwen's model cards, on our code and on the reference: 0 steps, float64."
    positions = torch.arange(0, 131_072, 31)[None]
    printed = typed_tables(*typed_yarn(d, 1e6, 4.0, 32_768), positions)
    ours = torch.stack(Rotary(d, 1e6, YARN)(positions, torch.float64))
    module = reference(d, 1e6, dict(YARN))
    theirs = torch.stack(module(torch.zeros(1, dtype=torch.float64), positions))
    check(printed, ours, steps=0)
    check(printed, theirs, steps=0)


@pytest.mark.parametrize("scaling", [{}, {"type": "yarn", "factor": 4.0}], ids=["rope", "yarn"])
@torch.no_grad()
def test_a_whole_float64_model_turns_by_the_printed_formulas(scaling):
    "As 08 compares it, at every module; with the power taken in one step it would not pass."
    theirs, _ = load_reference(None, torch.float64, "sdpa")
    theirs.model.rotary_emb = reference(32, 1e6, scaling, max_position_embeddings=512)
    ours = Qwen.from_pretrained(dtype=torch.float64)
    decoder = next(m for m in ours.modules() if hasattr(m, "rotary"))
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    want = record(theirs, ids)
    rotary = decoder.rotary
    rotary.inv_freq = typed_speeds(32, 1e6)
    if scaling:
        rotary.inv_freq, rotary.attention_factor = typed_yarn(32, 1e6, 4.0, 512)
    assert first_difference(record(ours, ids), want, steps=32) is None
    rotary.inv_freq = rotary.inv_freq * (1 + 2**-23)
    assert first_difference(record(ours, ids), want, steps=32)


def test_details_that_a_text_is_tempted_to_leave_out_are_seen():
    "Each was printed otherwise once: the rounding of the ramp's ends, and the order of operations."
    right, _ = yarn_frequencies(128, 1e6, 4.0, 32_768)
    check_fails(yarn_frequencies(128, 1e6, 4.0, 32_768, truncate=False)[0], right)
    one_step = 1e6 ** (-torch.arange(0, 128, 2) / 128)
    check_fails(one_step.double(), inverse_frequencies(128, 1e6).double())


def test_the_lessons_print_these_formulas():
    rope, yarn = (notebook_text(path, "markdown") for path in (NOTEBOOK, YARN_NOTEBOOK))
    assert r"\omega_j=\frac{1}{\theta^{\,2j/d}}" in rope
    assert r"\omega_j=\theta^{-2j/d}" not in rope + yarn
    for formula in (
        r"j_r=\frac{d\,\ln\!\big(L/(r\cdot 2\pi)\big)}{2\ln\theta}",
        r"\text{low}=\max\!\big(\lfloor j_{32}\rfloor,\,0\big)",
        r"\text{high}=\min\!\big(\lceil j_{1}\rceil,\,d-1\big)",
        r"\kappa_j=1-\gamma_j",
        r"\omega'_j=\frac{1}{s\,\theta^{\,2j/d}}\,(1-\kappa_j)+\frac{1}{\theta^{\,2j/d}}\,\kappa_j",
        r"a=0.1\,\ln s+1",
    ):
        assert formula in yarn, formula


def notebook_cells(path, kind):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def notebook_text(path, kind):
    return "\n".join(notebook_cells(path, kind))


def cell_with(start, path=NOTEBOOK):
    return next(text for text in notebook_cells(path, "code") if text.startswith(start))


def test_a_base_fixed_in_the_code_fails_at_the_first_check_of_its_own_lesson():
    "The packaged model's base is 10,000, so a check with its own base alone would pass."
    model = load_reference()[0]
    names = dict(copy=copy, config=model.config, reference=model, check=check)
    names |= dict(check_fails=check_fails, head_dim=32, theta=10_000.0)
    names["inverse_frequencies"] = inverse_frequencies
    exec(cell_with("def their_rotary(base)"), names)
    names["inverse_frequencies"] = lambda d, theta: inverse_frequencies(d, 10_000.0)
    with pytest.raises(AssertionError, match="base 1,000,000"):
        exec(cell_with("def their_rotary(base)"), names)


def test_the_positions_of_padding_must_be_0_as_the_text_says():
    names = dict(torch=torch, exercise=exercise)
    text, file = cell_with("#@title Grader", TURNED_NOTEBOOK), "<grader of the positions>"
    linecache.cache[file] = len(text), None, text.splitlines(True), file  # for `inspect`
    exec(compile(text, file, "exec"), names)
    grade = names["positions_from_mask_exercise"]
    grade(lambda m: (m.cumsum(-1) - 1) * m)
    grade(lambda m: (m.cumsum(-1) - 1).masked_fill_(m == 0, 0))
    grade(lambda m: (m.cumsum(-1) - 1).masked_fill(m == 0, 0).int())
    for fill in (1, -1, 7):
        with pytest.raises(AssertionError, match="expected 0"):
            grade(lambda m, fill=fill: (m.cumsum(-1) - 1).masked_fill(m == 0, fill))


def test_solutions_are_folded():
    for path in (TURNED_NOTEBOOK, YARN_NOTEBOOK):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = [c for c in cells if "".join(c["source"]).startswith("#@title Grader")]
        assert found
        for cell in found:
            assert cell["metadata"]["jupyter"]["source_hidden"]


def defaults(f):
    empty = inspect.Parameter.empty
    parameters = inspect.signature(f).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not empty}


def test_defaults_are_those_of_the_configs():
    "What a config leaves out; a changed default would change models without any message."
    yarn = dict(beta_fast=32, beta_slow=1, truncate=True)
    more = dict(attention_factor=None, mscale=None, mscale_all_dim=None)
    scaling = dict(scaling=None, max_position_embeddings=None)
    assert defaults(inverse_frequencies) == dict(theta=10_000.0, factor=1.0)
    assert defaults(cos_sin) == dict(dtype=torch.float32, attention_factor=1.0)
    assert defaults(yarn_ramp) == yarn
    assert defaults(yarn_frequencies) == yarn | more
    assert defaults(Rotary) == dict(theta=10_000.0) | scaling
    assert defaults(Rotary.__call__) == dict(dtype=torch.float32, cache=None)
    assert defaults(read_scaling) == dict(theta=None, max_position_embeddings=None)


def test_yarn_without_optional_settings_is_the_cards():
    full = dict(beta_fast=32, beta_slow=1, truncate=True)
    plain, spelled = Rotary(128, 1e6, YARN), Rotary(128, 1e6, YARN | full)
    assert torch.equal(plain.inv_freq, spelled.inv_freq)
    assert (yarn_ramp(128, 1e6, 32_768) == 0).sum() == 24
    assert (yarn_ramp(128, 1e6, 32_768) == 1).sum() == 24
