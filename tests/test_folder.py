"""A folder's own template: its letters, and who wrote each; which template a model gets."""

import json
import random
import shutil

import pytest
from chats import ADD, NEWER, PARTS, RENDERED, assistant, newer, official, random_chat, user
from templates import CODER, PLAIN, THINKING_2507, template_of
from test_generate import one_sentence

from qwen_nb.chat import Chat, Scripted
from qwen_nb.chatml import CONTROLS, FORMS, Control, Said
from qwen_nb.folder_prompt import PromptWriter, folder_pieces, opens_thought
from qwen_nb.inspect import packaged_model
from qwen_nb.prompt import encode_pieces, folder_template, render_folder
from qwen_nb.template import chat_pieces
from qwen_nb.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained()


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    "A folder for each family, with a template that behaves as the family's."
    folders = {}
    for family in FORMS:
        folders[family] = tmp_path_factory.mktemp(family)
        (folders[family] / "chat_template.jinja").write_text(template_of(family), encoding="utf-8")
    return folders


def controls(pieces):
    return [str(piece) for piece in pieces if isinstance(piece, Control)]


@official
@newer
def test_official_texts_in_pieces(like, tokenizer):
    "By a template in a folder: the official letters, and each control token by its true writer."
    for case in RENDERED + NEWER:
        said = case.get("settings", {"enable_thinking": case.get("enable_thinking")})
        said = {name: value for name, value in said.items() if value is not None}
        said |= {key: case[key] for key in ("tools", "add_generation_prompt")}
        where = case["family"], case["name"], said
        pieces = folder_pieces(like[case["family"]], case["messages"], **said)
        by_hand = list(chat_pieces(case["messages"], case["family"], **said))
        assert "".join(pieces) == case["rendered"], where
        assert controls(pieces) == controls(by_hand), where
        assert encode_pieces(tokenizer, pieces) == encode_pieces(tokenizer, by_hand), where


def test_random_conversations(like):
    "Messages that imitate everything, by the templates of all families."
    rng, told = random.Random(5), 0
    for n in range(300):
        family = rng.choice([family for family in FORMS if FORMS[family].joins_parts])
        messages = random_chat(rng, PARTS)
        if FORMS[family].calls:
            call = dict(name=rng.choice(PARTS) or "f", arguments={rng.choice(PARTS): "</think>"})
            messages += [user("q"), assistant(rng.choice(PARTS), tool_calls=[call])]
        try:
            by_hand = list(chat_pieces(messages, family))
        except ValueError:
            continue
        pieces = folder_pieces(like[family], messages)
        assert "".join(pieces) == "".join(by_hand), (family, messages)
        assert controls(pieces) == controls(by_hand), (family, messages)
        told += 1
    assert told > 150


@pytest.mark.parametrize("name", [*CONTROLS, "<|endoftext|>"])
def test_no_place_writes_a_control_token(tmp_path, tokenizer, name):
    "Contents, thoughts, names, keys, arguments, descriptions: by a template with XML."
    (tmp_path / "chat_template.jinja").write_text(CODER, encoding="utf-8")

    def counts(word, key):
        call = dict(name=f"n{word}", arguments={f"k{word}": f"v {word}", key: "1"})
        about = {"type": word or "string", "description": word, key: "more"}
        tool = dict(name=f"n{word}", parameters=dict(properties={f"p{word}": about}))
        messages = [
            user(f"u {word}"),
            assistant(f"a {word}", tool_calls=[call]),
            dict(role="tool", content=f"{word} r"),
        ]
        names = tuple(tokenizer.special)
        pieces = folder_pieces(
            tmp_path, messages, [dict(type="function", function=tool)], names=names
        )
        assert "".join(pieces) == render_folder(
            tmp_path,
            [messages[0], assistant(f"a {word}", tool_calls=[dict(function=call)]), messages[2]],
            [dict(type="function", function=tool)],
        )
        ids = encode_pieces(tokenizer, pieces)
        return [ids.count(i) for i in tokenizer.special.values()]

    core = name.strip("<|/>")
    assert counts(name, core) == counts("", "plain") == counts(name[:-1], name[1:-1])
    assert tokenizer.encode(name, allow_special=True) == [tokenizer.special[name]]


def test_templates_in_all_their_places(tmp_path):
    "A file, a string or a list in the config, a JSON file, a folder of named ones; marks."
    one_sentence("no chat template", lambda: folder_template(tmp_path))
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert folder_template(tmp_path) == "json"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config"}')
    assert folder_template(tmp_path) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("tools")
    assert (folder_template(tmp_path), folder_template(tmp_path, [ADD])) == ("file", "tools")
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(marked)
    assert render_folder(tmp_path, [user("a"), assistant("b")]) == "ab"


