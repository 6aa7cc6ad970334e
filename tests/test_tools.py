"""Thinking and tools: what a model writes, whatever it writes."""

import json
import random
from typing import Literal

import pytest
from chats import user
from test_generate import one_sentence

from qwen_nb.chatml import CHAT_FAMILIES, Message, assistant_pieces
from qwen_nb.template import render_chat
from qwen_nb.thoughts import split_thinking
from qwen_nb.tokenizer import Tokenizer
from qwen_nb.tools import ChatParts, Tools, as_message, describe, parse_call, parse_tool_calls


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained()


@pytest.mark.parametrize(
    "text, opened, want",
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("Hm.\n</think>\n\nYes.", False, ("Hm.", "Yes.")),
        ("Hm.\n</think>\n\nYes.", True, ("Hm.", "Yes.")),
        ("<think>\nHm", False, ("Hm", "")),
        ("Hm", True, ("Hm", "")),
        ("Yes.", False, ("", "Yes.")),
        ("", False, ("", "")),
        ("", True, ("", "")),
        ("\n<think>a\n\nb</think>c</think>d", False, ("a\n\nb", "c</think>d")),
        ("I like <think> tags", False, ("", "I like <think> tags")),
    ],
)
def test_split_thinking(text, opened, want):
    assert split_thinking(text, opened) == want


def test_calls_come_back_as_they_went():
    "What a template writes, the parser reads."
    rng = random.Random(3)
    for _ in range(300):
        family = rng.choice(CHAT_FAMILIES)
        value = lambda: (
            "".join(rng.choices(["a", "{", "}", '"', "<b>", "é", " ", "x\ny", "</function"], k=3))
            if family == "qwen3.5"
            else rng.choice([1, "a", None, [1], {"b": "<"}, '\n"</tool'])
        )
        calls = [
            dict(
                name=rng.choice(["add", "f"]),
                arguments={k: value() for k in rng.sample("abc", rng.randint(0, 3))},
            )
            for _ in range(rng.randint(1, 3))
        ]
        text = "".join(
            assistant_pieces(
                Message(
                    "assistant", "I look.", "", tuple((x["name"], x["arguments"]) for x in calls)
                ),
                family,
                False,
                False,
            )
        )
        written = text.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
        assert parse_tool_calls(written, family) == ("I look.", calls)
    assert parse_tool_calls("No call.\n", "qwen3") == ("No call.\n", [])
    assert parse_tool_calls('<tool_call>\n{"name": "f"}', "qwen3") == (
        "",
        [dict(name="f", arguments={})],
    )  # cut off at its end


@pytest.mark.parametrize(
    "family, text",
    [
        ("qwen3", '{"name": "f", "arguments": {'),
        ("qwen3", "[]"),
        ("qwen3", "7"),
        ("qwen3", ""),
        ("qwen3", '{"name": 7}'),
        ("qwen3", '{"name": "f", "arguments": "x"}'),
        ("qwen3", "[" * 100_000),
        ("qwen3.5", '{"name": '),
        ("qwen3.5", '{"name": "f", "arguments": "<function=a>"}'),
        ("qwen3.5", "<function=f>\n<parameter=a>\n1"),
        ("qwen3.5", ""),
    ],
)
def test_a_broken_call_is_a_sentence(family, text):
    call = parse_call(text, family)
    assert call.keys() == {"error", "text"} and call["text"] == text
    assert (
        Tools().run(call).startswith("Error: this tool call could not be read: ")
        and len(call["error"].splitlines()) == 1
        and len(call["error"]) < 200
    )


def shop(
    item: str,
    count: int = 1,
    price: float = 0.5,
    gift: bool = False,
    size: Literal["S", "L"] = "S",
    notes: list[str] = (),
    more: dict = None,
) -> str:
    """Buy something.
    Over two lines.

    Args:
        item: what to buy
        count: how many

    Returns:
        what was bought: a sentence
    """
    if item == "nothing":
        raise KeyError(item)
    return dict(
        item=item, count=count, price=price, gift=gift, size=size, notes=list(notes), more=more
    )


