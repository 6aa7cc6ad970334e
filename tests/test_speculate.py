"""A draft writes, the model checks: the rule by chi-square, greedy ids of random tiny models of all
families, the way back, and what is refused."""

import random
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from qwen_nb import drafts, speculation
from qwen_nb.drafts import HeadDraft, Lookup, ModelDraft, expected_speed, expected_tokens, speculate
from qwen_nb.generation import generate
from qwen_nb.inspect import packaged_model
from qwen_nb.loading import family_config
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.mtp import MTPHead
from qwen_nb.qwen1 import Qwen1Config
from qwen_nb.sampling import Sampling, keep, marks, penalize
from qwen_nb.speculation import Draft, Reader, TokenChoice, accept_guesses, write_ahead
from qwen_nb.way_back import HybridReader

GREEDY = dict(temperature=0.0, stop_ids=())
SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


def shaken(model, seed=0):
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        spread = 0.3 * torch.randn_like(p)
        if p.dim() > 1:
            p.data = torch.randn_like(p) * p.shape[-1] ** -0.5
        elif name.endswith("A_log"):
            p.data.uniform_(-5, 0)  # memories that last
        else:
            p.data.add_(spread)
    return model.eval().requires_grad_(False)


def dense(seed=0, **changes):
    return shaken(Qwen(QwenConfig(**SIZES | changes)), seed)


FAMILIES = [
    "Qwen1",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen4ExpForCausalLM",
]


def random_model(family, seed):
    "A tiny one of ours, its config drawn as in test_family.py."
    pytest.importorskip("transformers")
    import test_family

    if family == "Qwen1":
        sizes = SIZES | dict(num_key_value_heads=4, seq_length=128)
        return shaken(Qwen(Qwen1Config(**sizes)), seed)
    theirs = test_family.FAMILIES[family](random.Random(f"{family} {seed}"))
    return shaken(Qwen(family_config(theirs.to_dict())), seed)


class Knowing(Draft):
    "Guesses from a text that is known beforehand, with some tokens changed."

    def __init__(self, ids, vocab, wrong=0.3, seed=0):
        luck = random.Random(seed)
        self.text = [(i + 1) % vocab if luck.random() < wrong else i for i in ids]

    def guess(self, ids, k, choice):
        return self.text[len(ids) : len(ids) + k], None


def same_ids(family, seed):
    "Greedy ids equal to generate's, whoever guesses."
    luck, model = random.Random(f"{family} {seed} length"), random_model(family, seed)
    vocab = model.config.vocab_size
    prompt = torch.randint(0, vocab, (1, luck.choice([1, 2, 9, 20])))
    new, k = luck.randint(1, 24), luck.randint(1, 6)
    plain = generate(model, prompt, new, **GREEDY)
    known = Knowing(plain[0].tolist(), vocab, luck.choice([0, 0.1, 0.3, 0.6]), seed)
    other = random_model(luck.choice(FAMILIES), seed)
    for draft in ("lookup", known, luck.choice([model, other])):
        trace = []
        found = speculate(model, prompt, new, draft, k, trace=trace, **GREEDY)
        about = f"{family}, seed {seed}, {type(draft).__name__}, k {k}"
        assert torch.equal(found, plain), f"{about}: {found.tolist()}, expected {plain.tolist()}"
        assert sum(number + 1 for _, number in trace) == new, about


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_generate(family):
    for seed in range(3):
        same_ids(family, seed)


@pytest.mark.slow
def test_greedy_ids_of_200_random_models():
    failed = []
    for seed in range(200):
        try:
            same_ids(FAMILIES[seed % len(FAMILIES)], seed)
        except AssertionError as error:
            failed.append(str(error))
    assert not failed, f"{len(failed)} of 200\n" + "\n".join(failed)


@pytest.mark.parametrize(
    "family, reader", [("Qwen3ForCausalLM", Reader), ("Qwen3_5ForCausalLM", HybridReader)]
)
def test_the_comparison_sees_a_cache_that_is_not_turned_back(family, reader, monkeypatch):
    monkeypatch.setattr(reader, "go_back", lambda self, length: None)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        for seed in range(3):
            same_ids(family, seed)


@pytest.mark.parametrize("family", ["Qwen3_5ForCausalLM", "Qwen3NextForCausalLM"])
def test_hybrids_that_are_read_by_plain_passes(family, monkeypatch):
    "As where a hook watches: by bookmarks, some tokens are read again."
    monkeypatch.setattr(drafts, "reader_for", Reader)
    for seed in range(3):
        same_ids(family, seed)


