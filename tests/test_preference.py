"""DPO: cases by hand, another way to the same number, what stays frozen, and what is refused."""

import copy
import math
import random

import pytest
import torch
from test_finetune import one_sentence

from qwen_nb import preference as pr
from qwen_nb.finetune import answer_example, talks
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.rows import IGNORED
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.world import Chooser


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(packaged_model())


@pytest.fixture
def model():
    return Qwen.from_pretrained(dtype="float32")


def test_log_probs_of_an_answer(model, tokenizer):
    examples = [
        answer_example(tokenizer, t, "qwen3") for t in talks(3, 0) + talks(3, 0, system=False)
    ]
    batch = pr.pad(examples)
    with torch.no_grad():
        got = pr.answer_log_probs(model, batch)
        for row, e in zip(got, examples):
            p = model(torch.tensor([e["input_ids"]]))[0].double().softmax(-1)
            want = [math.log(p[t, i]) if i != IGNORED else 0.0 for t, i in enumerate(e["labels"])]
            torch.testing.assert_close(
                row[: len(want)].double(), torch.tensor(want).double(), rtol=1e-4, atol=1e-5
            )
            assert not row[len(want) :].any()


# ---- DPO


def test_dpo_by_hand_and_another_way():
    ln = lambda *p: torch.tensor(p, dtype=torch.float64).log()
    loss, margin = pr.dpo_loss(
        ln(1 / 2, 1 / 2), ln(1 / 8, 1 / 8), ln(1 / 4, 1 / 2), ln(1 / 2, 1 / 8), beta=1.0
    )
    torch.testing.assert_close(margin, ln(8, 1))
    torch.testing.assert_close(loss, ln(9 / 8, 2))  # equal to the reference: ln 2
    for seed in range(50):
        rng = random.Random(seed)
        w, l, rw, rl, beta = (rng.uniform(0.01, 0.99) for _ in range(5))
        strong, weak = (w / rw) ** beta, (l / rl) ** beta
        torch.testing.assert_close(
            pr.dpo_loss(ln(w), ln(l), ln(rw), ln(rl), beta)[0], -ln(strong / (strong + weak))
        )
    far = pr.dpo_loss(
        torch.tensor([-4000.0]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.0]), 1.0
    )[0]
    assert far == 4000  # and not infinite


def test_dpo_pulls_as_the_paper_says():
    "The gradient is -β σ(-margin) at the chosen and the opposite at the rejected."
    c, r = (
        torch.tensor([-2.0, -9.0], requires_grad=True),
        torch.tensor([-3.0, -1.0], requires_grad=True),
    )
    loss, margin = pr.dpo_loss(
        c, r, torch.tensor([-2.5, -4.0]), torch.tensor([-3.0, -4.0]), beta=0.3
    )
    loss.sum().backward()
    torch.testing.assert_close(c.grad, -0.3 * torch.sigmoid(-margin).detach())
    torch.testing.assert_close(r.grad, -c.grad)


def test_pairs_are_one_right_and_one_wrong(tokenizer, model):
    for i, talk in enumerate(talks(150, 3)):
        (*before, w), (*same, l) = pr.preference_pair(talk, Chooser(random.Random(i)))
        assert (
            before == same
            and w == talk[-1]
            and w["content"] != l["content"]
            and len(w["content"].split()) == len(l["content"].split())
        )
        assert sum(a != b for a, b in zip(w["content"].split(), l["content"].split())) == 1
    for w, l in pr.own_pairs(model, tokenizer, talks(6, 3), Chooser(random.Random(0))):
        assert w[-1]["content"] != l[-1]["content"] and w[:-1] == l[:-1]


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_dpo_widens_the_margin_and_leaves_the_reference(tokenizer, model, anchor):
    reference, kept = pr.frozen(model), copy.deepcopy(model.state_dict())
    pairs = [pr.preference_pair(t, Chooser(random.Random(i))) for i, t in enumerate(talks(8, 0))]
    log = list(
        pr.dpo(model, reference, pr.dpo_batches(tokenizer, "qwen3", pairs, 8) * 5, anchor=anchor)
    )
    assert abs(log[0]["loss"] - math.log(2)) < 1e-4 and log[0]["margin"] == pytest.approx(
        0, abs=1e-4
    )
    assert log[-1]["margin"] > log[0]["margin"] + 0.01 and log[-1]["loss"] < log[0]["loss"]
    assert all(
        torch.equal(p, kept[n]) and not p.requires_grad for n, p in reference.named_parameters()
    ) and any(not torch.equal(p, kept[n]) for n, p in model.named_parameters())
    if anchor:
        assert log[-1]["chosen"] > 0