def test_schema_equals_transformers():
    transformers = pytest.importorskip("transformers.utils")

    def documented(
        city: str,
        days: int = 1,
        exact: bool = False,
        share: float = 0.5,
        names: list[str] = None,
        more: dict = None,
    ) -> str:
        """Get the weather.

        Args:
            city: City name
            days: how many
            exact: or not
            share: a part
            names: of whom
            more: the rest
        """

    ours, theirs = (
        describe(documented)["function"],
        transformers.get_json_schema(documented)["function"],
    )
    theirs.pop("return", None)
    assert ours == theirs
    about = describe(shop)["function"]
    assert about["description"] == "Buy something. Over two lines." and about["parameters"][
        "required"
    ] == ["item"]
    assert about["parameters"]["properties"]["size"] == {
        "type": "string",
        "enum": ["S", "L"],
    } and "what was bought" not in str(about)


def test_functions_that_cannot_be_described():
    def silent(a: int):
        pass

    def untyped(a):
        "Doc."

    def odd(a: object):
        "Doc."

    def star(*a: int):
        "Doc."

    for match, f in (
        ("silent has no docstring", silent),
        ("parameter a has no type", untyped),
        ("has the type", odd),
        ("cannot be given by name", star),
    ):
        one_sentence(match, lambda: Tools(f))
    one_sentence("already a tool named shop", lambda: Tools(shop, shop))


def test_registry():
    tools = Tools(shop)

    def run(**arguments):
        return tools.run(dict(name="shop", arguments=arguments))

    want = dict(item="tea", count=2, price=3.5, gift=True, size="L", notes=["a"], more={"b": 1})
    assert (
        json.loads(run(**want))
        == json.loads(
            run(**{k: v if isinstance(v, str) else json.dumps(v) for k, v in want.items()})
        )
        == want
    )  # Qwen3.5: all as text
    assert (
        json.loads(run(item="7", gift="True"))["item"] == "7"
        and json.loads(run(item="7", gift="True"))["gift"] is True
    )
    for match, arguments in (
        ("needs the argument item", {}),
        ("has no argument colour; it has item, count", dict(item="a", colour="red")),
        ('argument count of shop is "x"; expected integer', dict(item="a", count="x")),
        ("count of shop is true", dict(item="a", count=True)),
        ("count of shop is 1.5", dict(item="a", count=1.5)),
        ("item of shop is 7; expected string", dict(item=7)),
        ('size of shop is "M"; expected one of ["S", "L"]', dict(item="a", size="M")),
        ("shop failed: KeyError: 'nothing'", dict(item="nothing")),
    ):
        answer = run(**arguments)
        assert answer.startswith("Error: ") and match in answer and len(answer.splitlines()) == 1, (
            answer
        )
    assert Tools().run(dict(name="f")) == "Error: there is no tool named f; there is none."

    @tools
    def later() -> object:
        "Give something odd."
        return {1, 2}

    assert (
        later() == {1, 2} and tools.run(dict(name="later")) == "{1, 2}" and len(tools.schemas) == 2
    )


def test_parts_are_sorted_by_ids(tokenizer):
    def sort(ids, **kw):
        parts, events = ChatParts(tokenizer, **kw), []
        for i in ids:
            events += parts.add(i)
        return events + parts.turn(None), parts

    text = "<think>\nDie Katze 🐈 denkt.\n\nLange.\n</think>\n\nJa, 🐈.\n"
    events, parts = sort(tokenizer.encode(text, allow_special=True))
    assert parts.text == dict(thinking="Die Katze 🐈 denkt.\n\nLange.", answer="Ja, 🐈.")
    for kind in parts.text:
        assert "".join(p for k, p in events if k == kind) == parts.text[kind]
    assert not any("\ufffd" in p or not p for _, p in events)
    spelled, parts = sort(
        tokenizer.encode("<think>no thought</think>yes")
    )  # the same letters in ordinary tokens
    assert parts.text == dict(thinking="", answer="<think>no thought</think>yes")
    message = as_message(sort(tokenizer.encode("It is </think>, so."))[1], "qwen3")[0]
    assert "It is </think>, so." in render_chat(
        [user("How?"), message, user("Ok")], "qwen3"
    )  # and the template does not cut it there later
    assert sort(tokenizer.encode("Hm</think>Yes", allow_special=True), thinking=True)[
        1
    ].text == dict(thinking="Hm", answer="Yes")
    assert (
        sort([tokenizer.special["<|im_start|>"], *tokenizer.encode("Yes")])[1].text["answer"]
        == "Yes"
    )
