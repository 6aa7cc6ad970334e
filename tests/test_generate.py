"""Writing text: against transformers on random checkpoints, the cache against no cache, text as it
streams, and what is refused."""

import json
import random
import shutil
import threading
import time

import pytest
import torch
from test_model import random_checkpoint
from tokenizers import Tokenizer

from qwen_nb.beams import beam_search
from qwen_nb.cache import KVCache, cache_bytes, count_rows, one_row_kernels
from qwen_nb.generation import TextStream, check_prompt, generate, max_positions, stream
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.sampling import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    marks,
    penalize_repetition,
    sampling_for,
)
from qwen_nb.tokenizer import Tokenizer as OurTokenizer
from qwen_nb.verify import rounding_steps
from qwen_nb.writing import pad_left

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def packaged():
    "The packaged model, ours and theirs, in float32."
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        packaged_model(), dtype=torch.float32
    )
    theirs.generation_config = transformers.GenerationConfig()
    return Qwen.from_pretrained(dtype="float32"), theirs.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(packaged_model() / "tokenizer.json"))


def pair(folder, seed, dtype="float32"):
    "A random checkpoint, ours and theirs, and some ids."
    ids, _ = random_checkpoint(folder, seed)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    ).eval()
    theirs.generation_config = transformers.GenerationConfig()
    return Qwen.from_pretrained(folder, dtype=dtype), theirs, ids


def reference(model, ids, new, mask=None, **kw):
    kw = dict(do_sample=False, eos_token_id=None, pad_token_id=0) | kw
    return model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=new, **kw
    )


def ours(model, ids, new=None, mask=None, **kw):
    return generate(
        model,
        ids,
        new,
        mask,
        **dict(
            temperature=0.0 if kw.get("num_beams", 1) == 1 else None,
            repetition_penalty=1.0,
            stop_ids=(),
        )
        | kw,
    )


def one_sentence(match, call, kind=ValueError):
    with pytest.raises(kind, match=match) as e:
        call()
    assert len(str(e.value).strip().splitlines()) == 1 and len(str(e.value)) < 300


# ---- against the reference