def test_samples_come_from_the_model(tokenizer, model):
    asked = talks(3, 0, system=False)
    prompts = pr.prompts_of(tokenizer, asked, "qwen3")
    examples, texts = pr.sample_answers(model, tokenizer, prompts, 4, seed=1)
    assert texts == pr.sample_answers(model, tokenizer, prompts, 4, seed=1)[1] and len(texts) == 12
    for i, (e, text) in enumerate(zip(examples, texts)):
        new = [t for t in e["labels"] if t != IGNORED]
        assert (
            e["input_ids"] == (prompts[i // 4] + new)[:-1]
            and len(e["labels"]) == len(e["input_ids"])
            and tokenizer.decode(new).startswith(text)
        )
    rewards = pr.right_or_wrong([t[-1]["content"] for t in asked for _ in "ab"], asked)
    assert (
        rewards.shape == (3, 2)
        and rewards.all()
        and not pr.right_or_wrong(["No."] * 6, asked).any()
    )


def test_samples_are_as_often_as_they_are_likely(tokenizer, model):
    "Temperature 1 and no filter."
    with torch.no_grad():
        model.model.norm.weight *= 0.3  # many words are likely
    prompt, n = pr.prompts_of(tokenizer, talks(1, 5, system=False), "qwen3")[0], 2000
    with torch.no_grad():
        p = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    first = torch.tensor(
        [
            e["labels"][len(prompt) - 1]
            for e in pr.sample_answers(model, tokenizer, [prompt], n, seed=0, max_new_tokens=1)[0]
        ]
    )
    share = first.bincount(minlength=len(p)) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all() and p.max() < 0.5


def test_refused(tokenizer, model):
    z = torch.zeros(2)
    for beta in (0, -1.0):
        one_sentence("beta is", lambda: pr.dpo_loss(z, z, z, z, beta))
    one_sentence(
        "no whole sentence",
        lambda: pr.preference_pair(
            next(t for t in talks(50, 0, system=False) if t[-1]["kind"] == "who"),
            Chooser(random.Random(0)),
        ),
    )
    batches = pr.dpo_batches(
        tokenizer, "qwen3", [pr.preference_pair(t, Chooser(random.Random(0))) for t in talks(2, 0)]
    )
    one_sentence("the reference is the model itself", lambda: next(pr.dpo(model, model, batches)))
    reference, before = pr.frozen(model), model.model.norm.weight.clone()
    with torch.no_grad():
        reference.model.norm.weight[0] = float("nan")
    one_sentence("the loss of step 1 is nan", lambda: next(pr.dpo(model, reference, batches)))
    assert torch.equal(model.model.norm.weight, before)


# ---- answers of different lengths


def pair_of_lengths(tokenizer, *texts):
    "A batch of one pair, the chosen answer first."
    asked = dict(role="user", content="Max is in the kitchen. Where is Max?")
    sides = [[asked, dict(role="assistant", content=text)] for text in texts]
    return pr.pad([answer_example(tokenizer, side, "qwen3") for side in sides])


def test_an_answer_counts_by_the_sum_of_its_tokens(tokenizer, model):
    "Not by their mean: the classic mistake, which answers of one length would hide."
    batch = pair_of_lengths(tokenizer, "Kitchen.", "Max is in the kitchen, as far as I know.")
    with torch.no_grad():
        chosen, rejected = pr.answer_sums(model, batch)
        log_p = model(batch["input_ids"]).double().log_softmax(-1)
    for row, got in enumerate((chosen, rejected)):
        terms = [log_p[row, t, i] for t, i in enumerate(batch["labels"][row]) if i != IGNORED]
        assert got.shape == (1,)
        assert got.item() == pytest.approx(sum(terms).item(), rel=1e-4)
        assert got.item() != pytest.approx(sum(terms).item() / len(terms), rel=0.1)


def test_dpo_moves_on_by_the_sums(tokenizer, model):
    "The loop's own margin is beta times the difference of the sums, whatever the lengths."
    batch = pair_of_lengths(tokenizer, "Kitchen.", "Max is in the kitchen, as far as I know.")
    reference = Qwen.from_pretrained(dtype="float32")
    with torch.no_grad():
        reference.model.norm.weight *= 0.7
        (c, r), (rc, rr) = pr.answer_sums(model, batch), pr.answer_sums(reference, batch)
    row = next(pr.dpo(model, pr.frozen(reference), [batch], beta=0.3))
    assert row["margin"] == pytest.approx(0.3 * ((c - rc) - (r - rr)).item(), rel=1e-3)


def test_without_preference_it_is_fine_tuning(tokenizer):
    "The control sees the chosen answers alone: other rejected ones change nothing."
    ends = []
    for wrong in ("Max is in the attic.", "Max is in the garden."):
        model = Qwen.from_pretrained(dtype="float32")
        batch = pair_of_lengths(tokenizer, "Max is in the kitchen.", wrong)
        assert len(list(pr.dpo(model, pr.frozen(model), [batch] * 2, anchor=1.0, preference=0.0)))
        ends.append(model.state_dict())
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], rtol=1e-4, atol=1e-5)


def test_prompts_go_to_the_models_device(tokenizer, model, monkeypatch):
    seen = []

    def spy(model, ids, n, mask, **kw):
        seen.extend((ids.device.type, mask.device.type))
        raise InterruptedError

    monkeypatch.setattr(pr, "generate", spy)
    prompts = pr.prompts_of(tokenizer, talks(2, 0), "qwen3")
    with pytest.raises(InterruptedError):
        pr.sample_answers(model.to("meta"), tokenizer, prompts, 2)
    assert seen == ["meta", "meta"]


def test_the_reference_can_be_asked_beforehand(model, tokenizer):
    "What it says is the same before the run and in it, to the bit; and then it is asked no more."
    pairs = [pr.preference_pair(t, Chooser(random.Random(0))) for t in talks(4, 0)]
    batches, reference = pr.dpo_batches(tokenizer, "qwen3", pairs, 2), pr.frozen(model)
    asked = pr.with_reference(reference, batches)
    assert all("ref_sums" not in batch for batch in batches), "the batches themselves changed"
    wanted = list(pr.dpo(copy.deepcopy(model), reference, batches, anchor=1.0))
    assert list(pr.dpo(copy.deepcopy(model), reference, asked, anchor=1.0)) == wanted
    reference.model = None  # whoever called it now would fail
    assert list(pr.dpo(model, reference, asked, anchor=1.0)) == wanted
