"""The made-up world, its tokenizer and the packaged model."""
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.world import PEOPLE, Chooser, conversation, encode_story, measure, story

ROOT = Path(__file__).parent.parent
TOKENIZER = Tokenizer.from_file(str(packaged_model() / "tokenizer.json"))


def test_package_is_small_enough():
    assert sum(p.stat().st_size for p in packaged_model().iterdir()) <= 4_000_000


def test_a_sharper_floor_is_impossible():
    "A reader who knows the generator by heart pays the floor; one who expects other event weights pays more."
    class Wrong(Chooser):
        def __call__(self, options, weights=None):
            state = self.rng.getstate()
            pick = super().__call__(options, weights)
            if weights:
                self.nats += math.log(weights[list(options).index(pick)] / sum(weights)) + math.log(len(weights))
            assert self.rng.getstate() != state
            return pick
    right = wrong = 0
    for seed in range(300):
        a, b = Chooser(random.Random(seed)), Wrong(random.Random(seed))
        assert [line.text for line in story(a)] == [line.text for line in story(b)]
        right, wrong = right + a.nats, wrong + b.nats
    assert right < wrong


def test_stories_fit_the_model():
    longest = max(len(encode_story(story(Chooser(random.Random(seed))), TOKENIZER)[0]) for seed in range(2000))
    assert longest <= json.loads((packaged_model() / "config.json").read_text())["max_position_embeddings"]


def test_stated_scores():
    "The log's last line is what the packaged weights score, on the stories it was scored on."
    last = json.loads((packaged_model() / "training_log.jsonl").read_text().splitlines()[-1])
    scores = measure(Qwen.from_pretrained(dtype="float32"), TOKENIZER, range(1_000_000_000, 1_000_000_100))
    assert scores["floor"] == pytest.approx(last["floor"], abs=1e-3)
    assert scores["loss"] == pytest.approx(last["loss"], abs=5e-3)
    for kind in ("who", "person", "lying", "carried"): assert scores[kind] == pytest.approx(last[kind], abs=.03)


def test_transformers_opens_it():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(packaged_model(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_model())
    text = f"{PEOPLE[0]} is in the garden.\nWhere is {PEOPLE[0]}?"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == TOKENIZER.encode(text).ids
    with torch.no_grad(): torch.testing.assert_close(Qwen.from_pretrained(dtype="float32")(ids), theirs(ids).logits)
    out = theirs.generate(ids, max_new_tokens=4)
    assert tokenizer.decode(out[0]) == text + " In the garden.\n"


def test_the_training_script_runs_and_makes_this_tokenizer(tmp_path):
    script = [sys.executable, str(ROOT / "tools" / "make_model.py"), "--out", str(tmp_path)]
    subprocess.run([*script, "--steps", "2", "--batch", "1", "--log", "2", "--score-stories", "2"], check=True, capture_output=True)
    assert (tmp_path / "tokenizer.json").read_text() == (packaged_model() / "tokenizer.json").read_text()
    assert (tmp_path / "config.json").read_text() == (packaged_model() / "config.json").read_text()
    subprocess.run([*script, "--chat", "--steps", "2", "--batch", "2", "--log", "2", "--score-stories", "2"], check=True, capture_output=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (packaged_model() / name).read_text()
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [line.get("chat") for line in log if "steps" in line] == [False, True]
    out = subprocess.run([*script, "--measure-only", "--stories", "2"], check=True, capture_output=True, text=True).stdout
    assert "after a thought" in out and "answering at once" in out
    assert "loss" in out and "carried" in out or "person" in out


def test_every_answer_of_a_conversation_is_right():
    "Told again by a reader that shares no code with the generator."
    seen = set()
    for seed in range(500):
        at, has, told = {}, {}, []
        turns = conversation(Chooser(random.Random(seed)))
        for user, assistant in zip(turns[::2], turns[1::2]):
            *sentences, question = re.findall(r"[^.?!]+[.?!]", user["content"].replace("\n", " "))
            if assistant["kind"] == "told": sentences, question = [*sentences, question], None
            if assistant["kind"] == "talk": continue
            for s in map(str.strip, sentences):
                told.append(s)
                words = s.rstrip(".").removeprefix("The ").split()
                if words[1] in ("is", "went"): at[words[0]] = words[-1]
                elif words[1] == "gave": has[words[3]] = words[-1]
                elif words[1] == "dropped": at[words[-1]] = at[words[0]]; del has[words[-1]]
                else: has[words[-1]] = words[0]; at.pop(words[-1], None)
            seen.add(assistant["kind"])
            if question is None: continue
            name = question.rstrip("?").split()[-1]
            if name not in at and name not in has: right = "I do not know."
            elif question.strip().startswith("Who"): right = has.get(name, "Nobody") + "."
            else: right = f"In the {at[has.get(name, name)]}."
            assert assistant["content"] == right
            thought = assistant["reasoning_content"]
            assert name in thought
            if assistant["kind"] != "unknown":  # each fact was told, or follows: the last one of a "where" names the place
                where = (f"{name} is in", f"{name} went") if assistant["kind"] == "person" else ""
                assert re.match(r"[^.]+\.", thought)[0] == [s for s in told if name in s and s.startswith(where)][-1]  # the newest fact
                if right.startswith("In"): assert thought.endswith(right.removeprefix("In "))
    assert seen == {"told", "unknown", "person", "who", "lying", "carried"}
