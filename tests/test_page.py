"A page with a model in it: what is in it, and what is refused. (What it does: tests/browser.)"

import base64
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load
from siblings import SIBLINGS

from qwen_nb.durable import save_pretrained
from qwen_nb.inspect import packaged_model
from qwen_nb.model import Qwen, QwenConfig
from qwen_nb.page import browser_file, fill, make_page, model_parts, script_json
from qwen_nb.serve_command import run_page
from qwen_nb.tokenizer import Tokenizer


def given(path):
    "What the page's script is told."
    found = re.search(r'id="model">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    return json.loads(found[1])


@pytest.mark.parametrize("name", ["", *(name for name in SIBLINGS if name != "qwen4_exp")])
def test_the_weights_are_the_models(tmp_path, name):
    page = make_page(tmp_path / "page.html", packaged_model(name))
    weights, model = load(base64.b64decode(given(page)["file"])), Qwen.from_pretrained(
        packaged_model(name)
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
        assert written.count("</textarea>") == 1 and "<b>" not in written, trap
        assert given(page)["examples"] == [trap]
    assert fill("a {{x}} b {{y}}", x="{{y}}", y="2") == "a {{y}} b 2"
    assert json.loads(script_json("<")) == "<" and "<" not in script_json("<")


def test_nothing_is_fetched():
    for name in ("page.html", "qwen.js", "worker.js", "look.js"):
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
