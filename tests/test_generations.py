"""Training every generation: what is written comes back, runs resume exactly, and a mixture's
balancing loss is the reference's."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers

from qwen_nb.budget import Objective, label_weight
from qwen_nb.data import world_stories
from qwen_nb.durable import checkpoints, config_json, load_checkpoint, save_pretrained
from qwen_nb.hub import open_weights
from qwen_nb.log import read_log
from qwen_nb.mixture import MoEConfig
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.moe import unfuse
from qwen_nb.qwen1 import Qwen1Config
from qwen_nb.qwen3_5 import HybridConfig
from qwen_nb.qwen3_5_moe import MoEHybridConfig
from qwen_nb.qwen3_next import NextConfig
from qwen_nb.resume import OneProcess, Run
from qwen_nb.rows import IGNORED
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig, model_config
from qwen_nb.shards import write_shards
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.train import forward, init_weights, next_token_loss


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 600


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def final_weights(out):
    return load_checkpoint(checkpoints(out)[-1])["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out):
    return [line["loss"] for line in read_log(out)]


GENERATIONS = dict(
    qwen1=Qwen1Config(97, 32, 48, 2, 2, head_dim=16, seq_length=32),
    qwen2=QwenConfig(97, 32, 48, 2, 4, 2, 16, 64, 1e4, qkv_bias=True, qk_norm=False),
    qwen3_moe=MoEConfig(
        97,
        32,
        48,
        2,
        4,
        2,
        16,
        64,
        1e4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0],
        router_aux_loss_coef=0.1,
    ),
    qwen2_moe=MoEConfig(
        97,
        32,
        48,
        2,
        4,
        2,
        8,
        64,
        1e4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        qkv_bias=True,
        qk_norm=False,
        router_aux_loss_coef=0.1,
    ),
    qwen3_5=HybridConfig(
        97,
        32,
        48,
        4,
        2,
        1,
        16,
        64,
        1e4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    qwen3_next=NextConfig(
        97,
        32,
        48,
        4,
        2,
        1,
        16,
        64,
        1e4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        router_aux_loss_coef=0.1,
    ),
    qwen3_5_moe=MoEHybridConfig(
        97,
        32,
        512,  # of a dense MLP: there is none, and no file says it
        4,
        2,
        1,
        16,
        64,
        1e4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        router_aux_loss_coef=0.1,
    ),
)


@pytest.mark.parametrize("family", GENERATIONS)
def test_a_written_model_of_any_generation_comes_back(tmp_path, family):
    model, ids = (
        init_weights(Qwen(GENERATIONS[family])).eval(),
        torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0)),
    )
    save_pretrained(model, tmp_path / "m", dtype=torch.float32)
    again = Qwen.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert type(again.config) is type(model.config) and torch.equal(again(ids), model(ids))
    assert again.config == model_config(tmp_path / "m" / "config.json") and vars(
        again.config
    ) == vars(model.config) | {k: v for k, v in vars(again.config).items() if k == "windows"}
    stored = set(open_weights(tmp_path / "m"))
    if family == "qwen1":
        assert "transformer.h.0.attn.c_attn.bias" in stored
    else:
        with torch.no_grad():
            theirs = reference(tmp_path / "m")(ids).logits
        assert (again(ids) - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", GENERATIONS)
def test_a_run_of_any_generation_resumes_exactly(tmp_path, family):
    (tmp_path / "small.json").write_text(
        json.dumps(
            config_json(
                replace(
                    GENERATIONS[family],
                    vocab_size=512,
                    **({} if family == "qwen1" else dict(max_position_embeddings=256)),
                )
            )
        )
    )

    def config(out, **kw):
        return TrainConfig(
            out=str(tmp_path / out),
            config_from=str(tmp_path / "small.json"),
            steps=4,
            batch_size=2,
            seq_len=128,
            save_every=2,
            keep=0,
            log_every=1,
            eval_every=4,
            eval_batches=1,
            **kw,
        )

    whole = train(config("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for late in ("half/step-000004", "half/final"):
        shutil.rmtree(tmp_path / late)
    assert (
        train(config("half"))
        and same(final_weights(tmp_path / "half"), final_weights(tmp_path / "whole"))
        and losses(tmp_path / "half") == losses(tmp_path / "whole")
    )
    assert "sample" in read_log(tmp_path / "half")[-1] and type(
        Qwen.from_pretrained(whole).config
    ) is type(GENERATIONS[family])
    before, after = (
        load_checkpoint(c)["weights"]
        for c in (checkpoints(tmp_path / "whole")[0], checkpoints(tmp_path / "whole")[-1])
    )
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still, f"not trained: {still}"


@pytest.mark.parametrize("family", GENERATIONS)
def test_any_generation_trains_on_documents(tmp_path, family):
    "Rows of a prepared text hold several documents: the first loss is that of each document alone."
    tokenizer = Tokenizer.train(world_stories(60, seed=3), 400)
    write_shards(tmp_path / "data", world_stories(60, seed=3), tokenizer)
    sizes = replace(
        GENERATIONS[family],
        vocab_size=448,
        **({} if family == "qwen1" else dict(max_position_embeddings=256)),
        **(
            dict(router_aux_loss_coef=0)
            if hasattr(GENERATIONS[family], "router_aux_loss_coef")
            else {}
        ),
    )
    (tmp_path / "c.json").write_text(json.dumps(config_json(sizes)))
    config = TrainConfig(
        out=str(tmp_path / "o"),
        config_from=str(tmp_path / "c.json"),
        data=str(tmp_path / "data"),
        steps=2,
        batch_size=3,
        seq_len=200,
        log_every=1,
        eval_every=0,
    )
    train(config)
    run = Run(config, OneProcess("cpu"))
    batch = run.rows.batch(0, 3, config.seed)
    assert batch["document_ids"].amax() > 0
    total = 0.0
    for ids, labels, documents in zip(batch["input_ids"], batch["labels"], batch["document_ids"]):
        for d in documents.unique():
            here = documents == d
            with torch.no_grad():
                logits = run.model(ids[here][None])
            total += torch.nn.functional.cross_entropy(
                logits[0], labels[here], ignore_index=IGNORED, reduction="sum"
            ).item()
    assert losses(tmp_path / "o")[0] == pytest.approx(
        total / (batch["labels"] != IGNORED).sum().item(), rel=1e-6
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "qwen3_next"])
def test_a_run_with_idle_experts_resumes_exactly(tmp_path, family):
    "An expert that no token chose for some steps. AdamW counts its steps as those of the others."
    (tmp_path / "many.json").write_text(
        json.dumps(
            config_json(
                replace(
                    GENERATIONS[family], vocab_size=512, max_position_embeddings=256, num_experts=96
                )
            )
        )
    )

    def config(out):
        return TrainConfig(
            out=str(tmp_path / out),
            config_from=str(tmp_path / "many.json"),
            steps=8,
            batch_size=1,
            seq_len=128,
            save_every=2,
            keep=0,
            log_every=1,
            eval_every=0,
        )

    train(config("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for late in ("half/step-000004", "half/step-000006", "half/step-000008", "half/final"):
        shutil.rmtree(tmp_path / late)
    moments = load_checkpoint(tmp_path / "half/step-000002")["moments"]
    busy = {
        name: m.any().item()
        for name, m in moments.items()
        if "exp_avg." in name and ".experts." in name
    }
    assert (
        any(busy.values())
        and not all(busy.values())
        and len(busy)
        == 3 * 96 * sum(".mlp.gate." in name and "exp_avg." in name for name in moments)
    )
    train(config("half"))
    assert losses(tmp_path / "half") == losses(tmp_path / "whole") and same(
        final_weights(tmp_path / "half"), final_weights(tmp_path / "whole")
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "qwen3_next"])
def test_the_balancing_loss_is_trained_on(tmp_path, family):
    """The reference's loss with its router's, and every gradient of it. A row that was filled up:
    the filling does not count."""
    save_pretrained(init_weights(Qwen(GENERATIONS[family])), tmp_path / "m", dtype=torch.float32)
    ours, theirs = Qwen.from_pretrained(tmp_path / "m").train(), reference(tmp_path / "m")
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, 12:] = IGNORED
    batch = dict(
        input_ids=ids[:, :-1],
        labels=labels,
        document_ids=torch.zeros(2, 20, dtype=torch.long),
        position_ids=torch.arange(20).expand(2, -1),
    )
    (Objective(ours)(batch) / label_weight(batch)).backward()
    real = torch.ones(2, 20, dtype=torch.long)
    real[0, 12:] = 0
    out = theirs(batch["input_ids"], attention_mask=real, output_router_logits=True)
    (next_token_loss(out.logits, labels) + 0.1 * out.aux_loss).backward()
    for name, p in unfused_gradients(theirs).items():
        assert (ours.get_parameter(name).grad - p).norm() <= 1e-4 * p.norm(), name
    routers = [name for name, p in ours.named_parameters() if name.endswith("mlp.gate.weight")]
    ours.zero_grad()
    (next_token_loss(forward(ours, batch), labels)).backward()
    for name in routers:
        assert (
            ours.get_parameter(name).grad - unfused_gradients(theirs)[name]
        ).norm() > 1e-3 * unfused_gradients(theirs)[name].norm()


def unfused_gradients(theirs):
    return unfuse({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})


def test_what_does_not_fit(tmp_path):
    for wrong, match in (
        (dict(config_from="nowhere.json"), "there is no nowhere.json"),
        (dict(config_from=str(tmp_path)), "there is no config.json"),
        (dict(config_from="a", init_from="b"), "expected one of them"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            train(TrainConfig(out=str(tmp_path / "o"), **wrong))
    (tmp_path / "c.json").write_text(json.dumps(config_json(GENERATIONS["qwen2"])))
    one_sentence(
        "the tokenizer has 457 ids, the model only 97 rows",
        lambda: train(
            TrainConfig(out=str(tmp_path / "o"), config_from=str(tmp_path / "c.json"), seq_len=128)
        ),
    )
    one_sentence(
        "hidden_size is 64, but config_from, .*c.json, has 32",
        lambda: train(
            TrainConfig(
                out=str(tmp_path / "o2"), config_from=str(tmp_path / "c.json"), hidden_size=64
            )
        ),
    )


def test_more_rows_than_the_file_says(tmp_path):
    "The sentence about the 97 rows says to set vocab_size: so that has to help."
    (tmp_path / "c.json").write_text(
        json.dumps(config_json(replace(GENERATIONS["qwen3_5"], max_position_embeddings=256)))
    )
    final = train(
        TrainConfig(
            out=str(tmp_path / "o"),
            config_from=str(tmp_path / "c.json"),
            vocab_size=512,
            steps=1,
            batch_size=1,
            seq_len=128,
            eval_every=0,
        )
    )
    assert Qwen.from_pretrained(final).config == replace(
        GENERATIONS["qwen3_5"], max_position_embeddings=256, vocab_size=512
    )


def test_a_changed_model_config_is_another_run(tmp_path):
    c = replace(GENERATIONS["qwen2"], vocab_size=512, max_position_embeddings=256)

    def write(c):
        (tmp_path / "c.json").write_text(json.dumps(config_json(c)))

    def go():
        return train(
            TrainConfig(
                out=str(tmp_path / "o"),
                config_from=str(tmp_path / "c.json"),
                steps=1,
                batch_size=1,
                seq_len=128,
                eval_every=0,
            )
        )

    write(c)
    go()
    write(replace(c, rope_theta=5e4))
    one_sentence("rope_theta of the model was 10000.0 and is now 50000.0", go)