@pytest.mark.parametrize("seed", range(6))
def test_equals_transformers(tmp_path, seed):
    model, theirs, ids = pair(tmp_path, seed)
    stops, some = (
        ids[0, :3].tolist(),
        dict(temperature=0.8, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    )
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    for prompt, m in ((ids[:1, :7], None), (ids[1:, :23], None), (ids, None), (ids, mask)):
        assert torch.equal(ours(model, prompt, 12, m), reference(theirs, prompt, 12, m))
        got = ours(model, prompt, 12, m, repetition_penalty=1.3, stop_ids=stops)
        assert torch.equal(
            got,
            reference(
                theirs,
                prompt,
                12,
                m,
                repetition_penalty=1.3,
                eos_token_id=stops,
                pad_token_id=stops[0],
            ),
        )
        for beams in (2, 3, 4):
            got = ours(model, prompt, 12, m, num_beams=beams, stop_ids=stops)
            assert torch.equal(
                got,
                reference(
                    theirs,
                    prompt,
                    12,
                    m,
                    num_beams=beams,
                    eos_token_id=stops,
                    pad_token_id=stops[0],
                ),
            )
        torch.manual_seed(seed)
        assert torch.equal(
            ours(model, prompt, 12, m, seed=seed, **some),
            reference(theirs, prompt, 12, m, do_sample=True, **some),
        )


def all_beams(theirs, ids, new, beams, **kw):
    out = reference(
        theirs,
        ids,
        new,
        num_beams=beams,
        num_return_sequences=beams,
        return_dict_in_generate=True,
        output_scores=True,
        **kw,
    )
    return out.sequences_scores.tolist(), out.sequences.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_every_beam_and_its_score(tmp_path, seed):
    """Not only the best one: all that are kept in the end, with their scores. Many ids end a text,
    so that the best beams often do."""
    model, theirs, ids = pair(tmp_path, seed)
    rng = random.Random(seed)
    for trial in range(6):
        beams, prompt = rng.choice([2, 3, 5]), ids[trial % 2 :, : rng.randrange(1, 20)][:1]
        with torch.no_grad():
            likely = model(prompt)[0, -1].topk(12).indices.tolist()
        stops = rng.choice(
            [
                likely[:4] + likely[5:8],
                likely[2:4],
                rng.sample(range(model.config.vocab_size), rng.choice([1, 12])),
            ]
        )
        kw = dict(
            length_penalty=rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
            repetition_penalty=rng.choice([1.0, 1.3]),
        )
        sampling = Sampling(stop_ids=stops, repetition_penalty=kw["repetition_penalty"])
        got = beam_search(model, prompt, 9, sampling, beams, kw["length_penalty"])
        scores, texts = all_beams(
            theirs, prompt, 9, beams, eos_token_id=stops, pad_token_id=stops[0], **kw
        )
        assert [s for s, _ in got] == pytest.approx(scores, rel=1e-4, abs=1e-5)
        assert [t.tolist() for _, t in got] == [t[: len(o)] for t, (_, o) in zip(texts, got)]


def test_beams_of_the_packaged_model(packaged, tokenizer):
    model, theirs = packaged
    for text in ("Max is in the", "Anna has the key.\n", "Ben"):
        ids = torch.tensor([tokenizer.encode(text).ids])
        stops = [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode("garden.\n").ids[-1:]]
        for beams in (2, 3, 4):
            got = ours(model, ids, 20, stop_ids=stops, num_beams=beams)
            assert torch.equal(
                got,
                reference(
                    theirs, ids, 20, eos_token_id=stops, pad_token_id=stops[0], num_beams=beams
                ),
            )


def test_filters_equal_the_references_processors():
    L = transformers.generation.logits_process
    torch.manual_seed(0)
    for trial in range(60):
        z = torch.randn(3, random.Random(trial).choice([2, 17, 400])) * 4
        if trial % 3 == 0:
            z = z.round()
        if trial % 4 == 0:
            z[:, ::2] = -torch.inf
        ids, k, p = torch.randint(0, z.shape[1], (3, 9)), 1 + trial % 12, (trial % 11) / 10
        assert torch.equal(keep_top_k(z, k), L.TopKLogitsWarper(k)(ids, z))
        assert torch.equal(keep_top_p(z, p), L.TopPLogitsWarper(p)(ids, z))
        assert torch.equal(keep_min_p(z, p), L.MinPLogitsWarper(p)(ids, z))
        assert torch.equal(
            penalize_repetition(z, marks(ids, z.shape[1]), 0.5 + p),
            L.RepetitionPenaltyLogitsProcessor(0.5 + p)(ids, z),
        )


def test_the_crossing_token_stays():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, kept in ((0.4, 1), (0.6, 2), (0.79, 2), (0.9, 3), (0.96, 4)):
        assert keep_top_p(z, p).isfinite().sum() == kept
    assert (
        keep_top_p(torch.zeros(1, 4), 0.75).isfinite().sum() == 3
    )  # what is kept sums to exactly p: enough


def test_presence_penalty_counts_what_was_written_once(packaged, tokenizer):
    model, _ = packaged
    ids = torch.tensor([tokenizer.encode("Max is in the kitchen.\nMax has the ball.\n").ids])
    text = ids[:, :0]
    with torch.no_grad():
        for _ in range(20):
            z = model(torch.cat([ids, text], 1))[0, -1]
            for i in set(text[0].tolist()):
                z[i] -= 4.0
            text = torch.cat([text, z.argmax()[None, None]], 1)
    assert torch.equal(ours(model, ids, 20, presence_penalty=4.0)[:, ids.shape[1] :], text)
    assert not torch.equal(ours(model, ids, 20)[:, ids.shape[1] :], text)


# ---- the cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("seed", [0, 1, 2, 5])
@torch.no_grad()
def test_cache_on_equals_cache_off(tmp_path, seed, dtype):
    "In pieces of every size, padded and not, up to the last place."
    model, _, ids = pair(tmp_path, seed, dtype)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    for m in (None, mask):
        whole, real = model(ids, m), (mask if m is not None else torch.ones_like(ids)).bool()
        for size in (1, 7, 39, 40):
            cache = KVCache(model.config, 2, 40, whole.dtype)
            parts = [
                model(p, None if m is None else m[:, : (i + 1) * size], cache=cache)
                for i, p in enumerate(ids.split(size, 1))
            ]
            assert cache.length == 40
            assert rounding_steps(torch.cat(parts, 1)[real], whole[real]).max() < 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_the_same_tokens_with_the_cache_and_without(tmp_path, seed, dtype):
    """A batch with padding; in bfloat16 up to where two choices are closer than rounding, row by
    row."""
    model, _, ids = pair(tmp_path, seed, dtype)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    a = ours(model, ids, 16, mask, use_cache=False)
    for kw in (dict(), dict(prefill_chunk=7)):
        b = ours(model, ids, 16, mask, **kw)
        for i, (x, y) in enumerate(zip(a, b)):
            at = next((t for t in range(len(x)) if x[t] != y[t]), None)
            assert dtype == "bfloat16" or at is None
            if at is None:
                continue
            z = model(x[None, :at][:, (mask[i] == 0).sum() :])[0, -1].float()
            assert z[x[at]] - z[y[at]] <= 16 * torch.finfo(torch.bfloat16).eps * z[x[at]].abs()


@torch.no_grad()
def test_one_row_kernels_compute_the_same(tmp_path):
    for seed in range(4):  # with and without biases
        model, _, ids = pair(tmp_path / str(seed), seed, "bfloat16")
        usual, other = (KVCache(model.config, 1, 40, torch.bfloat16) for _ in range(2))
        for part in ids[:1].split(1, 1):
            with one_row_kernels():
                got = model(part, cache=other)
            assert rounding_steps(got, model(part, cache=usual)).max() < 64


def test_one_row_kernels_leave_the_switch_as_it_was():
    with pytest.raises(KeyError), one_row_kernels():
        raise KeyError
    assert torch.backends.mkldnn.enabled

    def often():
        for _ in range(20):
            with one_row_kernels():
                time.sleep(0.001)  # let the others in
                assert not torch.backends.mkldnn.enabled

    threads = [threading.Thread(target=often) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert torch.backends.mkldnn.enabled


def test_the_cache_is_used(packaged):
    model, theirs = packaged
    ids = torch.arange(1, 21).view(2, 10)
    with count_rows(model) as rows:
        ours(model, ids, 30)
    assert rows == [20] + [2] * 29
    with count_rows(model) as rows:
        ours(model, ids[:1], 30, num_beams=3)
    assert rows == [10] + [3] * 29
    with count_rows(model) as rows:
        ours(model, ids[:1], 5, prefill_chunk=4)
    assert rows == [4, 4, 2, 1, 1, 1, 1]
    with count_rows(model) as rows:
        ours(model, ids, 30, use_cache=False)
    assert rows == [2 * (10 + i) for i in range(30)]  # the count sees a cache that is not used
    with count_rows(theirs) as rows:
        reference(theirs, ids, 5)
    assert rows == [20, 2, 2, 2, 2]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_cache_does_not_move_and_does_not_overflow(packaged):
    model, _ = packaged
    cache = KVCache(model.config, 1, 8)
    where = cache.kv.data_ptr()
    model(torch.ones(1, 8, dtype=torch.long), cache=cache)  # gradients on: none may reach the cache
    assert cache.length == 8 and cache.kv.data_ptr() == where and not cache.kv.requires_grad
    before = cache.kv.clone()
    one_sentence(
        "room for 8 positions; 8 are filled and 1 more",
        lambda: model(torch.ones(1, 1, dtype=torch.long), cache=cache),
    )
    one_sentence(
        "room for 8 positions; 0 are filled and 9 more",
        lambda: model(torch.ones(1, 9, dtype=torch.long), cache=KVCache(model.config, 1, 8)),
    )
    assert torch.equal(before, cache.kv) and cache.length == 8


def test_bytes_per_token():
    for layers, heads, d, kib in ((24, 16, 128, 192), (24, 2, 64, 12), (28, 8, 128, 112)):
        c = QwenConfig(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=d,
        )
        assert cache_bytes(c) == kib * 1024 == KVCache(c, 1, 10, torch.bfloat16).kv.nbytes / 10


def test_up_to_the_last_position(packaged):
    model, theirs = packaged
    known = model.config.max_position_embeddings
    ids = torch.randint(0, 400, (1, known - 6), generator=torch.Generator().manual_seed(0))
    out = ours(model, ids)  # as many as there is room for
    assert out.shape[1] == known + 1
    assert torch.equal(out, reference(theirs, ids, 7)) and torch.equal(
        out, ours(model, ids, use_cache=False)
    )
    assert ours(model, torch.ones(1, known, dtype=torch.long)).shape[1] == known + 1
    one_sentence(
        f"prompt has {known + 1} tokens; the model knows {known} positions",
        lambda: ours(model, torch.ones(1, known + 1, dtype=torch.long)),
    )
    one_sentence(
        f"8 new tokens after a prompt of {known - 6}.*at most 7", lambda: ours(model, ids, 8)
    )
    padded, mask = pad_left(
        [ids[0, :3].tolist(), [5] * (known - 1)]
    )  # what counts is the longest prompt, not the columns
    padded, mask = padded[:1], mask[:1]
    assert ours(model, padded, 5, mask).shape[1] == known + 4


def test_yarn_stretches_the_positions():
    c = QwenConfig(
        max_position_embeddings=32_768,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768),
    )
    assert max_positions(c) == 131_072 and max_positions(QwenConfig()) == 40_960


# ---- batches


def test_each_row_is_what_it_is_alone(packaged, tokenizer):
    model, _ = packaged
    texts = [
        "Max is in the kitchen.\nMax has the ball.\nWho has the ball?",
        "Anna has the map.\nWho has the map?",
        "Nora",
        "Ben is in the attic.\nWhere is Ben?",
    ]
    prompts, end = [tokenizer.encode(t).ids for t in texts], tokenizer.encode("garden.\n").ids[-1:]
    ids, mask = pad_left(prompts, pad_id=7)
    for kw in (dict(), dict(repetition_penalty=1.4, presence_penalty=0.5)):
        together = ours(model, ids, 20, mask, stop_ids=end, **kw)
        for row, prompt in zip(together[:, ids.shape[1] :].tolist(), prompts):
            alone = ours(model, torch.tensor([prompt]), 20, stop_ids=end, **kw)[
                0, len(prompt) :
            ].tolist()
            assert row == alone + [sampling_for(model).pad_id] * (len(row) - len(alone))
        assert torch.equal(
            together, ours(model, ids, 20, mask, stop_ids=end, use_cache=False, **kw)
        )
        assert torch.equal(
            together, ours(model, ids, 20, mask.bool(), stop_ids=end, prefill_chunk=3, **kw)
        )
        assert torch.equal(together[:, : ids.shape[1]], ids)


def test_stops_at_the_first_token_and_with_several_stop_ids(packaged):
    model, _ = packaged
    ids = torch.tensor([[5, 6, 7]])
    free = ours(model, ids, 10)[0, 3:].tolist()
    assert ours(model, ids, 10, stop_ids=free[0])[0, 3:].tolist() == free[:1]
    assert (
        ours(model, ids, 10, stop_ids=[511, free[1]])[0, 3:].tolist()
        == free[: free.index(free[1]) + 1]
    )
    assert ours(model, ids, 1)[0, 3:].tolist() == free[:1]


# ---- settings


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(packaged_model(), tmp_path / "model")
    return tmp_path / "model"


def own_settings(folder, config=None, **said):
    (folder / "generation_config.json").write_text(json.dumps(said))
    if config is not None:
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | config)
        )
    return Qwen.from_pretrained(folder)