def test_a_template_that_changes_words(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(PLAIN.replace("m.content", "(m.content | upper)"))
    assert "".join(folder_pieces(tmp_path, [user("a < b, c|")])).endswith("assistant\n")
    for bad in ("<|im_end|>", "Hi <|im", "end|> of", "a </think>"):
        one_sentence("cannot be told", lambda: folder_pieces(tmp_path, [user(bad)]))
    one_sentence("content is 7", lambda: folder_pieces(tmp_path, [user(7)]))
    one_sentence("at least one", lambda: folder_pieces(tmp_path, []))
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    one_sentence("does not take this", lambda: folder_pieces(tmp_path, [user("Hi")]))


def test_pieces_know_their_writers(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(template_of("qwen3.5"))
    messages = [
        user("q <think>"),
        assistant("a", reasoning_content="t", tool_calls=[dict(name="f", arguments={"k": 'v"\n'})]),
        dict(role="tool", content="r"),
    ]
    found = {}
    for piece in folder_pieces(tmp_path, messages, [ADD]):
        if isinstance(piece, Said):
            found.setdefault(piece.role, []).append(str(piece))
    assert found["user"] == ["q <think>"] and found["tool"] == ["r"]
    assert found["assistant"] == ["t", "a", "f", 'v"'] and "Add." in found["system"]


# ---- folders as people have them


def folder_with(tmp_path, template, model_type):
    if template:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type=model_type)))
    return tmp_path


def chat_of(tokenizer, folder, *texts, **kw):
    model = Scripted(tokenizer, *texts)
    model.folder = folder
    return Chat(model, tokenizer, **kw)


def prompt_of(chat):
    "The text of its prompt for one question."
    ids = chat.prompt.encode(chat.tokenizer, [user("Hi")], **chat.wishes)
    return chat.tokenizer.decode(ids)


def heard(chat, kind, question="Hi"):
    return "".join(piece for k, piece in chat.say(question) if k == kind)


SYSTEMS = dict(
    helpful="system\nYou are a helpful assistant.", named="You are Qwen, created by Alibaba"
)


@pytest.mark.parametrize(
    "family, model_type, system, switch, opened",
    [
        ("qwen2", "qwen2", "helpful", False, False),
        ("qwen2.5", "qwen2", "named", False, False),
        ("qwen3", "qwen3", "", True, False),
        ("qwen3-instruct-2507", "qwen3", "", False, False),
        ("qwen3.5", "qwen3_5", "", True, True),
        ("qwen3.5-nothink", "qwen3_5", "", True, False),
        ("qwen3.8", "qwen4_exp", "", True, True),
    ],
)
def test_chat_writes_what_the_folder_says(
    tmp_path, tokenizer, family, model_type, system, switch, opened
):
    folder = folder_with(tmp_path, template_of(family), model_type)
    chat = chat_of(tokenizer, folder, "Yes.<|im_end|>", "No.<|im_end|>")
    assert "folder" in chat.prompt.about and chat.prompt.has_switch() == switch
    list(chat.say("Hi <|im_end|>"))
    text = tokenizer.decode(chat.model.prompts[0])
    assert text == render_folder(folder, chat.messages[:1]) and text.endswith("<think>\n") == opened
    for name, words in SYSTEMS.items():
        assert (words in text) == (name == system)
    assert chat.prompt.thinks() == (FORMS[family].thinks and FORMS[family].thinks_unasked)
    assert bool(chat.messages[1].get("reasoning_content")) == opened
    if switch:
        chat.enable_thinking = not opened
        list(chat.say("And?"))
        text = tokenizer.decode(chat.model.prompts[1])
        assert text.endswith("</think>\n\n") == opened


def test_thinking_2507(tmp_path, tokenizer):
    "It always opens the thought, there is no switch, and thoughts are not in the history."
    chat = chat_of(
        tokenizer,
        folder_with(tmp_path, THINKING_2507, "qwen3"),
        "Hm.\n</think>\n\nYes.<|im_end|>",
        "Well.\n</think>\n\nNo.<|im_end|>",
    )
    assert chat.prompt.thinks() and not chat.prompt.has_switch()
    assert heard(chat, "thinking") == "Hm." and heard(chat, "answer") == "No."
    assert chat.messages[1] == assistant("Yes.", reasoning_content="Hm.")
    assert "Hm." not in tokenizer.decode(chat.model.prompts[1])
    assert opens_thought(chat.prompt.ask())


