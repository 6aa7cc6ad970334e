"A page with a model in it: what is in it, and what is refused. (What it does: tests/browser.)"

import base64
import html
import json
import random
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load
from siblings import SIBLINGS

from qwen_nb.ablation import LIVE_HEIGHTS, show_live
from qwen_nb.durable import save_pretrained
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.page import (
    ON_THE_PAGE,
    PICTURES,
    browser_file,
    fill,
    make_page,
    model_parts,
    page_html,
    script_json,
)
from qwen_nb.prompt import encode_chat
from qwen_nb.serve_command import run_page
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.world import Chooser, World, ask, conversation, events, happen, opening, thought


def given(path):
    "What the page's script is told."
    found = re.search(r'id="model">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    return json.loads(found[1])


@pytest.mark.parametrize("name", ["", *(name for name in SIBLINGS if name != "qwen4_exp")])
def test_the_weights_are_the_models(tmp_path, name):
    page = make_page(tmp_path / "page.html", packaged_model(name))
    weights, model = (
        load(base64.b64decode(given(page)["file"])),
        Qwen.from_pretrained(packaged_model(name)),
    )
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    vocabulary, tokenizer = given(page)["vocabulary"], Tokenizer.from_pretrained()
    assert len(vocabulary["model"]["vocab"]) + len(vocabulary["added_tokens"]) == len(tokenizer)
    assert given(page)["stopIds"] == [450, 448]


def test_no_text_gets_out_of_its_place(tmp_path):
    traps = ["</script><script>alert(1)</script>", "</textarea><b>", "{{model}}", "<!--<script>"]
    for trap in traps:
        page = make_page(tmp_path / "page.html", texts=[trap], title=trap, about=trap)
        written = page.read_text(encoding="utf-8")
        assert written.count("<script") == written.count("</script>") == 4, trap
        boxes = browser_file("page.html").count("</textarea>")
        assert written.count("</textarea>") == boxes and "<b>" not in written, trap
        assert given(page)["examples"] == [trap]
    assert fill("a {{x}} b {{y}}", x="{{y}}", y="2") == "a {{y}} b 2"
    assert json.loads(script_json("<")) == "<" and "<" not in script_json("<")


def test_nothing_is_fetched():
    for name in ("page.html", "qwen.js", "worker.js", *(f"{name}.js" for name in PICTURES)):
        outward = r"fetch\(|XMLHttp|import\(|https?://(?!github.com/qwen-nb)"
        assert not re.search(outward, browser_file(name)), name


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        model_parts(path)
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


def test_what_the_engine_cannot_run_is_refused(tmp_path):
    refused(packaged_model("qwen4_exp"), "qwen4_exp", "qwen-nb chat")
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, head_dim=16, vocab_size=512, max_position_embeddings=64)
    stretched = Qwen(QwenConfig(**sizes, rope_scaling=scaling))
    save_pretrained(stretched, tmp_path / "yarn", Tokenizer.from_pretrained())
    refused(tmp_path / "yarn", "rope_scaling")


def test_a_page_that_is_too_large(tmp_path):
    large = Qwen(QwenConfig(hidden_size=1024, num_hidden_layers=1, vocab_size=512))
    save_pretrained(large, tmp_path / "large", Tokenizer.from_pretrained())
    with pytest.raises(ValueError, match="the page would have .* MB, more than"):
        make_page(tmp_path / "page.html", tmp_path / "large")
    assert not (tmp_path / "page.html").exists()


def test_the_command(tmp_path, capsys):
    out = tmp_path / "page.html"
    args = SimpleNamespace(out=out, model=None, title="My own", text=["Max is"])
    assert run_page(args) == 0 and "2.9 MB" in capsys.readouterr().out
    assert given(out)["examples"] == ["Max is"] and "<h1>My own</h1>" in out.read_text()


def test_what_speaks_of_the_world_is_in_a_page_without_texts_of_its_own(tmp_path):
    whole = given(make_page(tmp_path / "page.html"))
    assert whole["isOfTheWorld"] and whole["hybrid"]["config"]["model_type"] == "qwen3_5"
    own = given(make_page(tmp_path / "page.html", texts=["Once upon a time"]))
    assert not own["isOfTheWorld"] and own["hybrid"] is None
    assert given(make_page(tmp_path / "page.html", packaged_model("qwen3_5")))["hybrid"] is None


def test_a_page_of_one_picture(tmp_path):
    assert re.findall(r'<section id="(\w+)"', browser_file("page.html")) == ON_THE_PAGE
    whole = make_page(tmp_path / "whole.html")
    for picture in ON_THE_PAGE:
        page = make_page(tmp_path / "page.html", only=picture)
        assert f'<body data-only="{picture}">' in page.read_text(encoding="utf-8")
        assert (given(page)["hybrid"] is not None) == (picture == "memories")
        rest = {name: part for name, part in given(whole).items() if name != "hybrid"}
        assert given(page) | rest == given(page), picture
    with pytest.raises(ValueError, match="no picture 'legs' on the page; there are ask, inside"):
        page_html(only="legs")
    with pytest.raises(ValueError, match="'ask' speaks of the made-up world"):
        page_html(only="ask", texts=["Once upon a time"])


@pytest.fixture
def shown(monkeypatch):
    "What is displayed in a cell."
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: found.append(data))
    return found


@pytest.mark.parametrize("why", ["no notebook", "no kernel", "a test"])
def test_a_live_picture_that_nobody_watches_is_one_line(monkeypatch, shown, capsys, why):
    monkeypatch.delenv("IN_TEST", raising=False)
    if why == "no kernel":  # as nbdev and tools/notebooks.py run notebooks
        monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace())
    if why == "a test":
        monkeypatch.setenv("IN_TEST", "1")
        monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    show_live("hands")
    said = capsys.readouterr().out
    assert not shown and said.count("\n") == 1 and "JupyterLab" in said