def test_the_comparison_sees_a_state_that_is_not_turned_back(monkeypatch):
    "The length alone is not enough for a hybrid."
    monkeypatch.setattr(drafts, "reader_for", Reader)
    monkeypatch.setattr(
        speculation, "turn_back", lambda cache, mark: setattr(cache, "length", mark[0])
    )
    with pytest.raises(AssertionError):
        for seed in range(3):
            same_ids("Qwen3_5ForCausalLM", seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_that_went_back_has_forgotten(family):
    "Random reading and going back: the same logits as reading at once."
    model, luck = random_model(family, 7), random.Random(family)
    ids = torch.randint(0, model.config.vocab_size, (30,)).tolist()
    reader, at = Reader(model, 60), 0
    while at < len(ids):
        step = luck.randint(1, 6)
        nonsense = [luck.randrange(model.config.vocab_size) for _ in range(luck.randint(1, 4))]
        logits = reader.read(ids[reader.length : at + step] + nonsense, len(nonsense) + 1)
        at = min(at + step, len(ids))
        reader.go_back(at)
        expected = Reader(model, 60).read(ids[:at])
        torch.testing.assert_close(logits[:1], expected, atol=1e-4, rtol=1e-4)
    assert reader.ids == ids[: reader.length]


# ---- the distribution


class NoCache:
    length = 0

    def __init__(self, *sizes):
        pass


class Markov(torch.nn.Module):
    "A model that goes by the last token alone: a table of logits."

    def __init__(self, seed, vocab=4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(1.5 * torch.randn(vocab, vocab, generator=generator))
        self.config = SimpleNamespace(
            vocab_size=vocab, max_position_embeddings=64, rope_scaling=None, cache=NoCache
        )

    def forward(self, ids, cache, last_only):
        cache.length += ids.shape[1]
        return self.table[ids[:, -1:] if last_only else ids]


SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.6, top_k=3),
    dict(temperature=0.8, top_p=0.9, repetition_penalty=1.4, presence_penalty=0.3),
    dict(temperature=1.3, min_p=0.1),
]


def expected_texts(model, prompt, new, settings):
    "The probability of each text, token by token as `write` chooses."
    sampling, found = Sampling(**settings), {}
    for text in product(range(4), repeat=new):
        ids, chance = [*prompt], 1.0
        for token in text:
            seen = marks(torch.tensor([ids]), 4)
            written = torch.zeros_like(seen)
            written[0, ids[len(prompt) :]] = True
            logits = penalize(sampling, model.table[None, ids[-1]], seen, written)
            chance *= keep(sampling, logits).softmax(-1)[0, token].item()
            ids.append(token)
        found[text] = chance
    return found


def probability_of_counts(draft, settings, runs=1000, new=3, k=2, seed=0):
    "Of counts as odd as those of `speculate`, by chi-square; 0 for a text that cannot be."
    model, prompt = Markov(1), [0, 2]
    expected = expected_texts(model, prompt, new, settings)
    counts = dict.fromkeys(expected, 0)
    torch.manual_seed(seed)
    ids = torch.tensor([prompt])
    for _ in range(runs):
        text = speculate(model, ids, new, draft(), k, stop_ids=(), **settings)
        counts[tuple(text[0, 2:].tolist())] += 1
    if any(counts[text] for text, chance in expected.items() if chance == 0):
        return 0.0
    rare = sum(chance for chance in expected.values() if chance * runs < 5)  # together in one bin
    bins = [(expected[t] * runs, counts[t]) for t in expected if expected[t] * runs >= 5]
    if rare * runs > 1:
        bins.append((rare * runs, runs - sum(count for _, count in bins)))
    total = torch.tensor(sum((count - mean) ** 2 / mean for mean, count in bins))
    return torch.special.gammaincc(torch.tensor((len(bins) - 1) / 2), total / 2).item()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_texts_are_distributed_as_without_a_draft(settings):
    assert probability_of_counts(lambda: ModelDraft(Markov(2)), settings) > 1e-4


def test_a_sure_draft_changes_no_distribution():
    def draft():
        return Knowing([0, 2, 1, 1, 3, 0], 4, wrong=0)

    assert probability_of_counts(draft, SETTINGS[1]) > 1e-4
    assert probability_of_counts(lambda: "lookup", SETTINGS[2]) > 1e-4


def upside_down(p, q, guessed, luck):
    for i, token in enumerate(guessed):
        if luck[i] >= q[i, token] / p[i, token]:
            rest = (p[i] - q[i]).clamp_min(0)
            return i, rest if rest.sum() > 0 else p[i]
    return len(guessed), p[-1]


