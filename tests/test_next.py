"""Qwen4-exp: its files, its mixed cache, packed rows, the mapped table, and what is refused.
Random configs: test_family.py; the parts one by one: the lessons 17 to 17c."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_nb.attention import causal_mask
from qwen_nb.budget import Objective
from qwen_nb.durable import save_pretrained
from qwen_nb.family import count
from qwen_nb.generation import generate
from qwen_nb.hybrid import cache_parts
from qwen_nb.indexer import Indexer, best_blocks, indexers_learn
from qwen_nb.inspect import packaged_model
from qwen_nb.loading import family_config
from qwen_nb.model import Qwen
from qwen_nb.ngram import hashing, is_prime, primes_from
from qwen_nb.qwen4_exp import StreamCache, StreamConfig, stream_json
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.train import forward, init_weights
from qwen_nb.writing import pad_left
from qwen_nb.yarn import Rotary

transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared/qwen/configs"
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=20,
    hc_count=3,
    hc_lowrank=5,
    indexer_n_heads=4,
    indexer_head_dim=16,
    indexer_budget=8,
    indexer_compress_ratio=4,
    ple_layer_ids=[2],
    ple_embed_dim=32,
    heads_per_ngram=2,
    ngram_vocab_size_base=60,
    make_ngram_vocab_size_divisible_by=8,
    split_ngram_parts=3,
    max_position_embeddings=128,
    eos_token_id=3,
)
THEIRS = dict(
    indexer_kv_heads=1,
    output_gate_type="sigmoid",
    initializer_range=0.2,
    bos_token_id=None,
    pad_token_id=None,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
)


def shake(model):
    "No zeros and ones, and memories long enough to matter."
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
            if n.endswith("A_log"):
                p.sub_(4)
            if n.endswith("ple.conv1d.weight"):
                p.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "The reference, its folder, and ours opened from it."
    folder = tmp_path_factory.mktemp("next")
    torch.manual_seed(0)
    config = transformers.Qwen4ExpTextConfig(**SIZES | THEIRS)
    reference = shake(transformers.Qwen4ExpForCausalLM(config))
    reference.save_pretrained(folder)
    return Qwen.from_pretrained(folder), reference, folder


def own(**more):
    return StreamConfig(**SIZES | more)


def ids(rows=1, seq=40, seed=1):
    return torch.randint(4, 97, (rows, seq), generator=torch.Generator().manual_seed(seed))


def close(a, b, share=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=share * b.abs().max().item())


def write(model, prompt, mask=None, **kw):
    settings = dict(temperature=0.0, repetition_penalty=1.0, stop_ids=())
    return generate(model, prompt, 16, mask, **settings | kw)


# ---- files


@torch.no_grad()
def test_nested_with_a_vision_tower(tmp_path, pair):
    "As released: the whole model, saved by the reference, the text model inside."
    ours, reference, _ = pair
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    whole = transformers.Qwen4ExpForConditionalGeneration(
        transformers.Qwen4ExpConfig(text_config=SIZES | THEIRS, vision_config=vision)
    )
    whole.model.language_model.load_state_dict(reference.model.state_dict())
    whole.lm_head.load_state_dict(reference.lm_head.state_dict())
    whole.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("model.visual.") for name in names)
    close(Qwen.from_pretrained(tmp_path)(ids()), reference(ids()).logits)


@torch.no_grad()
def test_fused_experts_and_a_table_in_one_piece(tmp_path, pair):
    ours, reference, folder = pair
    stored = {n: t.contiguous() for n, t in reference.state_dict().items()}
    assert any(n.endswith("experts.gate_up_proj") for n in stored)
    assert any(n.endswith("ngram_embedding.weight") for n in stored)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    close(Qwen.from_pretrained(tmp_path)(ids()), ours(ids()), 0)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back(tmp_path, tied):
    "Saved by us, opened by the reference and by us; the end of a text stays what it was."
    model = shake(init_weights(Qwen(own(tie_word_embeddings=tied))))
    save_pretrained(model, tmp_path, packaged_model(), dtype=torch.float32)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["eos_token_id"] == 3 and said["model_type"] == "qwen4_exp_text"
    again = Qwen.from_pretrained(tmp_path)
    assert again.config == model.config
    close(again(ids()), model(ids()), 0)
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    close(again(ids()), reference(ids()).logits)


def test_numbers_of_a_second_layer_of_n_grams():
    "Its multipliers and primes go on from the first layer's; 61, the base, is a prime itself."
    from transformers.models.qwen4_exp import modeling_qwen4_exp as theirs

    more = dict(ple_layer_ids=[1, 2, 3], ngram_vocab_size_base=61)
    settings = transformers.Qwen4ExpTextConfig(**SIZES | THEIRS | more)
    for place in range(3):
        reference = theirs.Qwen4ExpTextPLELayer(settings, place, place).ple_embedding
        ours = hashing(own(**more), place)
        assert ours.factors == reference.layer_multipliers.tolist()
        assert ours.sizes == reference.head_vocab_sizes


def test_hash_numbers_keep_their_dtype(tmp_path):
    save_pretrained(Qwen(own()), tmp_path, packaged_model())
    stored = load_file(tmp_path / "model.safetensors")
    where = "model.layers.1.ple.ple_embedding."
    assert stored[where + "layer_multipliers"].dtype == torch.long
    assert stored[where + "ngram_embedding.shard_0.weight"].dtype == torch.bfloat16


def test_another_seed_is_refused(tmp_path, pair):
    _, _, folder = pair
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text()) | dict(seed=5)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="is not what seed 5 and"):
        Qwen.from_pretrained(tmp_path)


def test_full_size():
    assert count(StreamConfig()) == (176_943_899_520, 7_306_997_120)
    if not SHARED.is_dir():
        pytest.skip("the released configs are not here")
    raw = json.loads((SHARED / "Qwen3.8-Flash-Next.config.json").read_text())
    config = family_config(raw)
    assert config == StreamConfig(ple_layer_ids=config.ple_layer_ids)
    assert family_config(raw["text_config"]) == config


def resident(path):
    "Bytes of a mapped file that are in memory."
    kib, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux tells what is in memory")
def test_of_a_large_table_only_rows_are_read(tmp_path, monkeypatch):
    "A table of 512 MiB in a file with holes: opened in float32, it stays there, in bfloat16."
    monkeypatch.setattr("qwen_nb.qwen4_exp.STAYS", 2**20)
    config = own(ngram_vocab_size_base=4_000_000, split_ngram_parts=4, ple_embed_dim=64)
    with torch.device("meta"):
        planned = Qwen(config).state_dict()
    tables = {n: t for n, t in planned.items() if "ngram_embedding" in n}
    rest = {n: 0.1 * torch.randn(t.shape) for n, t in planned.items() if n not in tables}
    save_file(rest, tmp_path / "rest.safetensors")
    header, at = {}, 0
    for n, t in tables.items():
        end = at + 2 * t.numel()
        header[n] = dict(dtype="BF16", shape=list(t.shape), data_offsets=[at, end])
        at = end
    path, text = tmp_path.resolve() / "table.safetensors", json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
    where = dict.fromkeys(rest, "rest.safetensors") | dict.fromkeys(tables, "table.safetensors")
    index = json.dumps(dict(weight_map=where))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "config.json").write_text(json.dumps(stream_json(config)))
    assert at > 480 * 2**20

    model = Qwen.from_pretrained(tmp_path, dtype="float32")
    kinds = {p.dtype for n, p in model.named_parameters() if "ngram_embedding" in n}
    assert kinds == {torch.bfloat16} and model.model.embed_tokens.weight.dtype == torch.float32
    write(model, ids())
    assert 0 < resident(path) < 32 * 2**20
    for n, p in model.named_parameters():  # the measure sees it if all is read
        if "ngram_embedding" in n:
            p.detach().sum()
    assert resident(path) > 480 * 2**20


# ---- the cache


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[39], [1, 2, 3], [5, 20, 21, 39], [4, 8, 12]])
def test_in_pieces(pair, cuts):
    ours, reference, _ = pair
    both, mask = pad_left([ids()[0].tolist(), ids()[0, 11:28].tolist()], 3)
    cache, found = StreamCache(ours.config, 2, 40), []
    for start, end in zip([0, *cuts], [*cuts, 40]):
        found.append(ours(both[:, start:end], mask[:, :end], cache=cache))
    close(torch.cat(found, 1)[mask.bool()], ours(both, mask)[mask.bool()])


def test_writing(pair):
    ours, reference, _ = pair
    text = ids()
    text[0, 20] = 3
    assert torch.equal(write(ours, text), write(ours, text, use_cache=False))
    both, mask = pad_left([text[0].tolist(), text[0, 23:].tolist()], 3)
    theirs = reference.generate(
        both,
        attention_mask=mask,
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=3,
        eos_token_id=-1,
    )
    assert torch.equal(write(ours, both, mask), theirs)


def test_rows_are_chosen_in_all_tensors(pair):
    ours, _, _ = pair
    cache, text = StreamCache(ours.config, 3, 40), ids(3, 30)
    with torch.no_grad():
        ours(text[:, :29], cache=cache)
        cache.select(torch.tensor([2, 0, 2]))
        found = ours(text[[2, 0, 2], 29:], cache=cache)
        close(found[:, -1], ours(text[[2, 0, 2]])[:, -1])


def test_cache_bytes_and_room(pair):
    ours, _, _ = pair
    cache = StreamCache(ours.config, 1, 24)
    with torch.no_grad():
        ours(ids(1, 20), cache=cache)
    token, once = cache_parts(ours.config, 4)
    tensors = [t for layer in cache.layers for t in layer]
    tensors += [t for kept in cache.more for t in kept.values() if t.is_floating_point()]
    assert sum(t.nbytes for t in tensors) == 24 * token + once
    with pytest.raises(ValueError, match="room for 24 positions; 20 are filled and 5 more"):
        ours(ids(1, 5), cache=cache)


# ---- the indexer


def by_hand(scores, seen, size, budget):
    "Which keys one query keeps: its visible keys in blocks, one after the other."
    keys = seen.nonzero()[:, 0]
    blocks = keys[: len(keys) // size * size].view(-1, size)
    best = scores[: len(blocks)].topk(min(budget // size, len(blocks))).indices
    return sorted([*blocks[best].flatten().tolist(), *keys[len(blocks) * size :].tolist()])


def test_choice_equals_a_loop():
    "In a row of two documents, and with padding in the middle."
    torch.manual_seed(0)
    index = Indexer(8, heads=3, head_dim=8, budget=6, size=3)
    x = torch.randn(2, 40, 8)
    document = torch.tensor([0] * 17 + [1] * 23)
    packed = causal_mask(40, 40)[0] & (document[:, None] == document)
    real = torch.rand(40) < 0.7
    mask = torch.cat([packed, causal_mask(40, 40)[0] & real])[:, None]
    place = torch.stack([torch.cat([torch.arange(17), torch.arange(23)]), real.cumsum(0) - 1])
    cos, sin = Rotary(4, 1e4)(place.clamp_min(0))
    with torch.no_grad():
        kept = index(x, cos, sin, mask)
        for row, place_of_key in enumerate(place):
            for query in range(40):
                seen = mask[row, 0, query]
                own_x = x[row : row + 1, seen]
                if not seen.any():
                    continue
                c, s = (t[row : row + 1, seen] for t in (cos, sin))
                q, _ = index.project(
                    x[row : row + 1, query : query + 1],
                    cos[row : row + 1, query : query + 1],
                    sin[row : row + 1, query : query + 1],
                )
                _, keys = index.project(own_x, c, s)
                n = torch.arange(len(own_x[0])) // 3
                first = torch.arange(len(own_x[0])) % 3 == 0
                scores = index.score(q, index.block_keys(keys, n[None], first[None]))[0, 0]
                wanted = by_hand(scores, seen, 3, 6)
                assert kept[row, 0, query].nonzero()[:, 0].tolist() == wanted, (row, query)


def test_ties_are_broken_as_topk_does():
    scores, complete = torch.zeros(1, 1, 9), torch.ones(1, 1, 9, dtype=torch.bool)
    complete[..., 7:] = False
    kept = best_blocks(scores, complete, 3)[0, 0].nonzero()[:, 0].tolist()
    assert kept == sorted(torch.zeros(7).topk(3).indices.tolist())


def test_only_the_indexer_learns_from_its_loss(pair):
    ours, _, _ = pair
    model = init_weights(Qwen(own())).train()
    with indexers_learn(model) as mean:
        model(ids(2, 30))
        mean(torch.ones(2, 30)).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(".indexer." in n for n in touched), touched
    assert all(part.lessons is None for part in model.modules() if isinstance(part, Indexer))


# ---- training


def test_documents_in_a_row_do_not_see_each_other():
    model = shake(init_weights(Qwen(own())))
    lengths = [30, 1, 22]
    texts = [ids(1, n, n) for n in lengths]
    numbers = [torch.full((n,), i) for i, n in enumerate(lengths)]
    batch = dict(
        input_ids=torch.cat(texts, 1),
        document_ids=torch.cat(numbers)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
    )
    with torch.no_grad():
        close(forward(model, batch), torch.cat([model(text) for text in texts], 1))


def test_every_parameter_gets_a_gradient():
    model = shake(init_weights(Qwen(own()))).train()
    text = ids(2, 40)
    zeros = torch.zeros_like(text)
    places = torch.arange(40).expand_as(text)
    batch = dict(input_ids=text, labels=text, document_ids=zeros, position_ids=places)
    Objective(model)(batch).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, without


def test_the_sibling():
    config = family_config(json.loads((packaged_model("qwen4_exp") / "config.json").read_text()))
    total = sum(p.numel() for p in Qwen(config).parameters())
    end = Tokenizer.from_pretrained(packaged_model()).special["<|endoftext|>"]
    assert total == 1_115_864 and config.vocab_size == 512 and config.end_token() == end


# ---- what is refused


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(indexer_budget=None), "indexer_budget missing"),
        (dict(indexer_kv_heads=2), "only 1 is supported"),
        (dict(indexer_budget=10), "indexer_compress_ratio, 4, does not divide"),
        (dict(indexer_head_dim=2), "RoPE turns 4 channels, and indexer_head_dim is only 2"),
        (dict(hc_count=1), "expected 2 streams or more"),
        (dict(output_gate_type="relu"), "expected 'sigmoid' or 'silu'"),
        (dict(ple_layer_ids=[4]), "ple_layer_ids names layer 4"),
        (dict(ple_layer_ids=[0]), "ple_layer_ids names layer 0"),
        (dict(ple_embed_dim=30), "expected a multiple of"),
        (dict(eos_token_id=None), "eos_token_id missing"),
        (dict(eos_token_id="end"), "the n-grams need a number"),
        (dict(layer_types=["sliding_attention"] * 4), "layer_types is"),
        (dict(num_experts_per_tok=9), "more than num_experts"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_refused_in_one_sentence(change, says, nested):
    raw = stream_json(own()) | change
    if nested:
        raw = dict(model_type="qwen4_exp", text_config=raw)
    with pytest.raises(ValueError, match=says) as e:
        family_config(raw)
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 400


def test_words_for_attention():
    "Released files say full_attention, those of transformers indexed_attention."
    kinds = ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"]
    assert own(layer_types=kinds) == own()
    assert replace(own(), seed=0).seed == 0


def test_primes():
    slow = [n for n in range(100) if n > 1 and all(n % d for d in range(2, n))]
    assert [n for n in range(100) if is_prime(n)] == slow
    assert primes_from(20, 2, 3) == [31, 37, 41]
