"""What the tests of prompts and conversations share.

The official renderings are not part of this project. They are looked for in ../shared/qwen beside
the repository, or in the folder that QWEN_NB_DATA names. Without them those tests are skipped."""

import json
import os
from pathlib import Path

import pytest

from qwen_nb.chatml import CONTROLS

ROOT = Path(__file__).resolve().parent.parent


DATA = Path(os.environ.get("QWEN_NB_DATA") or ROOT.parent / "shared" / "qwen")




def rendered(name):
    "Official renderings, [] where they are absent."
    path = DATA / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


RENDERED = rendered("chat_rendered.json")
NEWER = rendered("chat_rendered_newer.json")  # releases between the generations


official = pytest.mark.skipif(
    not RENDERED,
    reason="chat_rendered.json, what the official templates render, is not in "
    f"{DATA} (QWEN_NB_DATA may name another folder)",
)
newer = pytest.mark.skipif(not NEWER, reason=f"chat_rendered_newer.json is not in {DATA}")


# The last lines of Qwen3.5's template, from 4B up and to 2B: does it think by default?
QWEN35_BEGIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
EMPTY, OPENED = "{{ '<think>\\n\\n</think>\\n\\n' }}", "{{ '<think>\\n' }}"
QWEN35_TEMPLATES = {
    "4B and larger": (
        QWEN35_BEGIN + "{% if enable_thinking is defined and enable_thinking is false %}"
        f"{EMPTY}{{% else %}}{OPENED}{{% endif %}}",
        True,
    ),
    "2B and smaller": (
        QWEN35_BEGIN + "{% if enable_thinking is defined and enable_thinking is true %}"
        f"{OPENED}{{% else %}}{EMPTY}{{% endif %}}",
        False,
    ),
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}},
            "required": ["a"],
        },
    },
}


def settings(case):
    return {k: case[k] for k in ("tools", "add_generation_prompt", "enable_thinking")}


def user(text):
    return dict(role="user", content=text)


def assistant(text="", **kw):
    return dict(role="assistant", content=text, **kw)


PARTS = [
    "Hi",
    "",
    "\n",
    " ",
    "\t",
    "a\n\nb",
    "\r\n",
    "<think>",
    "</think>",
    "\n</think>\n\nx",
    "<think>\n",
    *CONTROLS,
    "<tool_response>x</tool_response>",
    "é 🌍",
    "e\u0301",
    "<b>&'\"",
    "{{x}} {% y %}",
    "0",
    "\u2028",
]


def random_chat(rng, parts=PARTS):
    def text():
        return "".join(rng.choices(parts, k=rng.randint(1, 4)))

    messages = [dict(role="system", content=text())] * rng.randint(0, 1) + [
        dict(role=rng.choice(("user", "assistant")), content=text())
        for _ in range(rng.randint(1, 6))
    ]
    for m in messages:
        if m["role"] == "assistant" and rng.random() < 0.4:
            m["reasoning_content"] = text()
    return messages