def redrawn_from_p(p, q, guessed, luck):
    number, _ = accept_guesses(p, q, guessed, luck)
    return number, p[number]


def bonus_of_the_row_before(p, q, guessed, luck):
    number, last = accept_guesses(p, q, guessed, luck)
    return number, p[number - 1] if number == len(guessed) > 0 else last


def all_accepted(p, q, guessed, luck):
    return len(guessed), p[-1]


@pytest.mark.parametrize("mistake", [upside_down, redrawn_from_p, bonus_of_the_row_before,
                                     all_accepted])  # fmt: skip
def test_the_distribution_shows_each_mistake(mistake, monkeypatch):
    monkeypatch.setattr(speculation, "accept_guesses", mistake)
    assert probability_of_counts(lambda: ModelDraft(Markov(2)), SETTINGS[0]) < 1e-4


def test_the_distribution_shows_a_temperature_of_the_draft_only(monkeypatch):
    "p is what the model writes with, after temperature and filters."
    right = TokenChoice.probabilities

    def forgetful(self, logits, ids):
        return right(self, logits, ids) if len(logits) == 1 else logits.softmax(-1)

    monkeypatch.setattr(TokenChoice, "probabilities", forgetful)
    assert probability_of_counts(lambda: ModelDraft(Markov(2)), SETTINGS[1]) < 1e-4


def test_the_distribution_shows_penalties_that_look_ahead(monkeypatch):
    def blind(self, logits, ids):
        seen = marks(torch.tensor([ids]), 4).expand(len(logits), -1)
        return penalize(self.sampling, logits, seen, torch.zeros_like(seen))

    monkeypatch.setattr(TokenChoice, "penalized", blind)
    strong = dict(temperature=1.0, repetition_penalty=3.0)
    assert probability_of_counts(lambda: ModelDraft(Markov(2)), strong) < 1e-4


def test_the_rule_exactly():
    "Summed over all guesses and both outcomes, what is written has the model's probabilities."
    torch.manual_seed(0)
    for _ in range(20):
        p, q = torch.rand(2, 5).pow(3).softmax(-1), torch.rand(1, 5).pow(3).softmax(-1)
        written = torch.zeros(5)
        for token in range(5):
            kept = min(1.0, (p[0, token] / q[0, token]).item())
            assert accept_guesses(p, q, [token], torch.tensor([kept - 1e-4]))[0] == 1
            written[token] += q[0, token] * kept
            if kept < 1:
                number, last = accept_guesses(p, q, [token], torch.tensor([kept + 1e-4]))
                assert number == 0
                written += q[0, token] * (1 - kept) * last
        torch.testing.assert_close(written, p[0])


def test_equal_rows_are_never_rejected_into_nothing():
    "Rounding may leave no rest: then the last token is drawn from p itself."
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    number, last = accept_guesses(p, p[:1] + torch.tensor([[1e-7, 1e-7]]), [0], torch.ones(1))
    assert number == 0 and torch.equal(last, p[0])


# ---- the loop


def test_the_bonus_is_not_lost():
    model, prompt = dense(), torch.tensor([[5, 7, 9]])
    plain = generate(model, prompt, 60, **GREEDY)[0].tolist()
    for k in (1, 3, 5):
        trace = []
        speculate(model, prompt, 60, Knowing(plain, 60, wrong=0), k, trace=trace, **GREEDY)
        assert len(trace) == 60 // (k + 1)


@pytest.mark.parametrize("new", [1, 2, 3, 6, 7, 8])
def test_max_new_tokens_is_exact(new):
    model, prompt = dense(), torch.tensor([[5, 7, 9, 5, 7]])
    plain = generate(model, prompt, new, **GREEDY)
    for draft in ("lookup", model, Knowing(plain[0].tolist(), 60, wrong=0)):
        assert torch.equal(speculate(model, prompt, new, draft, **GREEDY), plain)


def test_up_to_the_last_position():
    model, prompt = dense(max_position_embeddings=20), torch.tensor([[5, 7, 9, 5, 7]])
    plain = generate(model, prompt, **GREEDY)
    assert plain.shape[1] == 21
    for draft in ("lookup", dense(3, max_position_embeddings=12)):  # this one knows fewer
        assert torch.equal(speculate(model, prompt, draft=draft, **GREEDY), plain)


def test_a_stop_id_among_the_guesses_ends_the_text():
    model, prompt = dense(), torch.tensor([[5, 7, 9]])
    plain = generate(model, prompt, 40, **GREEDY)
    stop = plain[0, 20].item()
    expected = generate(model, prompt, 40, temperature=0.0, stop_ids=[stop])
    known = Knowing(plain[0].tolist(), 60, wrong=0)
    found = speculate(model, prompt, 40, known, k=8, temperature=0.0, stop_ids=[stop])
    assert torch.equal(found, expected) and found[0, -1] == stop


