"""Conversations that go well, and those that go wrong."""

import json
import re

import pytest
import torch
from chats import ADD, QWEN35_TEMPLATES, assistant, user
from test_generate import one_sentence
from test_tools import shop

import qwen_nb.chat as c
from qwen_nb import thinking
from qwen_nb.chat import Chat, Scripted, chat_widget, draw_transcript
from qwen_nb.model import Qwen
from qwen_nb.prompt import encode_chat
from qwen_nb.template import render_chat
from qwen_nb.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained()


def test_qwen1(tokenizer):
    "Older than templates: Qwen2.5's text, another system message, no tools. (Ids: test_qwen1.py.)"
    talked = [user("q"), assistant("a", reasoning_content="t")]
    assert render_chat(talked, "qwen1", enable_thinking=False) == render_chat(
        [dict(role="system", content="You are a helpful assistant."), *talked], "qwen2.5"
    )
    assert "You are" not in render_chat([dict(role="system", content=""), *talked], "qwen1")
    chat = talk(tokenizer, "Yes.<|im_start|>user\nNever", family="qwen1")
    assert said(chat.say("One?"), "answer") == "Yes." and chat.model.prompts == [
        encode_chat(tokenizer, chat.messages[:1], "qwen1")
    ]
    for kw in (dict(tools=[ADD]), {}):
        one_sentence(
            "no place for tools",
            lambda: render_chat(
                [user("q"), assistant("", tool_calls=[] if kw else [dict(name="add")])],
                "qwen1",
                **kw,
            ),
        )


def talk(tokenizer, *texts, positions=4096, **kw):
    return Chat(
        Scripted(tokenizer, *texts, positions=positions), tokenizer, **dict(family="qwen3") | kw
    )


def said(events, kind):
    return "".join(piece for k, piece in events if k == kind)


CALL = '<tool_call>\n{"name": "shop", "arguments": {"item": "tea"}}\n</tool_call>'
XML = """<tool_call>
<function=shop>
<parameter=item>
tea
</parameter>
<parameter=count>
2
</parameter>
</function>
</tool_call>"""


def test_a_conversation(tokenizer):
    chat = talk(
        tokenizer,
        "<think>\nHm.\n</think>\n\nYes.<|im_end|>",
        "No.<|endoftext|>never",
        system="Be brief.",
    )
    first, second = list(chat.say("One?")), list(chat.say("Two?"))
    assert (said(first, "thinking"), said(first, "answer"), said(second, "answer")) == (
        "Hm.",
        "Yes.",
        "No.",
    ) and said(second, "note") == ""
    assert chat.messages == [
        dict(role="system", content="Be brief."),
        user("One?"),
        assistant("Yes.", reasoning_content="Hm."),
        user("Two?"),
        assistant("No."),
    ]
    assert chat.model.prompts == [
        encode_chat(tokenizer, chat.messages[:n], "qwen3") for n in (2, 4)
    ]
    chat.reset()
    chat.enable_thinking = False
    list(chat.say("One?"))
    assert (
        chat.model.prompts[-1]
        == encode_chat(tokenizer, chat.messages[:2], "qwen3", enable_thinking=False)
        and len(chat.messages) == 3
    )


@pytest.mark.parametrize(
    "family, call, arguments",
    [
        ("qwen3", CALL, dict(item="tea")),
        ("qwen2.5", CALL, dict(item="tea")),
        ("qwen3.5", XML, dict(item="tea", count="2")),
    ],
)
def test_the_loop_with_tools(tokenizer, family, call, arguments):
    opened = "" if family != "qwen3.5" else "Hm.\n</think>\n\n"  # the prompt has opened it
    chat = talk(
        tokenizer,
        f"{opened}I look.\n{call}\n{call}<|im_end|>",
        f"{opened}Done.<|im_end|>",
        family=family,
        tools=[shop],
    )
    events, good = list(chat.say("Buy tea.")), dict(name="shop", arguments=arguments)
    assert [k for k, _ in events if k in ("call", "result", "note")] == [
        "call",
        "call",
        "result",
        "result",
    ] and said(events, "answer") == "I look.Done."
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"] == [good, good] and json.loads(
        chat.messages[2]["content"]
    )["count"] == int(arguments.get("count", 1))
    assert chat.model.prompts[1] == encode_chat(tokenizer, chat.messages[:4], family, chat.tools)
    assert chat.messages[1].get("reasoning_content") == ("Hm." if opened else None)


def test_a_broken_call_is_fed_back(tokenizer):
    chat = talk(
        tokenizer,
        '<tool_call>\n{"name": \n</tool_call><|im_end|>',
        CALL.replace("tea", "nothing") + "<|im_end|>",
        "Sorry.<|im_end|>",
        tools=[shop],
    )
    events = list(chat.say("Buy."))
    assert [m["role"] for m in chat.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ] and said(events, "answer") == "Sorry."
    assert (
        "could not be read" in chat.messages[2]["content"]
        and "KeyError" in chat.messages[4]["content"]
        and '{"name":' in chat.messages[1]["content"]
    )