def test_the_models_own_settings_are_the_default(folder):
    qwen3 = dict(
        bos_token_id=3,
        do_sample=True,
        eos_token_id=[5, 3],
        pad_token_id=3,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
    )
    model = own_settings(folder, **qwen3)
    assert sampling_for(model) == Sampling(0.6, 20, 0.95, stop_ids=(5, 3), pad_id=3)
    assert sampling_for(model, temperature=0, stop_ids=9) == Sampling(
        0, 20, 0.95, stop_ids=(9,), pad_id=3
    )
    assert sampling_for(model, top_k=0, top_p=1.0) == Sampling(0.6, stop_ids=(5, 3), pad_id=3)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        generate(model, ids, 9, seed=1),
        generate(model, ids, 9, temperature=0.6, top_k=20, top_p=0.95, stop_ids=[5, 3], seed=1),
    )
    assert (
        generate(model, ids, 9, num_beams=2).shape[1] <= 12
    )  # beams do not sample, whatever the file says
    qwen25 = dict(
        do_sample=True,
        eos_token_id=[5, 3],
        repetition_penalty=1.1,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
    )
    assert sampling_for(own_settings(folder, **qwen25)) == Sampling(
        0.7, 20, 0.8, repetition_penalty=1.1, stop_ids=(5, 3), pad_id=5
    )
    assert sampling_for(
        own_settings(folder, do_sample=True, eos_token_id=4, top_k=None)
    ) == Sampling(1.0, stop_ids=(4,), pad_id=4)
    assert (
        sampling_for(own_settings(folder, temperature=0.7, eos_token_id=4)).temperature == 0
    )  # do_sample is not set: greedy
    assert sampling_for(own_settings(folder, config=dict(eos_token_id=8))).stop_ids == (
        8,
    )  # config.json, if the other is silent
    assert sampling_for(own_settings(folder, config=dict(eos_token_id=None))).stop_ids == ()
    (folder / "generation_config.json").unlink()
    assert sampling_for(Qwen.from_pretrained(folder)).temperature == 0
    assert sampling_for(Qwen(model.config)) == Sampling()


