"""Rewards: the policy gradient, the clipped ratio, KL, and the loop of GRPO."""

import copy
import math
import random

import pytest
import torch
from test_finetune import one_sentence

from qwen_nb import preference as pr
from qwen_nb import rewards as rw
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


def test_advantages_by_hand():
    got = rw.advantages(torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    want = torch.tensor([[1, -1, -1, 1], [3**0.5, *[-(3**-0.5)] * 3], [0] * 4, [0] * 4])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    r = torch.randn(5, 7)
    torch.testing.assert_close(
        rw.advantages(3 * r + 2), rw.advantages(r), rtol=1e-4, atol=1e-4
    )  # neither scale nor offset matters
    torch.testing.assert_close(
        rw.advantages(r).square().mean(1), torch.ones(5), rtol=1e-4, atol=1e-4
    )


def test_kl_estimate():
    p, q = (torch.randn(40, dtype=torch.float64).softmax(0) for _ in "pq")
    torch.testing.assert_close(
        (p * rw.kl_estimate(p.log(), q.log())).sum(),
        torch.nn.functional.kl_div(q.log(), p, reduction="sum"),
    )
    assert (
        rw.kl_estimate(p.log(), q.log()).min() >= 0
        and rw.kl_estimate(p.log(), p.log()).abs().max() == 0
    )


def test_objective_by_hand_and_in_plain_python():
    ratio, graded = (
        torch.tensor([[1.5, 0.5], [0.5, 7.0]]),
        torch.tensor([[True, True], [True, False]]),
    )
    zero, A = torch.zeros(2, 2), torch.tensor([1.0, -1.0])
    assert rw.grpo_objective(ratio.log(), zero, zero, A, graded, 0.2, 0.0).item() == pytest.approx(
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
    assert rw.grpo_objective(p, old, ref, A, graded, 0.1, 0.3).item() == pytest.approx(
        total, abs=1e-6
    )


def test_beyond_the_clip_there_is_no_gradient():
    for A, ratios, pulled in (
        (1.0, [0.5, 1.0, 1.19, 1.21], [1, 1, 1, 0]),
        (-1.0, [0.5, 0.79, 0.81, 3.0], [0, 0, 1, 1]),
    ):
        p = torch.tensor([ratios]).log().requires_grad_()
        rw.grpo_objective(
            p, torch.zeros(1, 4), p.detach(), torch.tensor([A]), torch.ones(1, 4).bool()
        ).backward()
        assert (p.grad[0] != 0).tolist() == [bool(x) for x in pulled]


def test_a_step_makes_the_better_likelier(tokenizer, model):
    right, wrong = pr.preference_pair(talks(1, 3)[0], Chooser(random.Random(0)))
    batch = pr.pad([answer_example(tokenizer, t, "qwen3") for t in (right, wrong)])
    before = pr.answer_log_probs(model, batch)
    (
        -rw.grpo_objective(
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
        rw.grpo(
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
        rw.grpo(
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


def short(texts, talks):
    return torch.tensor([-float(len(t)) for t in texts]).view(len(talks), -1)


def test_the_reward_rises(tokenizer, model):
    "A plain one, for short answers to requests never taught: a flipped sign makes them longer."
    with torch.no_grad():
        model.model.norm.weight *= 0.3  # so that there is something to choose from
    reference, lesson = pr.frozen(model), talks(6, 0)
    log = list(
        rw.grpo(
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
    seen, objective = [], rw.grpo_objective

    def spy(log_p, log_old, *rest):
        seen.append((log_p.detach().clone(), log_old.clone()))
        return objective(log_p, log_old, *rest)

    monkeypatch.setattr(rw, "grpo_objective", spy)
    list(
        rw.grpo(
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
                rw.grpo(model, reference, tokenizer, [talks(2, 0)], reward=lambda *a: bad, group=4)
            ),
        )
    one_sentence(
        "updates is 0",
        lambda: next(rw.grpo(model, reference, tokenizer, [talks(2, 0)], group=4, updates=0)),
    )
    one_sentence("5 answers to 2 questions", lambda: pr.right_or_wrong(["a"] * 5, talks(2, 0)))
    one_sentence(
        "nothing .* is to be trained",
        lambda: next(rw.grpo(pr.frozen(model), reference, tokenizer, [talks(2, 0)], group=4)),
    )
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    assert (
        next(
            rw.grpo(
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


def test_k3_is_right_only_for_samples_of_the_model():
    torch.manual_seed(1)
    p, ref = (torch.randn(30, dtype=torch.float64).softmax(0) for _ in "pr")
    kl, k3 = (p * (p / ref).log()).sum(), rw.kl_estimate(p.log(), ref.log())
    torch.testing.assert_close((p * k3).sum(), kl)
    assert ((ref * k3).sum() - kl).abs() > 0.1 * kl


def test_where_nothing_has_moved_it_is_the_policy_gradient():
    "The gradient of the clipped ratio is that of A log p, averaged as the objective does."
    torch.manual_seed(0)
    scores = torch.randn(4, 6, 9, dtype=torch.float64, requires_grad=True)
    drawn, A = torch.randint(9, (4, 6, 1)), torch.randn(4, dtype=torch.float64)
    graded = torch.rand(4, 6) < 0.6
    graded[:, 0] = True
    log_p = scores.log_softmax(-1).gather(-1, drawn)[..., 0]
    old = log_p.detach()
    (clipped,) = torch.autograd.grad(
        rw.grpo_objective(log_p, old, old, A, graded), scores, retain_graph=True
    )
    plain = ((A[:, None] * log_p * graded).sum(1) / graded.sum(1)).mean()
    (policy,) = torch.autograd.grad(plain, scores)
    torch.testing.assert_close(clipped, policy)


def test_groups_of_one_are_refused():
    for bad in (torch.ones(4, 1), torch.ones(4)):
        one_sentence("rewards has shape", lambda: rw.advantages(bad))


def test_the_reference_is_another_model(tokenizer, model):
    one_sentence(
        "the reference is the model itself",
        lambda: next(rw.grpo(model, model, tokenizer, [talks(2, 0)])),
    )
