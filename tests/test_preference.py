"""DPO and GRPO: hand-computed cases, other ways to the same number, what stays frozen, and what is refused."""

import copy
import math
import random

import pytest
import torch
from test_finetune import one_sentence

from qwen_nb import preference as pr
from qwen_nb.rows import IGNORED
from qwen_nb.finetune import answer_example, talks
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
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


# ---- GRPO


def test_advantages_by_hand():
    got = pr.advantages(torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    want = torch.tensor([[1, -1, -1, 1], [3**0.5, *[-(3**-0.5)] * 3], [0] * 4, [0] * 4])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    r = torch.randn(5, 7)
    torch.testing.assert_close(
        pr.advantages(3 * r + 2), pr.advantages(r), rtol=1e-4, atol=1e-4
    )  # neither scale nor offset matters
    torch.testing.assert_close(
        pr.advantages(r).square().mean(1), torch.ones(5), rtol=1e-4, atol=1e-4
    )


def test_kl_estimate():
    p, q = (torch.randn(40, dtype=torch.float64).softmax(0) for _ in "pq")
    torch.testing.assert_close(
        (p * pr.kl_estimate(p.log(), q.log())).sum(),
        torch.nn.functional.kl_div(q.log(), p, reduction="sum"),
    )
    assert (
        pr.kl_estimate(p.log(), q.log()).min() >= 0
        and pr.kl_estimate(p.log(), p.log()).abs().max() == 0
    )


def test_objective_by_hand_and_in_plain_python():
    ratio, graded = (
        torch.tensor([[1.5, 0.5], [0.5, 7.0]]),
        torch.tensor([[True, True], [True, False]]),
    )
    zero, A = torch.zeros(2, 2), torch.tensor([1.0, -1.0])
    assert pr.grpo_objective(ratio.log(), zero, zero, A, graded, 0.2, 0.0).item() == pytest.approx(
        0.025, abs=1e-6
    )
    torch.manual_seed(0)
    p, old, ref, A, graded = (
        -torch.rand(4, 6),
        -torch.rand(4, 6),
        -torch.rand(4, 6),
        torch.randn(4),
        torch.rand(4, 6) < 0.6,
    )
    graded[:, 0], total = True, 0.0
    for i in range(4):
        terms = []
        for t in range(6):
            if not graded[i, t]:
                continue
            rho, d = math.exp(p[i, t] - old[i, t]), (ref[i, t] - p[i, t]).item()
            terms.append(
                min(rho * A[i].item(), min(max(rho, 0.9), 1.1) * A[i].item())
                - 0.3 * (math.exp(d) - d - 1)
            )
        total += sum(terms) / len(terms) / 4
    assert pr.grpo_objective(p, old, ref, A, graded, 0.1, 0.3).item() == pytest.approx(
        total, abs=1e-6
    )


def test_beyond_the_clip_there_is_no_gradient():
    for A, ratios, pulled in (
        (1.0, [0.5, 1.0, 1.19, 1.21], [1, 1, 1, 0]),
        (-1.0, [0.5, 0.79, 0.81, 3.0], [0, 0, 1, 1]),
    ):
        p = torch.tensor([ratios]).log().requires_grad_()
        pr.grpo_objective(
            p, torch.zeros(1, 4), p.detach(), torch.tensor([A]), torch.ones(1, 4).bool()
        ).backward()
        assert (p.grad[0] != 0).tolist() == [bool(x) for x in pulled]


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


def test_a_step_makes_the_better_likelier(tokenizer, model):
    right, wrong = pr.preference_pair(talks(1, 3)[0], Chooser(random.Random(0)))
    batch = pr.pad([answer_example(tokenizer, t, "qwen3") for t in (right, wrong)])
    before = pr.answer_log_probs(model, batch)
    (
        -pr.grpo_objective(
            before,
            before.detach(),
            before.detach(),
            torch.tensor([1.0, -1.0]),
            batch["labels"] != IGNORED,
        )
    ).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
        change = (pr.answer_log_probs(model, batch) - before).sum(1)
    assert change[0] > change[1]


def test_equal_rewards_move_nothing(tokenizer, model):
    "And the loop gives what it says."
    reference, kept = pr.frozen(model), copy.deepcopy(model.state_dict())
    lessons = [talks(4, 50 * i, system=False) for i in range(2)]
    log = list(
        pr.grpo(
            model,
            reference,
            tokenizer,
            lessons,
            reward=lambda texts, talks: torch.ones(4, 4),
            group=4,
        )
    )
    assert [row["reward"] for row in log] == [1, 1] and all(
        abs(row["kl"]) < 1e-6 and row["clipped"] == 0 for row in log
    )
    assert all(torch.allclose(p, kept[n], atol=1e-4) for n, p in model.named_parameters())
    mixed = list(
        pr.grpo(
            model,
            reference,
            tokenizer,
            lessons,
            reward=lambda texts, talks: torch.tensor([[0.0, 1, 0, 1]] * 4),
            group=4,
        )
    )
    assert [row["reward"] for row in mixed] == [0.5, 0.5] and any(
        not torch.equal(p, kept[n]) for n, p in model.named_parameters()
    )
    assert all(torch.equal(p, kept[n]) for n, p in reference.named_parameters())


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


def short(texts, talks):
    return torch.tensor([-float(len(t)) for t in texts]).view(len(talks), -1)


def test_the_reward_rises(tokenizer, model):
    "A plain one, for short answers to requests that the model was never taught: a flipped sign makes them longer."
    with torch.no_grad():
        model.model.norm.weight *= 0.3  # so that there is something to choose from
    reference, lesson = pr.frozen(model), talks(6, 0)
    log = list(
        pr.grpo(
            model,
            reference,
            tokenizer,
            [lesson] * 8,
            reward=short,
            group=8,
            lr=1e-3,
            warmup=1,
            beta=0.0,
        )
    )
    rewards = [row["reward"] for row in log]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 2, rewards
    assert (
        max(row["clipped"] for row in log) > 0
    )  # the second update of a batch knows which model sampled it


def test_the_old_model_is_the_one_that_sampled(tokenizer, model, monkeypatch):
    "Over all updates of a batch `log_old` stays, and the first ratio is 1."
    with torch.no_grad():
        model.model.norm.weight *= 0.3  # answers that differ
    seen, objective = [], pr.grpo_objective

    def spy(log_p, log_old, *rest):
        seen.append((log_p.detach().clone(), log_old.clone()))
        return objective(log_p, log_old, *rest)

    monkeypatch.setattr(pr, "grpo_objective", spy)
    list(
        pr.grpo(
            model,
            pr.frozen(model),
            tokenizer,
            [talks(4, 0)],
            reward=lambda texts, talks: torch.tensor([[0.0, 1, 0, 1]] * 4),
            group=4,
            updates=3,
            lr=1e-3,
            warmup=1,
        )
    )
    assert (
        len(seen) == 3
        and torch.equal(*seen[0])
        and all(torch.equal(old, seen[0][1]) for _, old in seen)
        and not torch.equal(*seen[2])
    )


def test_grpo_refuses_other_rewards(tokenizer, model):
    reference, kept = pr.frozen(model), copy.deepcopy(model.state_dict())
    for bad in (torch.ones(4, 2), torch.ones(2), [[0.0, float("nan"), 1, 1]] * 2):
        one_sentence(
            "the reward gave",
            lambda: next(
                pr.grpo(model, reference, tokenizer, [talks(2, 0)], reward=lambda *a: bad, group=4)
            ),
        )
    one_sentence(
        "updates is 0",
        lambda: next(pr.grpo(model, reference, tokenizer, [talks(2, 0)], group=4, updates=0)),
    )
    one_sentence("5 answers to 2 questions", lambda: pr.right_or_wrong(["a"] * 5, talks(2, 0)))
    one_sentence(
        "nothing .* is to be trained",
        lambda: next(pr.grpo(pr.frozen(model), reference, tokenizer, [talks(2, 0)], group=4)),
    )
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    assert (
        next(
            pr.grpo(
                model,
                reference,
                tokenizer,
                [talks(2, 0)],
                reward=lambda *a: [[0, 1]] * 2,
                group=2,
                warmup=0,
            )
        )["reward"]
        == 0.5
    )


def test_refused(tokenizer, model):
    z = torch.zeros(2)
    for beta in (0, -1.0):
        one_sentence("beta is", lambda: pr.dpo_loss(z, z, z, z, beta))
    for bad in (torch.ones(4, 1), torch.ones(4)):
        one_sentence("rewards has shape", lambda: pr.advantages(bad))
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
