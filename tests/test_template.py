"""The chat templates against the official ones, letter for letter."""

import pytest
from chats import ADD, NEWER, RENDERED, assistant, newer, official, settings, user
from test_generate import one_sentence

from qwen_nb.chatml import CHAT_FAMILIES, FORMS, Control, Said
from qwen_nb.template import chat_pieces, render_chat
from qwen_nb.tools import Tools


@official
def test_equals_the_official_templates():
    assert len(RENDERED) == 120 and {case["family"] for case in RENDERED} == set(CHAT_FAMILIES)
    for case in RENDERED:
        assert (
            render_chat(case["messages"], case["family"], **settings(case)) == case["rendered"]
        ), (case["family"], case["name"])


def test_forms_of_a_message():
    "A call flat or wrapped, arguments as text, content as parts or None: one prompt."
    flat, wrapped = (
        dict(name="add", arguments={"a": 1}),
        dict(type="function", id="7", function=dict(name="add", arguments={"a": 1})),
    )
    for family in CHAT_FAMILIES:
        one, two, three = (
            [user("Hi"), dict(role="assistant", content=content, tool_calls=[call])]
            for content, call in (("", flat), (None, wrapped), ([], wrapped))
        )
        assert render_chat(one, family) == render_chat(two, family) == render_chat(three, family)
        assert render_chat(
            [user([dict(type="text", text="a"), dict(type="text", text="b")])], family
        ) == render_chat([user("ab")], family)
        assert (
            render_chat([user("Hi")], family, Tools())
            == render_chat([user("Hi")], family, [])
            == render_chat([user("Hi")], family)
        )
        far = render_chat(
            [
                user("Hi"),
                assistant(
                    tool_calls=[dict(name="add", arguments={"a": ["Zürich <1>"], "b": True})]
                ),
            ],
            family,
            [dict(ADD, description="für <2>")],
        )
        assert '["Zürich <1>"]' in far and '"für <2>"' in far  # neither \\u00fc nor \\u003c
        assert (
            "\nTrue\n" if family == "qwen3.5" else '"b": true}'
        ) in far  # as the official XML has it
    as_text = [user("Hi"), assistant(tool_calls=[dict(name="add", arguments='{"a": 1}')])]
    assert render_chat(as_text, "qwen3") == render_chat(
        [user("Hi"), assistant(tool_calls=[flat])], "qwen3"
    )


def test_thinking_is_kept_while_the_model_works():
    loop = [
        user("q"),
        assistant(
            "", reasoning_content="First.", tool_calls=[dict(name="add", arguments={"a": 1})]
        ),
        dict(role="tool", content="3"),
        assistant("done", reasoning_content="Second."),
    ]
    for family in ("qwen3", "qwen3.5"):
        now, later = render_chat(loop, family), render_chat([*loop, user("next")], family)
        assert all(
            f"<think>\n{t}\n</think>\n\n" in now and t not in later for t in ("First.", "Second.")
        )
        inside = [
            m
            if "reasoning_content" not in m
            else dict(
                m,
                content=f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}",
                reasoning_content=None,
            )
            for m in loop
        ]
        assert render_chat(inside, family) == now  # the thought in the content instead
    assert "First." not in render_chat(loop, "qwen2.5")


def test_answers_of_tools_share_a_turn():
    answer = "\n<tool_response>\n{}\n</tool_response>"
    for family in CHAT_FAMILIES:
        got = render_chat(
            [
                user("q"),
                assistant("a"),
                *(dict(role="tool", content=n) for n in "12"),
                assistant("b"),
                dict(role="tool", content="3"),
            ],
            family,
        )
        assert (
            f"<|im_start|>user{answer.format(1)}{answer.format(2)}<|im_end|>\n<|im_start|>assistant\n"
            in got
            and f"<|im_start|>user{answer.format(3)}<|im_end|>\n" in got
        )


@pytest.mark.parametrize(
    "match, messages, family, kw",
    [
        ("family is 'qwen4'; expected one of qwen2.5, qwen3, qwen3.5", [user("Hi")], "qwen4", {}),
        ("expected a list of dicts, at least one", [], "qwen3", {}),
        ("expected a list of dicts", "Hi", "qwen3", {}),
        ("message 1 is 'Hi'; expected a dict", [user("Hi"), "Hi"], "qwen3", {}),
        (
            "message 0: role is 'bot'; expected one of system, user, assistant, tool",
            [dict(role="bot", content="Hi")],
            "qwen3",
            {},
        ),
        ("message 0: role is None", [dict(content="Hi")], "qwen3", {}),
        (r"message 0 \(user\): content is None; expected a string", [user(None)], "qwen3", {}),
        (r"message 0 \(user\): content is 7", [user(7)], "qwen2.5", {}),
        ("reads text only", [user([dict(type="image", image="a.png")])], "qwen3.5", {}),
        ("message 0 is a tool's answer", [dict(role="tool", content="3")], "qwen3", {}),
        (
            "message 1 is a system message; qwen3.5 allows one",
            [user("Hi"), dict(role="system", content="s")],
            "qwen3.5",
            {},
        ),
        ("no user message; qwen3.5", [assistant("Hi")], "qwen3.5", {}),
        (
            "only an assistant calls tools",
            [user("Hi") | dict(tool_calls=[dict(name="add")])],
            "qwen3",
            {},
        ),
        ("tool_calls is 'add'; expected a list", [assistant("Hi", tool_calls="add")], "qwen3", {}),
        (
            "found the tool call {'arguments'",
            [assistant("Hi", tool_calls=[dict(arguments={})])],
            "qwen3",
            {},
        ),
        (
            "the arguments of add are '{}'; qwen2.5 expects a dict",
            [assistant("Hi", tool_calls=[dict(name="add", arguments="{}")])],
            "qwen2.5",
            {},
        ),
        (
            "the arguments of add are 7",
            [assistant("Hi", tool_calls=[dict(name="add", arguments=7)])],
            "qwen3",
            {},
        ),
        (
            "reasoning_content is 7; expected a string",
            [assistant("Hi", reasoning_content=7)],
            "qwen3",
            {},
        ),
        ("tools is 'add'; expected a list of dicts", [user("Hi")], "qwen3", dict(tools="add")),
        ("cannot be written as JSON", [user("Hi")], "qwen3", dict(tools=[dict(f=print)])),
    ],
)
def test_refused_with_a_sentence(match, messages, family, kw):
    one_sentence(match, lambda: render_chat(messages, family, **kw))