def test_a_model_that_calls_for_ever_is_stopped(tokenizer):
    chat = talk(
        tokenizer, *[CALL + "<|im_end|>"] * 9, "Done.<|im_end|>", tools=[shop], max_rounds=3
    )
    events = list(chat.say("Buy."))
    assert (
        [k for k, _ in events].count("result") == 3
        and "after 3 rounds" in said(events, "note")
        and len(chat.model.prompts) == 4
    )
    chat.model.texts = [tokenizer.encode("Yes.")]
    assert said(list(chat.say("Still there?")), "answer") == "Yes."
    without = talk(
        tokenizer, CALL + "<|im_end|>"
    )  # no tools: the call is shown and kept, nothing runs
    assert [k for k, _ in without.say("Buy.")] == ["call"] and without.messages[-1]["tool_calls"]


@pytest.mark.parametrize(
    "text, kind, want",
    [
        ("In the garden.<|im_end|>", "answer", dict(content="I")),
        (
            "<think>\nHm, so.\n</think>\n\nYes.<|im_end|>",
            "thinking",
            dict(content="", reasoning_content="H"),
        ),
        (
            f"So.{CALL}{CALL}<|im_end|>",
            "call",
            dict(content="So.", tool_calls=[dict(name="shop", arguments=dict(item="tea"))]),
        ),
    ],
)
def test_broken_off(tokenizer, text, kind, want):
    chat = talk(tokenizer, text, "Yes.<|im_end|>", tools=[shop])
    events = chat.say("Where?")
    for k, piece in events:
        if k == kind:
            break
    events.close()
    written = chat.messages[1]
    for key, value in want.items():
        assert written[key][: len(value)] == value or written[key].startswith(value), written
    assert (
        len(chat.messages) == 2
        and said(list(chat.say("Sure?")), "answer") == "Yes."
        and chat.messages[3]["content"] == "Yes."
    )


def test_interrupted(tokenizer, monkeypatch):
    "Ctrl-C inside the model, and inside a tool."

    class Interrupted(Scripted):
        def forward(self, *args, **kw):
            if len(self.ids) == 3:
                raise KeyboardInterrupt
            return super().forward(*args, **kw)

    chat = Chat(Interrupted(tokenizer, "In the garden, I think.", "Yes."), tokenizer, "qwen3")
    heard = []
    with pytest.raises(KeyboardInterrupt):
        heard += iter(chat.say("Where?"))
    assert (
        [m["role"] for m in chat.messages] == ["user", "assistant"]
        and "In the garden, I think.".startswith(chat.messages[1]["content"])
        and len(chat.messages[1]["content"]) > 5
    )
    chat.model.__class__ = Scripted
    assert said(list(chat.say("Sure?")), "answer") == "Yes."

    def stuck() -> str:
        "Never ends."
        raise KeyboardInterrupt

    chat = talk(
        tokenizer,
        CALL.replace("shop", "stuck").replace('"item": "tea"', "") + "<|im_end|>",
        "Yes.<|im_end|>",
        tools=[stuck],
    )
    with pytest.raises(KeyboardInterrupt):
        list(chat.say("Go."))
    assert said(list(chat.say("Sure?")), "answer") == "Yes."


def test_too_long(tokenizer):
    chat = talk(tokenizer, *["In the garden.<|im_end|>"] * 20, positions=160, system="Be brief.")
    notes = [said(list(chat.say(f"Where is Max? {n}")), "note") for n in range(20)]
    assert (
        not notes[0]
        and notes[-1].startswith("The conversation no longer fits: its oldest questions, ")
        and len(chat.messages) == 41
    )  # history keeps all
    system = encode_chat(tokenizer, chat.messages[:1], "qwen3", add_generation_prompt=False)
    for n, prompt in enumerate(chat.model.prompts):
        assert (
            len(prompt) <= 120
            and prompt[: len(system)] == system
            and f"Where is Max? {n}<" in tokenizer.decode(prompt)
        )
        start = tokenizer.special["<|im_start|>"]
        assert (
            tokenizer.decode(prompt[len(system) :]).startswith("<|im_start|>user")
            and prompt.count(start) % 2 == 1
        )  # whole turns: system, pairs, question, header
    before = list(chat.messages)
    one_sentence(
        "the last question, with what belongs to it, has",
        lambda: list(chat.say("Where is Max? " * 60)),
    )
    assert chat.messages == before
    events = chat.say("Sure?")
    assert next(events)[0] == "note"
    events.close()  # at once: question and answer are both there, the answer empty
    assert chat.messages[len(before) :] == [user("Sure?"), assistant()]


