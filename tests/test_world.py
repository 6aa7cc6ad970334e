"""The made-up world, its tokenizer and the packaged model."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from siblings import SIBLINGS
from tokenizers import Tokenizer

from qwen_nb.floor import SPECIAL, TAGS, encode_story, make_tokenizer, measure
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.resume import OneProcess, Run, optimizer_step
from qwen_nb.run import train
from qwen_nb.settings import TrainConfig, read_run_config
from qwen_nb.tokenizer import Tokenizer as ChatTokenizer
from qwen_nb.tokenizer import learn
from qwen_nb.world import PEOPLE, Chooser, conversation, story

ROOT = Path(__file__).parent.parent
TOLD = [
    "data",
    "lesson_rows",
    "steps",
    "batch_size",
    "seq_len",
    "lr",
    "warmup",
    "final_lr",
    "weight_decay",
    "clip",
    "beta1",
    "beta2",
    "seed",
    "dtype",
]
TOKENIZER = Tokenizer.from_file(str(packaged_model() / "tokenizer.json"))


def test_package_is_small_enough():
    files = [p for p in packaged_model().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files if p.parent == packaged_model()) <= 4_000_000
    assert (
        sum(p.stat().st_size for p in files if p.parent != packaged_model()) <= 15_000_000
    )  # the siblings


def test_a_sharper_floor_is_impossible():
    """A reader who knows the generator by heart pays the floor; one who expects other event
    weights pays more."""

    class Wrong(Chooser):
        def __call__(self, options, weights=None):
            state = self.rng.getstate()
            pick = super().__call__(options, weights)
            if weights:
                self.nats += math.log(weights[list(options).index(pick)] / sum(weights)) + math.log(
                    len(weights)
                )
            assert self.rng.getstate() != state
            return pick

    right = wrong = 0
    for seed in range(300):
        a, b = Chooser(random.Random(seed)), Wrong(random.Random(seed))
        assert [line.text for line in story(a)] == [line.text for line in story(b)]
        right, wrong = right + a.nats, wrong + b.nats
    assert right < wrong


def test_stories_fit_the_model():
    longest = max(
        len(encode_story(story(Chooser(random.Random(seed))), TOKENIZER)[0]) for seed in range(2000)
    )
    assert (
        longest
        <= json.loads((packaged_model() / "config.json").read_text())["max_position_embeddings"]
    )


def test_stated_scores():
    "The log's last line is what the packaged weights score, on the stories it was scored on."
    last = json.loads((packaged_model() / "training_log.jsonl").read_text().splitlines()[-1])
    scores = measure(
        Qwen.from_pretrained(dtype="float32"), TOKENIZER, range(1_000_000_000, 1_000_000_100)
    )
    assert scores["floor"] == pytest.approx(last["floor"], abs=1e-3)
    assert scores["loss"] == pytest.approx(last["loss"], abs=5e-3)
    for kind in ("who", "person", "lying", "carried"):
        assert scores[kind] == pytest.approx(last[kind], abs=0.03)


def test_transformers_opens_it():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        packaged_model(), dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_model())
    text = f"{PEOPLE[0]} is in the garden.\nWhere is {PEOPLE[0]}?"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == TOKENIZER.encode(text).ids
    with torch.no_grad():
        torch.testing.assert_close(Qwen.from_pretrained(dtype="float32")(ids), theirs(ids).logits)
    out = theirs.generate(ids, max_new_tokens=4)
    assert tokenizer.decode(out[0]) == text + " In the garden.\n"


def test_the_model_can_be_made_again(tmp_path):
    """Its tokenizer is byte for byte what the script writes; its first loss is the stored one
    (the whole run takes too long for a test)."""
    script = [sys.executable, str(ROOT / "tools" / "make_model.py")]
    subprocess.run(
        [*script, "tokenizer", "--out", str(tmp_path / "model")], check=True, capture_output=True
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (packaged_model() / name).read_bytes()
    config = read_run_config(
        ROOT / "configs" / "packaged.toml",
        [
            f"out={tmp_path / 'run'}",
            "dtype=bfloat16",  # as it was trained; the file leaves it to the machine
            "peak_tflops=1",
            "eval_every=0",
            "log_every=1",
            "sample=0",
            "save_every=100000",
        ],
    )
    run = Run(config, OneProcess("cpu"))
    assert {f.name: getattr(run.model.config, f.name) for f in fields(run.model.config)} == asdict(
        QwenConfig.from_pretrained()
    )
    first = json.loads((packaged_model() / "training_log.jsonl").read_text().splitlines()[0])
    assert optimizer_step(run)["loss"] == pytest.approx(first["first_loss"], rel=2e-3)
    assert {k: v for k, v in asdict(config).items() if k in TOLD} == {k: first[k] for k in TOLD}


@pytest.mark.parametrize("name", ["qwen2", "qwen3_5"])
def test_a_second_seed_is_the_same_run_with_another_seed(tmp_path, name):
    "Its log is in the package; its weights are not."
    out, config_from = f"out={tmp_path / 'run'}", packaged_model(name) / "config.json"
    settings = [out, f"config_from={config_from}", "peak_tflops=1", "seed=1", "dtype=bfloat16"]
    config = read_run_config(ROOT / "configs" / f"{name}.toml", settings)
    log = (packaged_model(name) / "training_log_seed1.jsonl").read_text().splitlines()
    first, *rest = map(json.loads, log)
    assert first["seed"] == 1 and [line["step"] for line in rest] == list(range(400, 3201, 400))
    assert {k: v for k, v in asdict(config).items() if k in TOLD} == {k: first[k] for k in TOLD}
    loss = optimizer_step(Run(config, OneProcess("cpu")))["loss"]
    assert loss == pytest.approx(first["first_loss"], rel=2e-3)


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_sibling_can_be_made_again(tmp_path, name):
    "As above; and its log ends with what its weights score."
    config = read_run_config(
        ROOT / "configs" / f"{name}.toml",
        [
            f"out={tmp_path / 'run'}",
            "dtype=bfloat16",  # as it was trained; the file leaves it to the machine
            f"config_from={packaged_model(name) / 'config.json'}",
            "peak_tflops=1",
        ],
    )
    first, *log = map(
        json.loads, (packaged_model(name) / "training_log.jsonl").read_text().splitlines()
    )
    assert optimizer_step(Run(config, OneProcess("cpu")))["loss"] == pytest.approx(
        first["first_loss"], rel=2e-3
    )
    assert {k: v for k, v in asdict(config).items() if k in TOLD} == {k: first[k] for k in TOLD}
    scores = measure(
        Qwen.from_pretrained(packaged_model(name), dtype="float32"),
        TOKENIZER,
        range(1_000_000_000, 1_000_000_100),
    )
    assert log[-1]["step"] == config.steps and {
        k: v for k, v in log[-1].items() if k != "step"
    } == pytest.approx(scores, abs=2e-2)


def test_a_sibling_is_installed_with_its_own_files(tmp_path):
    "Qwen1's tokenizer is a list of ranks, and gives the same ids."
    small = dict(
        out=str(tmp_path / "run"),
        config_from=str(packaged_model("qwen1")),
        steps=1,
        batch_size=1,
        eval_every=0,
        peak_tflops=1.0,
    )
    (tmp_path / "small.json").write_text(json.dumps(small))
    train(TrainConfig(**small))
    (out := tmp_path / "model").mkdir()
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools/make_model.py"),
            "install",
            small["out"],
            "--sibling",
            "qwen1",
            "--out",
            str(out),
            "--config",
            str(tmp_path / "small.json"),
        ],
        check=True,
        capture_output=True,
    )
    assert (
        {p.name for p in out.iterdir()}
        == {p.name for p in packaged_model("qwen1").iterdir()}
        >= {"qwen.tiktoken", "config.json"}
    )
    text = "Max has the ball.\nWho has the ball? Max.\n<|endoftext|>"
    assert (
        ChatTokenizer.from_pretrained(out).encode(text, allow_special=True)
        == TOKENIZER.encode(text).ids
    )


def test_a_run_can_be_installed(tmp_path):
    small = dict(
        out=str(tmp_path / "run"),
        steps=3,
        batch_size=2,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        eval_every=0,
        save_every=1,
        keep=0,
        peak_tflops=1.0,
    )
    (tmp_path / "small.json").write_text(json.dumps(small))
    final, out = train(TrainConfig(**small)), tmp_path / "model"
    shutil.copytree(packaged_model(), out)
    run = [sys.executable, str(ROOT / "tools" / "make_model.py")]
    subprocess.run(
        [
            *run,
            "install",
            small["out"],
            "--out",
            str(out),
            "--config",
            str(tmp_path / "small.json"),
        ],
        check=True,
        capture_output=True,
    )
    assert (out / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    about, *log = map(json.loads, (out / "training_log.jsonl").read_text().splitlines())
    assert (
        about["hidden_size"] == 16
        and [line["step"] for line in log] == [1, 2, 3]
        and log[-1]["who"] < 0.5
    )
    said = subprocess.run(
        [*run, "score", "-n", "2", "--out", str(out)], check=True, capture_output=True, text=True
    ).stdout
    assert "loss" in said and "after a thought" in said and "answering at once" in said


def test_every_answer_of_a_conversation_is_right():
    "Told again by a reader that shares no code with the generator."
    seen = set()
    for seed in range(500):
        at, has, told = {}, {}, []
        turns = conversation(Chooser(random.Random(seed)))
        for user, assistant in zip(turns[::2], turns[1::2]):
            *sentences, question = re.findall(r"[^.?!]+[.?!]", user["content"].replace("\n", " "))
            if assistant["kind"] == "told":
                sentences, question = [*sentences, question], None
            if assistant["kind"] == "talk":
                continue
            for s in map(str.strip, sentences):
                told.append(s)
                words = s.rstrip(".").removeprefix("The ").split()
                if words[1] in ("is", "went"):
                    at[words[0]] = words[-1]
                elif words[1] == "gave":
                    has[words[3]] = words[-1]
                elif words[1] == "dropped":
                    at[words[-1]] = at[words[0]]
                    del has[words[-1]]
                else:
                    has[words[-1]] = words[0]
                    at.pop(words[-1], None)
            seen.add(assistant["kind"])
            if question is None:
                continue
            name = question.rstrip("?").split()[-1]
            if name not in at and name not in has:
                right = "I do not know."
            elif question.strip().startswith("Who"):
                right = has.get(name, "Nobody") + "."
            else:
                right = f"In the {at[has.get(name, name)]}."
            assert assistant["content"] == right
            thought = assistant["reasoning_content"]
            assert name in thought
            if (
                assistant["kind"] != "unknown"
            ):  # each fact was told, or follows: the last one of a "where" names the place
                where = (f"{name} is in", f"{name} went") if assistant["kind"] == "person" else ""
                assert (
                    re.match(r"[^.]+\.", thought)[0]
                    == [s for s in told if name in s and s.startswith(where)][-1]
                )  # the newest fact
                if right.startswith("In"):
                    assert thought.endswith(right.removeprefix("In "))
    assert seen == {"told", "unknown", "person", "who", "lying", "carried"}


def test_training_on_stories_gives_the_packaged_kind():
    texts = [
        "\n".join(line.text for line in story(Chooser(random.Random(seed)))) for seed in range(300)
    ]
    made = make_tokenizer(texts, 400)
    tok = ChatTokenizer.train(texts, 400, SPECIAL, TAGS)
    model = json.loads(made.to_str())["model"]
    assert tok.vocabulary.tokens == model["vocab"] and tok.vocabulary.merges == [
        tuple(m) for m in model["merges"]
    ]
    assert tok.special == {t.content: i for i, t in made.get_added_tokens_decoder().items()}
    assert (tok.vocabulary.tokens, tok.vocabulary.merges) == learn(texts, 400 - 256 - 9)
    assert tok.control == {tok.special[name] for name in SPECIAL}
