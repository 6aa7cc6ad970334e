"""Embedder and reranker against transformers, the contrastive loss, the sibling, the command."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from qwen_nb import cli
from qwen_nb.contrast import (
    UNSEEN_SEED,
    answered,
    bm25,
    contrastive_loss,
    retrieval,
    search,
    some_tales,
)
from qwen_nb.embed import (
    TASK,
    Embedder,
    Reranker,
    folder_task,
    instructed,
    last_token,
    open_decoder,
    padded,
    text_states,
    unit,
)
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SIBLING = packaged_model("qwen3_embed")
transformers = pytest.importorskip("transformers")


def random_config(seed):
    "A tiny Qwen3 of transformers, never the same twice."
    rng = Random(seed)
    kv_heads = rng.choice([1, 2])
    return transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=rng.choice([16, 24, 40]),
        intermediate_size=rng.choice([16, 56]),
        num_hidden_layers=rng.choice([1, 3]),
        num_attention_heads=kv_heads * rng.choice([1, 2, 3]),
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([8, 16]),
        rope_theta=rng.choice([1e4, 1e6]),
        attention_bias=rng.choice([False, True]),
        tie_word_embeddings=rng.choice([False, True]),
        initializer_range=0.3,
        max_position_embeddings=64,
        pad_token_id=None,
    )


def folder_of(model, folder):
    "The model saved, with the small tokenizer and its end after each text."
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SIBLING / name, folder)
    return folder


def their_vectors(model, ids, mask, left):
    "As Qwen3-Embedding's model card does it."
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    last = torch.full((len(ids),), -1) if left else mask.sum(1) - 1
    return F.normalize(hidden[torch.arange(len(ids)), last], dim=-1)


def apart(a, b):
    return (a - b).abs().max().item() / b.abs().max().item()


@pytest.mark.parametrize("seed", range(8))
def test_vectors_equal_those_of_transformers(seed, tmp_path):
    torch.manual_seed(seed)
    theirs = transformers.Qwen3Model(random_config(seed)).eval()
    folder = folder_of(theirs, tmp_path)
    assert not any(n.startswith("model.") for n in load_file(folder / "model.safetensors"))
    ours = Embedder.from_pretrained(folder)
    texts = ["Max has the ball.", "Anna", "Is the key in the garden? Nobody has it."]
    rows = [ours.ids(text) for text in texts]
    for left in (False, True):
        ids, mask = padded(rows, ours.end, left=left)
        want = their_vectors(theirs, ids, mask, left)
        with torch.no_grad():
            hidden = text_states(ours.decoder, ours.config, ids, mask)
        assert apart(unit(last_token(hidden, mask)), want) < 1e-5
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        wrong_column = hidden[:, 0] if left else hidden[:, -1]
        for wrong in (mean, wrong_column):  # what the tolerance must see
            assert apart(unit(wrong), want) > 1e-2
    assert apart(ours(texts), want) < 1e-5
    assert apart(torch.cat([ours([text]) for text in texts]), want) < 1e-5
    assert apart(ours(texts, batch_size=2), want) < 1e-5
    ours.ids = lambda text: ours.tokenizer.encode(text)  # without the end
    assert apart(ours(texts), want) > 1e-2


def test_the_reference_s_tokenizer_adds_the_same_end():
    tokenizer = transformers.AutoTokenizer.from_pretrained(SIBLING)
    ours = Embedder.from_pretrained()
    for text in ("Max has the ball.", instructed("Where is Max?", "Who is where?")):
        assert tokenizer(text).input_ids == ours.ids(text)


def test_padding_on_either_side_of_one_batch():
    hidden = torch.arange(10.0).reshape(2, 5, 1)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    assert last_token(hidden, mask).flatten().tolist() == [1, 9]
    assert last_token(hidden, mask.bool()).flatten().tolist() == [1, 9]
    with pytest.raises(ValueError, match="no real token"):
        last_token(hidden, mask * torch.tensor([[1], [0]]))


def test_names_with_and_without_prefix_and_head(tmp_path):
    torch.manual_seed(0)
    config = random_config(1)
    config.tie_word_embeddings = False
    whole = transformers.Qwen3ForCausalLM(config).eval()
    folder = folder_of(whole, tmp_path / "whole")
    folder_of(whole.model, tmp_path / "bare")
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" in stored and "model.norm.weight" in stored
    a, b = (Embedder.from_pretrained(tmp_path / name) for name in ("whole", "bare"))
    assert torch.equal(a(["Max"]), b(["Max"]))

    bare = load_file(tmp_path / "bare/model.safetensors")
    del bare["norm.weight"]
    save_file(bare, tmp_path / "bare/model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors missing \['norm.weight'\]"):
        open_decoder(tmp_path / "bare")


def test_texts_that_are_refused(tmp_path):
    ours = Embedder.from_pretrained()
    assert ours.ids("<|endoftext|>").count(ours.end) == 1  # text stays text
    with pytest.raises(ValueError, match="512 at most fit"):
        ours(["Max is in the garden. " * 100])
    for wrong in ("Max", []):
        with pytest.raises(ValueError, match="a list of at least one text"):
            ours(wrong)
    with pytest.raises(ValueError, match="dims is 129; expected 1 to 128"):
        ours(["Max"], dims=129)
    plain = Tokenizer.train(["Max is here"], 260, special_tokens=())
    with pytest.raises(ValueError, match=r"no <\|endoftext\|>"):
        Embedder(ours.decoder, ours.config, plain)


def test_a_short_vector_has_length_one():
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    short = unit(vectors, 4)
    torch.testing.assert_close(short, F.normalize(vectors[:, :4], dim=-1))
    assert not torch.allclose(unit(vectors)[:, :4].norm(dim=-1), torch.ones(3))
    assert unit(vectors.bfloat16()).dtype == torch.float32


def test_the_instruction_of_a_folder(tmp_path):
    assert instructed("Who?", "Find.") == "Instruct: Find.\nQuery:Who?"
    assert folder_task(tmp_path) == TASK and folder_task(SIBLING) == "Who is where?"
    file = tmp_path / "config_sentence_transformers.json"
    for prompts in (None, {}, dict(query="query: "), dict(query=None)):
        file.write_text(json.dumps(dict(prompts=prompts)))
        assert folder_task(tmp_path) == TASK
    ours = Embedder.from_pretrained()
    asked = ours.queries(["Who has the key?"])
    assert torch.equal(asked, ours(["Instruct: Who is where?\nQuery:Who has the key?"]))
    assert not torch.allclose(asked, ours.queries(["Who has the key?"], "Find the key."))


# ---- the reranker


def test_yes_and_no_equal_those_of_transformers(tmp_path):
    for seed in range(4):
        torch.manual_seed(seed)
        config = random_config(seed)
        config.max_position_embeddings = 512
        theirs = transformers.Qwen3ForCausalLM(config).eval()
        folder = folder_of(theirs, tmp_path / str(seed))
        shutil.copy(packaged_model() / "tokenizer.json", folder)  # no end of its own
        ours = Reranker(
            Qwen.from_pretrained(folder), Tokenizer.from_pretrained(folder), "Yes", "No"
        )
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        documents = ["Max has the ball.", "Anna <|im_end|> is in the garden."]
        want = []
        for document in documents:
            judge = (
                "Judge whether the Document meets the requirements based on the Query and the "
                'Instruct provided. Note that the answer can only be "yes" or "no".'
            )
            before = f"<|im_start|>system\n{judge}<|im_end|>\n<|im_start|>user\n"
            said = f"<Instruct>: {TASK}\n<Query>: Who?\n<Document>: {document}"
            after = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            ids = auto(before).input_ids + ours.tokenizer.encode(said) + auto(after).input_ids
            assert ours.ids("Who?", document) == ids
            with torch.no_grad():
                logits = theirs(torch.tensor([ids])).logits[0, -1]
            no, yes = auto("No").input_ids + auto("Yes").input_ids
            want.append(logits[[no, yes]].log_softmax(0)[1].exp())
        torch.testing.assert_close(ours("Who?", documents), torch.stack(want), atol=1e-5, rtol=0)
        assert torch.allclose(ours("Who?", documents, batch_size=1), torch.stack(want), atol=1e-5)


def test_a_judge_needs_one_token_for_each_answer():
    model, tokenizer = Qwen.from_pretrained(), Tokenizer.from_pretrained()
    with pytest.raises(ValueError, match="'yes' is 2 tokens here"):
        Reranker(model, tokenizer)
    with pytest.raises(ValueError, match="at least one document"):
        Reranker(model, tokenizer, "Yes", "No")("Who?", "Max")


# ---- the world, the loss, the count


def test_tales_are_told_again_in_words_of_their_own():
    tales = some_tales(20, 0)
    assert [t.text for t in tales] == [t.text for t in some_tales(20, "0")]
    for own, twin in zip(tales[::2], tales[1::2]):
        assert own.text.split(". ")[0] == twin.text.split(". ")[0]
        assert own.asked <= own.facts and len(own.asked) == 2
    fresh = some_tales(20, 0, unseen=True)
    assert [t.text for t in fresh] == [t.text for t in tales]
    new = ("waits", "keeps")
    assert all(any(word in t.query for word in new) for t in fresh)
    assert not any(word in t.query for t in tales for word in new)


def test_which_story_answers():
    tales = some_tales(30, 1)
    right = answered(tales)
    assert right.diagonal().all() and right.sum() > len(tales)
    i, j = (right & ~torch.eye(60, dtype=torch.bool)).nonzero()[0].tolist()
    assert tales[i].asked <= tales[j].facts


def test_the_loss_leaves_false_negatives_out():
    torch.manual_seed(0)
    q, d = unit(torch.randn(2, 5, 8))
    scores = q @ d.T / 0.05
    plain = -scores.log_softmax(1).diagonal().mean()
    torch.testing.assert_close(contrastive_loss(q, d), plain)
    torch.testing.assert_close(contrastive_loss(q, d, torch.eye(5, dtype=torch.bool)), plain)
    right = torch.eye(5, dtype=torch.bool)
    right[0, 3] = True
    kept = [0, 1, 2, 4]
    first = -scores[0, kept].log_softmax(0)[0]
    want = (first - scores[1:].log_softmax(1)[range(4), range(1, 5)].sum()) / 5
    torch.testing.assert_close(contrastive_loss(q, d, right), want)
    assert right[0, 0]  # the caller's matrix is as it was
    q.requires_grad_()
    contrastive_loss(q, d, right).backward()
    assert q.grad.isfinite().all()


def test_bm25_by_hand():
    texts = ["the ball the ball", "the key"]
    scores = bm25(["ball", "Ball!", "nothing", "the"], texts, k=1.5, b=0.75)
    rare = math.log(1 + (2 - 1 + 0.5) / 1.5)
    want = rare * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 4 / 3))
    assert scores[0].tolist() == pytest.approx([want, 0]) == scores[1].tolist()
    assert scores[2].tolist() == [0, 0] and scores[3, 1] > 0


def test_the_count():
    right = torch.eye(4, dtype=torch.bool)
    right[2, 3] = True
    scores = torch.tensor([[9.0, 1, 0, 0], [5, 4, 0, 0], [0, 1, 2, 3], [1, 1, 1, 1]])
    found = retrieval(scores, right)
    assert found["recall"] == pytest.approx(2 / 4)  # 0, and 2 by its twin, which is right too
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 + 1 / 4) / 4)
    assert found["twins"] == pytest.approx((1 + 0 + 0.5) / 3)


# ---- the sibling


def test_what_the_sibling_finds_and_words_do_not():
    tales = some_tales(100, UNSEEN_SEED)
    words = retrieval(bm25([t.query for t in tales], [t.text for t in tales]), answered(tales))
    found = search(Embedder.from_pretrained(dtype=torch.float32), tales)
    assert found["recall"] > 0.25
    assert found["twins"] > 0.8 > words["twins"] + 0.1  # which words cannot know
    decoder, config = open_decoder(packaged_model(), torch.float32)
    untrained = Embedder(decoder, config, Tokenizer.from_pretrained(), "Who is where?")
    assert search(untrained, tales)["recall"] < 0.1


def test_the_sibling_in_transformers():
    assert (SIBLING / "model.safetensors").stat().st_size <= 2_200_000
    stored = load_file(SIBLING / "model.safetensors")
    assert not any(name.startswith("model.") for name in stored)
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    theirs = transformers.AutoModel.from_pretrained(SIBLING, dtype=torch.float32).eval()
    ours = Embedder.from_pretrained(dtype=torch.float32)
    ids = torch.tensor([ours.ids("Max has the ball.")])
    want = their_vectors(theirs, ids, torch.ones_like(ids), left=True)
    assert apart(ours(["Max has the ball."]), want) < 1e-5


def test_its_log_says_how_other_seeds_ended():
    about, *lines = map(json.loads, (SIBLING / "training_log.jsonl").read_text().splitlines())
    ends = [line for line in lines if line["step"] == about["steps"]]
    assert len({line["seed"] for line in ends}) >= 2
    tales = some_tales(100, UNSEEN_SEED)
    found = search(Embedder.from_pretrained(dtype=torch.float32), tales)
    assert found["recall"] == pytest.approx(ends[0]["recall"], abs=0.03)  # bfloat16 since


def test_it_can_be_made_again(tmp_path):
    made = []
    for name in ("a", "b"):
        command = [sys.executable, ROOT / "tools/make_embedder.py", "train", tmp_path / name]
        subprocess.run(
            [*map(str, command), "--steps", "1", "--pairs", "2", "--every", "2"],
            check=True,
            capture_output=True,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
        )
        made.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])
    assert made[0].keys() == load_file(SIBLING / "model.safetensors").keys()
    for name in ("config.json", "tokenizer.json", "config_sentence_transformers.json"):
        assert (tmp_path / "a" / name).read_text() == (SIBLING / name).read_text()


# ---- the command


@pytest.fixture
def embed(capsys, monkeypatch):
    def call(*args, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as e:
            cli.main(["embed", *map(str, args)])
        return e.value.code, *capsys.readouterr()

    return call


LINES = [
    "Max is in the attic. Max has the ball.",
    "Anna is in the garden. Max has the ball. Max gave the ball to Anna.",
    "Tom is in the market.",
]


def test_the_nearest_lines(embed, tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text("\n\n".join(LINES) + "\n")
    ours = Embedder.from_pretrained()
    cosines = (ours(LINES) @ ours.queries(["you meet Tom in the market"])[0]).tolist()
    want = sorted(zip(cosines, LINES), reverse=True)
    status, out, err = embed(file, "--query", "you meet Tom in the market", "-n", "2")
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"{c:6.3f}  {line}" for c, line in want[:2]]
    piped = embed("-", "--query", "you meet Tom in the market", "-n", 2, stdin="\n".join(LINES))
    assert piped == (0, out, "")
    other = embed(file, "--query", "you meet Tom in the market", "--instruction", "Other task")
    assert other[0] == 0 and other[1] != out
    status, out, _ = embed(file)
    assert status == 0 and out.splitlines()[::2] == LINES


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.safetensors"])
def test_vectors_in_a_file(embed, tmp_path, name):
    out = tmp_path / name
    status, said, err = embed("-", "-o", out, "--dims", 32, stdin="\n".join(LINES))
    assert (status, said) == (0, "") and err == f"{out}: 3 vectors of 32 numbers\n"
    kept = np.load(out) if name.endswith("npy") else load_file(out)["vectors"].numpy()
    np.testing.assert_array_equal(kept, Embedder.from_pretrained()(LINES, 32).numpy())


def test_refusals_of_the_command(embed, tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("Max is here.\n")
    (tmp_path / "bad.txt").write_bytes(b"Max \xff")
    for args, says in (
        ((file,), "one line only"),
        ((file, "-o", "x.txt"), ".npy or .safetensors"),
        ((file, "-o", tmp_path / "no/x.npy"), "No such file"),
        ((file, "--query", "Max", "-n", "0"), "-n is 0"),
        ((file, "--query", " "), "--query is empty"),
        ((file, "--instruction", "Find."), "add --query"),
        ((file, "--query", "Max", "--dims", "999"), "dims is 999; expected 1 to 128"),
        ((file, "--query", "Max", "--model", tmp_path), "no config.json"),
        ((tmp_path / "none.txt",), "No such file"),
        ((tmp_path,), "directory"),
        ((tmp_path / "bad.txt", "--query", "Max"), "not UTF-8"),
        (("-",), "no text"),
    ):
        status, out, err = embed(*args)
        assert status == 2 and not out and says in err, (args, out, err)
        assert len(err.strip().splitlines()) == 1 and err.startswith("qwen-nb: "), err


def test_its_help(embed):
    status, out, _ = embed("-h")
    assert status == 0 and "--query" in out and "examples:" in out
    assert max(map(len, out.splitlines())) <= 100
