"""Rows: texts end to end, conversations whole and only the model graded, documents apart."""

from random import Random

import numpy as np
import pytest
import torch

from qwen_nb.data import world_stories
from qwen_nb.finetune import answer_example
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.prompt import encode_chat
from qwen_nb.rows import IGNORED, Packed, document_mask, lay_whole, said_by_model, talk_marks
from qwen_nb.shards import Shards, write_shards
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.world import Chooser, conversation


@pytest.fixture(scope="module")
def texts():
    return world_stories(60, seed=3)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, 400)


@pytest.fixture
def folder(tmp_path, texts, tokenizer):
    write_shards(tmp_path / "d", texts, tokenizer, shard_tokens=1000)
    return tmp_path / "d"


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 450


@pytest.mark.parametrize("seq_len", [1, 5, 64, 700])
def test_rows(folder, seq_len):
    shards = Shards(folder)
    rows, ends = Packed(shards, seq_len), set(shards.starts[1:].tolist())
    ids = shards[:].tolist()
    assert len(rows) == (len(ids) - 1) // seq_len
    for i in range(len(rows)):
        row, document, position = rows.row(i), 0, 0
        for t in range(seq_len):
            k = i * seq_len + t
            if k in ends and t:
                document, position = document + 1, 0
            assert (
                row["input_ids"][t] == ids[k]
                and row["document_ids"][t] == document
                and row["position_ids"][t] == position
            )
            assert row["labels"][t] == (-100 if k + 1 in ends else ids[k + 1])
            position += 1
    one_sentence("use a shorter seq_len", lambda: Packed(shards, len(ids)))
    for bad in (0, -3):
        one_sentence("seq_len is", lambda: Packed(shards, bad))
    assert len(Packed(shards, len(ids) - 1)) == 1


def test_a_step_has_its_batch(folder):
    rows = Packed(Shards(folder), 64)
    steps, fresh = [rows.batch(s, 6, seed=1) for s in range(20)], Packed(Shards(folder), 64)
    for s in (13, 2, 19):
        assert all(torch.equal(fresh.batch(s, 6, seed=1)[k], steps[s][k]) for k in steps[s])
    numbers = np.concatenate([rows.order(1, e) for e in range(3)])
    assert (
        all(sorted(rows.order(1, e)) == list(range(len(rows))) for e in range(3))
        and len({tuple(rows.order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    )
    assert torch.equal(
        torch.cat([s["input_ids"] for s in steps]),
        torch.stack([rows.row(i)["input_ids"] for i in numbers[:120]]),
    )


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_no_document_sees_another(folder, dtype, close):
    torch.manual_seed(0)
    model = Qwen(QwenConfig(400, 64, 96, 3, 4, 2, 16)).to(dtype)
    batch = Packed(Shards(folder), 300).rows([0, 1, 2])
    ids, documents, mask = (
        batch["input_ids"],
        batch["document_ids"],
        document_mask(batch["document_ids"]),
    )
    with torch.no_grad():
        got = model.head(model.model(ids, batch["position_ids"], mask))
        open_ = model.head(model.model(ids, batch["position_ids"], None))
        for b in range(3):
            assert documents[b].max() > 0
            for d in documents[b].unique():
                mine = documents[b] == d
                alone = model(ids[b : b + 1, mine])[0]
                assert (got[b, mine] - alone).abs().max() < close
                if d:
                    assert (open_[b, mine] - alone).abs().max() > 1e-3


# ---- conversations


def talks(n=40):
    return [conversation(Chooser(Random(f"rows {i}")), [1, 2, 3]) for i in range(n)]


PACKAGED = Tokenizer.from_pretrained(packaged_model())


@pytest.mark.parametrize("thinks", [True, False])
def test_what_is_graded_is_what_tuning_grades(thinks):
    "Of the last answer, exactly the labels of `answer_example`; before it, the answers alone."
    marks = talk_marks(PACKAGED)
    for messages in talks():
        *before, last = messages
        if not thinks:
            last = last | dict(reasoning_content="")
        ids = encode_chat(PACKAGED, [*before, last], "qwen3", add_generation_prompt=False)
        said = said_by_model(ids, marks)
        example = answer_example(PACKAGED, [*before, last], "qwen3")
        start = len(ids) - 1 - ids[::-1].index(PACKAGED.special["<|im_start|>"])
        labels = [i if graded else IGNORED for i, graded in zip(ids, said)]
        n = len(example["labels"])
        assert labels[start:][1 : n - start + 1] == example["labels"][start:]
        earlier = PACKAGED.decode([i for i, graded in zip(ids[:start], said) if graded])
        assert earlier == "".join(f"{m['content']}<|im_end|>" for m in before[1::2])


@pytest.mark.parametrize("seq_len", [64, 200, 512])
def test_no_conversation_is_cut(tmp_path, texts, seq_len):
    write_shards(tmp_path, dict(train=texts + talks(), held_out=[]), PACKAGED)
    shards = Shards(tmp_path)
    rows = Packed(shards, seq_len)
    marks, start = talk_marks(PACKAGED), PACKAGED.special["<|im_start|>"]
    found, text = [], []
    for i in range(len(rows)):
        row = rows.row(i)
        assert all(t.shape == (seq_len,) and t.dtype == torch.int64 for t in row.values())
        for d in row["document_ids"].unique():
            here = row["document_ids"] == d
            ids, labels = row["input_ids"][here].tolist(), row["labels"][here].tolist()
            assert row["position_ids"][here].tolist() == list(range(len(ids)))
            if start in ids:
                said = said_by_model(ids, marks)
                want = [i if graded else IGNORED for i, graded in zip(ids, said)]
                assert labels == want[1:] + [IGNORED]
                found.append(ids)
            elif not set(labels) == {IGNORED} or len(ids) > 1 and any(ids):
                text += ids
    whole = [shards.document(i).tolist() for i in range(len(texts), shards.documents)]
    fit = [ids for ids in whole if len(ids) <= seq_len]
    assert sorted(found) == sorted(fit) and rows.too_long == len(whole) - len(fit)
    assert (seq_len == 64) == (rows.too_long > 0)
    assert len(text) == shards.starts[len(texts)]  # nothing of the texts is lost either


def test_a_text_shorter_than_a_row_is_read_beside_conversations(tmp_path):
    write_shards(tmp_path, dict(train=["Max has the ball.\n", *talks(3)], held_out=[]), PACKAGED)
    rows = Packed(Shards(tmp_path), 512)
    assert rows.text_rows == 0
    graded = [rows.row(i)["labels"] for i in range(len(rows))]
    ids = torch.cat(graded)
    assert PACKAGED.decode(ids[ids != IGNORED].tolist()).startswith(" has the ball.")


def test_lay_whole():
    for seed in range(50):
        rng = Random(seed)
        lengths = [rng.randint(1, 30) for _ in range(200)]
        rows = lay_whole(lengths, 30)
        assert sorted(i for row in rows for i in row) == list(range(200))
        assert all(sum(lengths[i] for i in row) <= 30 for row in rows)
        assert len(rows) < 1.2 * sum(lengths) / 30 + 2
    assert lay_whole([], 5) == [] and lay_whole([5, 5], 5) == [[0], [1]]


def test_a_row_that_is_mostly_filling_is_refused(tmp_path):
    "Conversations beside a short text are laid into rows, but not into far longer ones."
    write_shards(tmp_path, dict(train=["Max has the ball.\n", *talks(3)], held_out=[]), PACKAGED)
    with pytest.raises(ValueError, match="use a shorter seq_len or more text"):
        Packed(Shards(tmp_path), 100_000)