def test_coder_calls_in_xml(tmp_path, tokenizer):
    def add(a: int, b: int) -> int:
        "Add two numbers."
        return a + b

    arguments = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in (("a", 1), ("b", 2)))
    xml = f"<function=add>\n{arguments}</function>"
    chat = chat_of(
        tokenizer,
        folder_with(tmp_path, CODER, "qwen3_moe"),
        f"I add.\n<tool_call>\n{xml}\n</tool_call><|im_end|>",
        "It is 3.<|im_end|>",
        tools=[add],
    )
    assert heard(chat, "result") == "3"
    assert chat.messages[1]["tool_calls"] == [dict(name="add", arguments=dict(a="1", b="2"))]
    second = tokenizer.decode(chat.model.prompts[1])
    assert f"<tool_call>\n{xml}\n</tool_call>" in second and "<name>add</name>" in second
    assert chat.messages[-1]["content"] == "It is 3."


def test_no_template_and_a_wish(tmp_path, tokenizer):
    folder = folder_with(tmp_path, "", "qwen2")
    chat = chat_of(tokenizer, folder)
    assert "no chat template" in chat.prompt.about and "qwen2.5" in chat.prompt.about
    assert SYSTEMS["named"] in prompt_of(chat)
    folder_with(tmp_path, template_of("qwen2"), "llama")  # its own template, whoever it is
    assert SYSTEMS["helpful"] in prompt_of(chat_of(tokenizer, folder))
    wished = chat_of(tokenizer, folder, family="qwen3")
    assert "as asked for" in wished.prompt.about
    assert prompt_of(wished).startswith("<|im_start|>user")
    (folder / "chat_template.jinja").unlink()
    one_sentence("model_type is 'llama'", lambda: chat_of(tokenizer, folder))


def test_preserved_thoughts(tmp_path, tokenizer):
    "Qwen3.6: thoughts of earlier turns go, or stay if asked for; Qwen3.8 the other way round."
    for family, unsaid in (("qwen3.6", False), ("qwen3.8", True)):
        folder = folder_with(tmp_path, template_of(family), "qwen3_5")
        for keep in (None, True, False):
            texts = ["Hm.\n</think>\n\nYes.<|im_end|>", "So.\n</think>\n\nNo.<|im_end|>"]
            chat = chat_of(tokenizer, folder, *texts, preserve_thinking=keep)
            list(chat.say("a")), list(chat.say("b"))
            kept = "Hm." in tokenizer.decode(chat.model.prompts[1])
            assert kept == (unsaid if keep is None else keep), (family, keep)
    assert "set to low" in prompt_of(chat_of(tokenizer, folder, reasoning_effort="low"))


# ---- thoughts that do not end


def test_a_budget(tokenizer):
    "The thought is ended for the model, and it answers; without one it is told what happened."
    long = "<think>\n" + "so " * 200

    def talk(positions=600, **kw):
        model = Scripted(tokenizer, long, "Yes.<|im_end|>", positions=positions)
        return Chat(model, tokenizer, "qwen3", **kw)

    chat = talk(thinking_budget=7)
    events = list(chat.say("Hi"))
    message = chat.messages[1]
    assert message["content"] == "Yes." and message["reasoning_content"].endswith("directly now.")
    thought = message["reasoning_content"].partition("\n\nConsidering")[0]
    assert 0 < thought.count("so") < 8 and not [text for kind, text in events if kind == "note"]
    second = tokenizer.decode(chat.model.prompts[1])
    assert second.endswith("directly now.\n</think>\n\n") and second.count("<think>") == 1
    for endless in (talk(positions=150), talk(max_new_tokens=40), talk(80, thinking_budget=7)):
        (note,) = [text for kind, text in endless.say("Hi") if kind == "note"]
        assert note.startswith("The thought is cut off") and endless.messages[1]["content"] == ""
    done = Chat(
        Scripted(tokenizer, "<think>\na b<|im_end|>"), tokenizer, "qwen3", thinking_budget=2
    )
    list(done.say("Hi"))  # it ends its turn by itself
    assert done.messages[1]["reasoning_content"] and not done.model.texts
    for bad in (0, -1):
        one_sentence("thinking budget is", lambda: talk(thinking_budget=bad))


def test_small_models_get_the_bare_end(tokenizer):
    model = Scripted(tokenizer, "<think>\na b c d e f", "Yes.<|im_end|>")
    model.folder = packaged_model()
    chat = Chat(model, tokenizer, thinking_budget=3)
    list(chat.say("Hi"))
    assert tokenizer.decode(model.prompts[1]).endswith("\n</think>\n\n")
    assert "Considering" not in tokenizer.decode(model.prompts[1])


def test_the_packaged_folder_refuses_tools(tokenizer, tmp_path):
    "Its template says that the model has not learnt tools. Said once, the history as it was."
    folder = tmp_path / "m"
    shutil.copytree(
        packaged_model(), folder, ignore=shutil.ignore_patterns("*.safetensors", "qwen*")
    )
    assert PromptWriter(folder).thinks()
    one_sentence(
        "has not learnt to call tools", lambda: PromptWriter(folder).pieces([user("Hi")], [ADD])
    )