def test_equal_seeds_give_equal_texts():
    model, other, prompt = dense(), dense(5), torch.tensor([[5, 7, 9]])
    loose = dict(temperature=1.0, top_p=0.9, stop_ids=())
    for draft in ("lookup", other):
        texts = [speculate(model, prompt, 30, draft, seed=s, **loose) for s in (1, 1, 2)]
        assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_a_prompt_in_pieces():
    model, prompt = dense(), torch.arange(20)[None]
    whole = speculate(model, prompt, 20, **GREEDY)
    for size in (1, 7, 19, 50):
        assert torch.equal(speculate(model, prompt, 20, prefill_chunk=size, **GREEDY), whole)


@pytest.mark.parametrize("vocab", [40, 60, 75])
@pytest.mark.parametrize("settings", [GREEDY, dict(temperature=1.0, seed=0, stop_ids=())], ids=str)
def test_a_draft_of_another_vocabulary_size(vocab, settings):
    model, draft = dense(), dense(1, vocab_size=vocab)
    prompt = torch.tensor([[5, 7, 9]])
    found = speculate(model, prompt, 40, draft, **settings)
    assert found.max() < 60
    if settings is GREEDY:
        assert torch.equal(found, generate(model, prompt, 40, **GREEDY))


def test_lookup_finds_what_followed_last():
    luck = random.Random(0)
    for _ in range(50):
        text, lookup = [luck.randrange(4) for _ in range(40)], Lookup(longest=3)
        lookup.begin(None, 0)
        for end in range(1, len(text) + 1, 3):
            ids, expected = text[:end], []
            for n in (1, 2, 3):  # the longest wins, of it the last
                for at in range(n, end):
                    if ids[at - n : at] == ids[end - n :]:
                        expected = ids[at : at + 5]
            assert lookup.guess(ids, 5, None) == (expected, None)


@pytest.mark.parametrize("family", ["Qwen3_5ForCausalLM", "Qwen3NextForCausalLM"])
def test_a_head_of_random_weights_changes_nothing(family):
    for seed in range(2):
        model = random_model(family, seed)
        head = shaken(MTPHead(model.config), 1)
        for length in (1, 6):
            prompt = torch.randint(0, model.config.vocab_size, (1, length))
            found = speculate(model, prompt, 14, head, k=3, **GREEDY)
            assert torch.equal(found, generate(model, prompt, 14, **GREEDY))
        assert not model.model._forward_hooks, "the hook is still there"


def test_the_head_sees_what_it_saw_in_training():
    "Its guesses from states and tokens in pieces are those of one reading of the whole text."
    model = random_model("Qwen3_5ForCausalLM", 0)
    head = shaken(MTPHead(model.config), 1)
    expected, draft = [], HeadDraft(head)
    ask = draft.guess

    def guess(ids, k, choice):
        guessed, rows = ask(ids, k, choice)
        if guessed:
            tokens = torch.tensor([ids])
            states = model.model(tokens, torch.arange(len(ids))[None])
            tokens, states = tokens[:, 1:], states[:, :-1]
            for guess in guessed:  # a guess goes on from the head's own states
                out = head(model, tokens, states)
                expected.append((guess, model.head(out[0, -1]).argmax().item()))
                tokens = torch.cat([tokens, torch.tensor([[guess]])], 1)
                states = torch.cat([states, out[:, -1:]], 1)
        return guessed, rows

    draft.guess, see = guess, draft.see

    def see_the_loop(decoder, args, states):
        if len(args) > 2:  # not the reading above, which has no cache
            see(decoder, args, states)

    draft.see = see_the_loop
    prompt = torch.randint(0, model.config.vocab_size, (1, 8))
    speculate(model, prompt, 20, draft, k=3, **GREEDY)
    assert len(expected) > 15
    assert all(first == whole for first, whole in expected), expected


def test_a_text_that_is_not_read_to_its_end_leaves_no_hook():
    model = random_model("Qwen3_5ForCausalLM", 0)
    head = HeadDraft(shaken(MTPHead(model.config), 1))
    steps = write_ahead(model, torch.tensor([[1, 2, 3]]), 20, Sampling(), head, k=3)
    next(steps)
    steps.close()
    assert not model.model._forward_hooks


def test_expected_tokens():
    assert expected_tokens(0.0, 5) == 1 and expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)
    assert expected_speed(0.9, 4, 0) == pytest.approx(expected_tokens(0.9, 4))
    assert max(expected_speed(1.0, k, 1.0) for k in range(10)) == 1