def test_pieces():
    pieces = list(chat_pieces([user("<|im_end|>")], "qwen3"))
    assert [type(p) for p in pieces if p == "<|im_end|>"] == [Said, Control] and {
        p.role for p in pieces if isinstance(p, Said)
    } == {"user"}


# ---- what the notebook's table says about releases between the generations


def official_texts(family, name, generation=True):
    "Official renderings of one conversation: {settings as a frozenset: text}."
    found = {}
    for case in NEWER:
        here = case["family"] == family and case["name"] == name
        if here and case["add_generation_prompt"] == generation:
            found[frozenset(case["settings"].items())] = case["rendered"]
    assert found, (family, name)
    return found


OPEN, CLOSED = "<think>\n", "<think>\n\n</think>\n\n"


@newer
@pytest.mark.parametrize(
    "family, unsaid, on, off",
    [
        ("qwen3-instruct-2507", "", "", ""),  # no switch
        ("qwen3-vl", "", "", ""),
        ("qwen3.5", OPEN, OPEN, CLOSED),
        ("qwen3.5-nothink", CLOSED, OPEN, CLOSED),
        ("qwen3.6", OPEN, OPEN, CLOSED),
        ("qwen3.8", OPEN, OPEN, CLOSED),
    ],
)
def test_who_thinks_when_nobody_says(family, unsaid, on, off):
    texts = official_texts(family, "plain")
    for said, end in (({}, unsaid), (dict(enable_thinking=True), on)):
        assert texts[frozenset(said.items())].endswith(f"<|im_start|>assistant\n{end}"), said
    text = texts[frozenset({("enable_thinking", False)})]
    assert text.endswith(f"<|im_start|>assistant\n{off}")


@newer
def test_what_becomes_of_thoughts():
    "Dropped by all but Qwen3.8, unless `preserve_thinking` says otherwise."
    keeps = {"qwen3.8"}
    for family in sorted({case["family"] for case in NEWER}):
        texts, thought = official_texts(family, "thought_history"), "four, clearly"
        assert (thought in texts[frozenset()]) == (family in keeps), family
        if family in ("qwen3.6", "qwen3.8"):
            for on in (True, False):
                assert (thought in texts[frozenset({("preserve_thinking", on)})]) == on, family
    for family in CHAT_FAMILIES:
        case = next(case for case in NEWER if case["name"] == "thought_history")
        assert "four, clearly" not in render_chat(case["messages"], family)


@newer
def test_equals_the_official_templates_of_later_releases():
    for case in NEWER:
        said = dict(tools=case["tools"], add_generation_prompt=case["add_generation_prompt"])
        ours = render_chat(case["messages"], case["family"], **said, **case["settings"])
        assert ours == case["rendered"], (case["family"], case["name"], case["settings"])
    assert len(NEWER) == 403


def test_settings():
    "What a release does not know changes nothing; an effort that does not exist is refused."
    talk = [user("q"), assistant("a", reasoning_content="Hm."), user("r")]
    for family in FORMS:
        form, plain = FORMS[family], render_chat(talk, family)
        assert ("Hm." in plain) == bool(form.keeps_old), family
        kept = render_chat(talk, family, preserve_thinking=True)
        assert ("Hm." in kept) == (form.keeps_old is not None), family
        low = render_chat(talk, family, reasoning_effort="low")
        assert (low != plain) == ("set to low" in low) == bool(form.efforts), family
    assert render_chat(talk, "qwen3.8", reasoning_effort="xhigh") == render_chat(talk, "qwen3.8")
    one_sentence(
        "reasoning_effort is 'huge'; expected one of xhigh, medium, low",
        lambda: render_chat(talk, "qwen3.8", reasoning_effort="huge"),
    )
    one_sentence(
        "Qwen2's prompt has no place for tools", lambda: render_chat(talk, "qwen2", tools=[ADD])
    )


def test_nobody_asked():
    "Without a user's question Qwen3's thoughts all go. Content is what follows the last </think>."
    thought = assistant("Yes.", reasoning_content="Hm.")
    tool_result = user("<tool_response>\n3\n</tool_response>")
    for messages in ([thought], [thought, thought], [thought, tool_result], [tool_result, thought]):
        assert "Hm." not in render_chat(messages, "qwen3"), messages
    assert "Hm." in render_chat([user("q"), thought, tool_result, thought], "qwen3")
    several = assistant("<think>\na\n</think>\nb</think>\n\nc")
    for family in ("qwen3", "qwen3.5"):
        text = render_chat([user("q"), several], family, add_generation_prompt=False)
        assert text.endswith("assistant\n<think>\na\n</think>\n\nc<|im_end|>\n"), text
