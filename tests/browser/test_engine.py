"The small Qwen in JavaScript, in a real browser: the same ids, logits and texts as the package."

import base64
import json
import random
from pathlib import Path

import pytest
import torch

from qwen_nb.generation import generate
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.world import Chooser, story

pytestmark = pytest.mark.browser
ENGINE = Path(__file__).resolve().parents[2] / "qwen_nb/browser/qwen.js"
FAMILIES = ["", "qwen1", "qwen2", "qwen3_moe", "qwen3_5", "qwen3_5_moe"]
SIGNS = list("abc XYZ 0189 .,'!?\n\t\r  éü世🌍ſ\u0085\u00a0\ufeff\u2003'")
SIGNS += ["'s", "'LL", " the", "Max", "<|im_end|>", "<think>", "e\u0301"]
OPEN = """([file, config]) => {
    const bytes = Uint8Array.from(atob(file), (c) => c.charCodeAt(0));
    window.model = new Qwen(config, readSafetensors(bytes.buffer));
}"""
LOGITS = "(ids) => Array.from(model.read(ids, new Context()))"
WRITE = """(prompts) => prompts.map(([ids, n]) => [...write(model, ids, { maxNewTokens: n })])"""


@pytest.fixture
def engine(page):
    page.goto("about:blank")
    page.add_script_tag(path=ENGINE)
    return page


def open_model(page, name):
    folder = packaged_model(name)
    file = base64.b64encode((folder / "model.safetensors").read_bytes()).decode()
    page.evaluate(OPEN, [file, json.loads((folder / "config.json").read_text())])
    return Qwen.from_pretrained(folder, dtype=torch.float32)


def test_a_thousand_texts_are_cut_alike(engine):
    draw, tokenizer = random.Random(0), Tokenizer.from_pretrained()
    texts = ["".join(draw.choices(SIGNS, k=draw.randrange(1, 30))) for _ in range(1000)]
    file = json.loads((packaged_model() / "tokenizer.json").read_text(encoding="utf-8"))
    engine.evaluate("(file) => { window.tokenizer = new Tokenizer(file) }", file)
    found = engine.evaluate("(texts) => texts.map((t) => tokenizer.encode(t))", texts)
    again = engine.evaluate("(all) => all.map((ids) => tokenizer.decode(ids))", found)
    for text, ids, back in zip(texts, found, again):
        assert ids == tokenizer.encode(text) and back == tokenizer.decode(ids), repr(text)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_and_greedy_texts(engine, name):
    "Logits to 2e-5 of their scale, one of them of a long text; 40 texts, 200 of the small model."
    model, tokenizer = open_model(engine, name), Tokenizer.from_pretrained()
    prompts = []
    for seed in range(40 if name else 200):
        lines = [line.text for line in story(Chooser(random.Random(seed)))]
        told = tokenizer.encode(" ".join(lines))
        prompts.append(told[: 10 + seed % 40])
    for ids in [*prompts[:10], (prompts[0] * 50)[:400]]:
        ours, theirs = torch.tensor(engine.evaluate(LOGITS, ids)), model(torch.tensor([ids]))[0, -1]
        assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max(), name
    found = engine.evaluate(WRITE, [[ids, 16] for ids in prompts])
    for ids, new in zip(prompts, found):
        want = generate(model, torch.tensor([ids]), 16, temperature=0.0, stop_ids=())
        assert new == want[0, len(ids) :].tolist(), name