def test_nonsense_in_the_file_is_refused(folder):
    one_sentence(
        "temperature is 'warm'; expected a number",
        lambda: sampling_for(own_settings(folder, do_sample=True, temperature="warm")),
    )
    one_sentence(
        "top_p is 2; expected a number from 0 to 1",
        lambda: sampling_for(own_settings(folder, do_sample=True, top_p=2)),
    )
    one_sentence(
        "stop_ids.*whole numbers", lambda: sampling_for(own_settings(folder, eos_token_id="</s>"))
    )
    (folder / "generation_config.json").write_text("{")
    one_sentence(
        "generation_config.json is not valid JSON",
        lambda: sampling_for(Qwen.from_pretrained(folder)),
    )


def test_seeds(packaged):
    model, _ = packaged
    ids = torch.tensor([[5, 6, 7]])
    state = torch.get_rng_state()
    a, b, c = (ours(model, ids, 30, temperature=1.5, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(
        state, torch.get_rng_state()
    )  # a seed of one's own leaves the global generator alone
    torch.manual_seed(1)
    assert torch.equal(ours(model, ids, 30, temperature=1.5), a)


# ---- text


@pytest.mark.parametrize("seed", range(20))
def test_streamed_text_is_the_text(tokenizer, seed):
    for some in (tokenizer, OurTokenizer.from_pretrained()):
        check_streamed_text(some, tokenizer, seed)


def check_streamed_text(tokenizer, library, seed):
    rng = random.Random(seed)
    if seed % 2:
        ids = [rng.randrange(300) for _ in range(60)]  # mostly single bytes: broken characters
    else:
        ids = library.encode("".join(rng.choice("aé→𒀭🎉👩‍👩‍👧 \n.�") for _ in range(40))).ids
    whole = tokenizer.decode(ids)
    for stop in (None, whole[20:23], [whole[9:11], whole[30:32], "never"], "\ufffd"):
        text, shown = TextStream(tokenizer, stop), ""
        stops = [stop] if isinstance(stop, str) else stop or []
        cut = min((at for s in stops if (at := whole.find(s)) >= 0), default=len(whole))
        for i in ids:
            shown += text.add(i)
            assert whole[:cut].startswith(shown)
        assert text.stopped or not any(s in whole for s in stops) or "\ufffd" in "".join(stops)
        assert shown + text.end() == whole[:cut]
        assert text.add(ids[0]) == "" or not text.stopped


def test_whole_characters_are_shown_at_once(tokenizer):
    for char in ("a", "é", "→", "🎉"):
        ids, text = tokenizer.encode(char).ids, TextStream(tokenizer)
        assert [text.add(i) for i in ids] == [""] * (len(ids) - 1) + [char] and not text.held


def test_a_long_text_is_not_decoded_again_and_again():
    class Counts:
        decoded = 0

        def decode(self, ids):
            self.decoded += len(ids)
            return "ab " * len(ids)

    counts = Counts()
    text = TextStream(counts, "stop")
    assert (
        "".join([text.add(i) for i in range(1000)] + [text.end()]) == "ab " * 1000
        and counts.decoded == 1000
    )


def test_stop_strings(packaged, tokenizer):
    model, theirs = packaged
    auto = transformers.AutoTokenizer.from_pretrained(packaged_model())
    ids = torch.tensor([tokenizer.encode("Max is in the kitchen.\nMax has the ball.\n").ids])
    free = tokenizer.decode(ours(model, ids, 30)[0, ids.shape[1] :].tolist())
    for stop in (free[11:14], free[20:21], [free[40:44], "never"], free[3:9]):
        got = ours(model, ids, 30, stop=stop, tokenizer=tokenizer)
        assert torch.equal(got, reference(theirs, ids, 30, stop_strings=stop, tokenizer=auto))
        first = stop if isinstance(stop, str) else stop[0]
        kw = dict(temperature=0.0, stop_ids=())
        assert "".join(stream(model, ids, 30, tokenizer, stop, **kw)) == free[: free.find(first)]
    two = torch.cat([ids, ids])
    assert torch.equal(
        ours(model, two, 30, stop=free[11:14], tokenizer=tokenizer)[1],
        ours(model, ids, 30, stop=free[11:14], tokenizer=tokenizer)[0],
    )


def test_stream(packaged, tokenizer):
    model, _ = packaged
    ids = torch.tensor([tokenizer.encode("Max is in the kitchen.\nMax has the ball.\n").ids])
    at_once = generate(model, ids, 150, temperature=1.0, seed=3)[0, ids.shape[1] :].tolist()
    assert list(stream(model, ids, 150, temperature=1.0, seed=3)) == at_once
    stops = sampling_for(model).stop_ids
    pieces = list(stream(model, ids, 150, tokenizer, temperature=1.0, seed=3))
    assert all(pieces) and "".join(pieces) == tokenizer.decode(
        [i for i in at_once if i not in stops]
    )
    end = at_once[min(5, len(at_once) - 1)]
    assert "".join(
        stream(model, ids, 150, tokenizer, temperature=1.0, seed=3, stop_ids=end)
    ) == tokenizer.decode(at_once[: at_once.index(end)])
    with count_rows(model) as rows:
        few = stream(model, ids, 50, temperature=1.0, stop_ids=())
        for _ in range(3):
            next(few)
        few.close()
    assert rows == [ids.shape[1], 1, 1]  # nothing is computed before it is asked for


# ---- what is refused


def test_refused(packaged, tokenizer):
    model, _ = packaged
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    right = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for match, call in (
        (r"input_ids is \(3,\); expected", lambda: generate(model, ids[0], 5)),
        ("input_ids is list; expected", lambda: generate(model, [[1, 2]], 5)),
        ("input_ids is .*; expected", lambda: generate(model, ids.float(), 5)),
        ("prompt is empty", lambda: generate(model, ids[:, :0], 5)),
        ("prompt is empty", lambda: generate(model, ids[:0], 5)),
        ("input_ids go from 5 to 9999", lambda: generate(model, torch.tensor([[5, 9999]]), 5)),
        ("padded on the right", lambda: generate(model, ids, 5, right)),
        ("attention_mask has shape", lambda: generate(model, ids, 5, right[:, :2])),
        ("max_new_tokens is 0", lambda: generate(model, ids, 0)),
        ("max_new_tokens is 2.5", lambda: generate(model, ids, 2.5)),
        ("num_beams is 0", lambda: generate(model, ids, 5, num_beams=0)),
        ("prefill_chunk is -1", lambda: generate(model, ids, 5, prefill_chunk=-1)),
        (
            "temperature is -1; expected a number from 0",
            lambda: generate(model, ids, 5, temperature=-1),
        ),
        ("temperature is True", lambda: generate(model, ids, 5, temperature=True)),
        (
            "top_k is 2.5; expected a whole number",
            lambda: generate(model, ids, 5, temperature=1.0, top_k=2.5),
        ),
        ("repetition_penalty is 0", lambda: generate(model, ids, 5, repetition_penalty=0)),
        (
            "presence_penalty is inf",
            lambda: generate(model, ids, 5, presence_penalty=float("inf")),
        ),
        (
            "top_p and min_p given, but the temperature is 0",
            lambda: generate(model, ids, 5, temperature=0.0, top_p=0.5, min_p=0.1),
        ),
        (
            "beam search neither samples",
            lambda: generate(model, ids, 5, num_beams=2, temperature=1.0),
        ),
        (
            "beam search neither samples",
            lambda: generate(model, ids, 5, num_beams=2, stop="x", tokenizer=tokenizer),
        ),
        ("tokenizer is None; expected", lambda: generate(model, ids, 5, stop="x")),
        (
            "stop is .*not empty",
            lambda: generate(model, ids, 5, stop=["a", ""], tokenizer=tokenizer),
        ),
        ("has 2 rows; expected 1", lambda: stream(model, ids, 5)),
        ("stop strings need a tokenizer", lambda: stream(model, ids[:1], 5, stop="x")),
    ):
        one_sentence(match, call)
    with pytest.raises(TypeError, match="heat"):
        stream(model, ids[:1], 5, heat=1.0)


def test_logits_that_are_no_numbers(packaged):
    model = Qwen.from_pretrained(dtype="float32")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    one_sentence("the model gave NaN", lambda: ours(model, torch.tensor([[5, 6]]), 5))


def test_the_longest_prompt_decides_how_much_can_follow():
    "Not the shortest: a long row beside a short one would run past the last position."
    model = Qwen.from_pretrained(dtype="float32")
    known = max_positions(model.config)
    ids, mask = pad_left([[1] * 3, [1] * (known - 2)])
    assert check_prompt(model, ids, None, mask)[0] == 3
    assert check_prompt(model, ids, 3, mask)[0] == 3
    one_sentence("at most 3", lambda: check_prompt(model, ids, 4, mask))