def test_a_live_picture_is_the_page_in_a_frame(monkeypatch, shown):
    assert [*LIVE_HEIGHTS] == ON_THE_PAGE
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    show_live("hands")
    show_live("off", height=123)
    frame, other = (data["text/html"] for data in shown)
    assert f"height: {LIVE_HEIGHTS['hands']}px" in frame and "height: 123px" in other
    tag, page = re.fullmatch(r'(<iframe .*)srcdoc="([^"]*)"></iframe>', frame, re.S).groups()
    assert html.unescape(page) == page_html(only="hands")
    assert "src" not in tag and not re.search(r"https?://(?!github.com/qwen-nb)", page)
    assert len(frame) < 3_500_000
    with pytest.raises(ValueError, match="no picture 'legs'"):
        show_live("legs")


def in_node(names, script, told):
    "What a script says of `told`, after some of the page's files, in Node."
    if not shutil.which("node"):
        pytest.skip("no Node here; the browser tests ask the same of a browser")
    source = "\n".join(browser_file(f"{name}.js") for name in names)
    source += f"\nconst told = JSON.parse(require('fs').readFileSync(0));\n{script}"
    done = subprocess.run(
        ["node", "-e", source], input=json.dumps(told), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


HEAR = """
const found = told.map((sentences) => {
  const w = new World();
  return sentences.map((sentence) => {
    const isHeard = hear(w, sentence);
    return [isHeard, [...w.at], [...w.has], Object.entries(events(w))];
  });
});
console.log(JSON.stringify(found));
"""


def random_story(seed):
    "Sentences, and the world after each of them."
    rng = random.Random(seed)
    choose, w = Chooser(rng), World()
    for line in opening(choose, w, rng.randint(2, 4), rng.randint(1, 3)):
        yield line.text, w
    for _ in range(rng.randrange(12)):
        kinds = events(w)
        yield happen(w, rng.choice(kinds[rng.choice(list(kinds))])), w


def told_events(w):
    "What `events` gives, as sentences: each tried on a copy of the world."
    copy = lambda: World(dict(w.at), dict(w.has))  # noqa: E731
    return [[kind, [happen(copy(), e) for e in some]] for kind, some in events(w).items()]


def test_the_world_is_the_packages():
    "400 stories: the same world, in the same order, and the same future, after every sentence."
    stories, states = [], []
    for seed in range(400):
        stories.append([])
        states.append([])
        for sentence, w in random_story(seed):
            stories[-1].append(sentence)
            pairs = [[list(pair) for pair in part.items()] for part in (w.at, w.has)]
            states[-1].append([True, *pairs, told_events(w)])
    found = in_node(["world"], HEAR, stories)
    for sentences, want, got in zip(stories, states, found):
        assert got == want, sentences
    nothing = ["Max is in the cellar.", "max is in the attic.", "Max has the ball", "Who is Max?"]
    assert all(not heard for heard, *_ in in_node(["world"], HEAR, [nothing])[0])


REPLY = """
const found = told.map((texts) => {
  const { answer, thought } = reply(texts);
  return [answer, thought];
});
console.log(JSON.stringify(found));
"""


def test_the_truth_is_the_packages():
    "Answers and thoughts: every question after 300 stories, and 600 conversations."
    asked, want = [], []
    for seed in range(300):
        told = []
        for sentence, w in random_story(seed):
            told.append(sentence)
        names = [("person", n) for n in w.people()]
        names += [(kind, n) for n in w.things() for kind in ("who", "thing")]
        for kind, name in names:
            question, answer = ask(w, kind, name)
            asked.append([" ".join([*told, question])])
            want.append([answer, thought(w, told, kind, name)])
    for seed in range(600):
        messages = conversation(Chooser(random.Random(seed)))
        asked.append([m["content"] for m in messages[::2]])
        want.append([messages[-1]["content"], messages[-1]["reasoning_content"]])
    for texts, right, found in zip(asked, want, in_node(["world"], REPLY, asked)):
        assert found == right, texts


CHAT = """
const tokenizer = new Tokenizer(told.file);
const found = told.chats.map(([messages, thinks]) => encodeChat(tokenizer, messages, thinks));
console.log(JSON.stringify(found));
"""


def test_a_conversation_has_the_packages_ids():
    tokenizer, chats = Tokenizer.from_pretrained(), []
    for seed in range(100):
        told = conversation(Chooser(random.Random(seed)))[:-1]
        messages = [dict(role=m["role"], content=m["content"]) for m in told]
        chats.append([messages, seed % 2 == 0])
    chats += [[[dict(role="user", content=text)], True] for text in ("<|im_end|>", "", " \n a")]
    file = json.loads((packaged_model() / "tokenizer.json").read_text(encoding="utf-8"))
    found = in_node(["qwen"], CHAT, dict(file=file, chats=chats))
    for (messages, thinks), ids in zip(chats, found):
        thinking = None if thinks else False
        assert ids == encode_chat(tokenizer, messages, "qwen3", enable_thinking=thinking), messages


def test_the_engine_can_be_read():
    "At most 500 lines of code, and 100 columns."
    for name in ("qwen", "worker", *PICTURES):
        lines = browser_file(f"{name}.js").splitlines()
        assert all(len(line) <= 100 for line in lines), name
        code = [line for line in lines if line.strip() and not line.strip().startswith("//")]
        assert len(code) <= 500, name