def test_refusals():
    model, prompt = dense(), torch.tensor([[5, 7, 9]])
    for args, settings, words in (
        ((prompt.expand(2, -1), 5), {}, "2 rows"),
        ((prompt[0], 5), {}, r"expected a tensor of ids, \(batch, seq\)"),
        ((prompt[:, :0], 5), {}, "the prompt is empty"),
        ((prompt, 0), {}, "max_new_tokens is 0"),
        ((prompt, 500), {}, "the model knows 128 positions"),
        ((prompt, 5), dict(k=0), "k is 0"),
        ((prompt, 5), dict(draft=3), "draft is 3; expected 'lookup'"),
        ((prompt, 5), dict(draft=None), "draft is None"),
        ((prompt, 5), dict(temperature=-1.0), "temperature is -1.0"),
        ((prompt, 5), dict(seed=2**70, temperature=1.0), "seed is"),
    ):
        with pytest.raises(ValueError, match=words):
            speculate(model, *args, **settings)


def test_caches_that_depend_on_the_pieces_are_refused():
    sizes = SIZES | dict(num_key_value_heads=4, max_position_embeddings=128)
    prompt = torch.arange(10)[None]
    stretched = shaken(Qwen(Qwen1Config(**sizes, seq_length=16)))
    with pytest.raises(ValueError, match="dynamic NTK past 16 positions"):
        speculate(stretched, prompt, 10, **GREEDY)
    plain = generate(stretched, prompt, 7, **GREEDY)
    assert torch.equal(speculate(stretched, prompt, 7, **GREEDY), plain)
    assert torch.equal(  # as a draft it stops guessing there
        speculate(dense(), prompt, 30, stretched, **GREEDY), generate(dense(), prompt, 30, **GREEDY)
    )
    rounded = shaken(Qwen(Qwen1Config(**sizes, use_cache_quantization=True)))
    with pytest.raises(ValueError, match="int8 cache"):
        speculate(rounded, prompt, 5, **GREEDY)


def test_half_as_many_passes_on_the_packaged_stories():
    from qwen_nb.tokenizer import Tokenizer
    from qwen_nb.world import Chooser, story

    folder = packaged_model()
    model, tokenizer = (
        Qwen.from_pretrained(folder, torch.float32),
        Tokenizer.from_pretrained(folder),
    )
    checks = 0
    for seed in range(2):
        lines = [line.text for line in story(Chooser(random.Random(seed)))][:6]
        prompt, trace = torch.tensor([tokenizer.encode("\n".join(lines) + "\n")]), []
        found = speculate(model, prompt, 60, trace=trace, **GREEDY)
        assert torch.equal(found, generate(model, prompt, 60, **GREEDY))
        checks += len(trace)
    assert 2 * 60 > 1.5 * checks
    assert drafts.pieces_limit(model.config) is None


def test_pieces_of_text_are_those_of_stream():
    from qwen_nb.drafts import stream_ahead
    from qwen_nb.generation import stream
    from qwen_nb.tokenizer import Tokenizer

    folder = packaged_model()
    model, tokenizer = (
        Qwen.from_pretrained(folder, torch.float32),
        Tokenizer.from_pretrained(folder),
    )
    ids = torch.tensor([tokenizer.encode("Max is in the attic.\nAnna has the ball.\nMax")])
    for stop in (None, ["\n"], ["attic", "Anna"]):
        expected = "".join(stream(model, ids, 40, tokenizer, stop, temperature=0.0))
        for draft in (None, "lookup", packaged_model("qwen2")):
            pieces = stream_ahead(model, ids, 40, tokenizer, stop, draft, temperature=0.0)
            assert "".join(pieces) == expected


@pytest.mark.parametrize("draft", [[], ["--draft", "lookup"]], ids=str)
def test_the_command_hands_on_what_ends_a_chat(draft, monkeypatch, capsys):
    from qwen_nb.chat import chat_stop_ids
    from qwen_nb.cli import main
    from qwen_nb.tokenizer import Tokenizer

    found = []
    monkeypatch.setattr(
        drafts, "stream_ahead", lambda *args, **given: found.append((args, given)) or ()
    )
    monkeypatch.setattr("sys.argv", ["qwen-nb", "generate", "Where is Max?", "--chat", *draft])
    with pytest.raises(SystemExit, match="0"):
        main()
    args, given = found[0]
    model = args[0]
    assert given["stop_ids"] == chat_stop_ids(model, Tokenizer.from_pretrained(model.folder))
    assert args[5] == (draft[1] if draft else None)