def test_room_and_seed(tokenizer, monkeypatch):
    chat = talk(tokenizer, "a " * 500, positions=64)
    events = list(chat.say("Hi"))
    prompt = len(chat.model.prompts[0])
    assert (
        "cut off" in said(events, "note")
        and len(tokenizer.encode("a " * 500)) > 64 - prompt
        and chat.messages[1]["content"]
    )
    short = talk(tokenizer, "a b c d e f g", max_new_tokens=3)
    assert (
        "cut off" in said(list(short.say("Hi")), "note")
        and len(tokenizer.encode(short.messages[1]["content"])) <= 3
    )
    model = Qwen.from_pretrained(dtype="float32")

    def run(seed):
        chat = Chat(
            model, tokenizer, max_new_tokens=12, temperature=4.0, seed=seed
        )  # hot enough for a model that is sure
        return [[piece for _, piece in chat.say("Where is Max?")] for _ in range(2)]

    assert run(1) == run(1) != run(2) and run(1)[0] != run(1)[1]
    seeds, stream = [], thinking.stream
    monkeypatch.setattr(
        thinking, "stream", lambda *a, seed, **kw: seeds.append(seed) or stream(*a, seed=seed, **kw)
    )
    run(1)
    run(1)
    run(None)
    assert seeds[:2] == seeds[2:4] and len(set(seeds[:2])) == 2 and seeds[4:] == [None, None]
    one_sentence("temperature is -1", lambda: Chat(model, tokenizer, temperature=-1))
    one_sentence("content is 7", lambda: list(Chat(model, tokenizer).say(7)))


def test_transcript_is_escaped():
    chat = [
        dict(role="system", content="s"),
        user("<script>alert(1)</script>"),
        assistant("<b>&", reasoning_content="<i>", tool_calls=[dict(name="<u>", arguments={})]),
        dict(role="tool", content="<img>"),
    ]
    seen = draw_transcript(chat)
    for tag in ("<script>", "<b>&", "<i>", "<u>", "<img>"):
        assert tag in repr(seen) and tag not in seen._repr_html_().replace(
            "<b>you</b>", ""
        ).replace("<b>model</b>", "")
    assert repr(seen).splitlines()[1] == "you say: <script>alert(1)</script>"


def test_widget(tokenizer):
    chat = talk(tokenizer, "Yes.<|im_end|>")
    shown, line = chat_widget(chat).children
    line.value = "Sure <b>?"
    assert (
        "Yes." in shown.value
        and "&lt;b&gt;" in shown.value
        and line.value == ""
        and len(chat.messages) == 2
    )


def test_the_widget_keeps_its_input_in_view(tokenizer):
    "A box of fixed height scrolls, its end in view, and the line to type in stands below it."
    shown, line = chat_widget(talk(tokenizer, "Yes.<|im_end|>")).children
    for n in range(30):
        line.value = f"Question {n}?"
    style = re.match('<div style="([^"]*)">', shown.value)[1]
    assert re.search(r"(?:^|;)height:\d+px", style) and "overflow-y:auto" in style
    assert "flex-direction:column-reverse" in style  # the newest is what is seen
    assert line.placeholder == "say something, then Enter"


def test_who_thinks_by_default(tokenizer, tmp_path):
    "Chat asks the folder's template; what the caller says wins; the prompt follows."
    for name, (template, thinks) in QWEN35_TEMPLATES.items():
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        model = Scripted(tokenizer, "Hm.\n</think>\n\nYes.<|im_end|>")
        model.folder = tmp_path
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}', encoding="utf-8")
        chat = Chat(model, tokenizer)
        assert chat.family == "qwen3.5", chat.family
        assert chat.enable_thinking is None and chat.prompt.thinks() == thinks, name
        heard = list(chat.say("Hi"))
        opened = tokenizer.decode(model.prompts[-1]).endswith("<think>\n")
        assert opened == thinks == (said(heard, "thinking") == "Hm."), name
        for on in (True, False):
            assert Chat(model, tokenizer, enable_thinking=on).enable_thinking is on


def test_packaged_model_by_default(tokenizer):
    "Whatever its weights: a turn comes to an end, and its text holds no control token."
    chat = Chat(Qwen.from_pretrained(dtype=torch.float32), tokenizer, max_new_tokens=60)
    for on in (True, False):
        chat.enable_thinking = on
        events = list(chat.say("Max is in the kitchen. Where is Max?"))
        assert events and not any(
            name in m.get(key, "")
            for m in chat.messages
            for key in ("content", "reasoning_content")
            for name in ("<|im_start|>", "<|im_end|>")
        )


def test_answers_come_in_the_order_of_the_prompts(tokenizer):
    "However long the prompts are, and in however many batches they are asked."
    model, places = Qwen.from_pretrained(dtype=torch.float32), ("garden", "kitchen", "market")
    prompts, wanted = [], []
    for i in range(54):  # two batches
        place, more = places[i % 3], "Anna has the ball. " * (-i % 5)
        told = [user(f"{more}Max is in the {place}. Where is Max?")]
        prompts.append(encode_chat(tokenizer, told, "qwen3", enable_thinking=False))
        wanted.append(("", f"In the {place}."))
    assert c.answers(model, tokenizer, prompts, 8) == wanted
    assert c.answers(model, tokenizer, []) == []
