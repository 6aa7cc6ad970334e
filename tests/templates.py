"""Chat templates in Jinja for tests, written here from what a release does (`ChatForm`).

They behave as the official ones do: they cut blanks off, look for thoughts and for answers of
tools, ask whether a message is empty, write calls as JSON or XML."""

from dataclasses import asdict

from qwen_nb.chatml import FORMS
from qwen_nb.template import TOOLS_AS_JSON, TOOLS_AS_XML

LOGIC = r"""
{%- macro words(m) %}
    {%- if m.content is string %}{{ m.content }}
    {%- elif m.content is iterable and form.joins_parts %}
        {%- for part in m.content %}{{ part.text }}{% endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro tidy(text) %}{{ text | trim if form.strips else text }}{% endmacro %}
{%- set ns = namespace(asked=messages | length, system=[]) %}
{%- for m in messages if m.role == 'user' %}
    {%- set said = words(m) | trim %}
    {%- if not (said.startswith('<tool_response>') and said.endswith('</tool_response>')) %}
        {%- set ns.asked = messages.index(m) %}
    {%- endif %}
{%- endfor %}
{%- set own = namespace(text=form.system, is_there=form.system != '') %}
{%- if messages[0].role == 'system' %}
    {%- set own.text = tidy(words(messages[0])) %}
    {%- set own.is_there = own.text != '' or not form.drops_empty_system %}
{%- endif %}
{%- set listed = namespace(text='') %}
{%- if tools %}
    {%- set listed.text = before %}
    {%- for tool in tools %}{% set listed.text = listed.text + '\n' + tool | tojson %}{% endfor %}
    {%- set listed.text = listed.text + after %}
{%- endif %}
{%- if form.efforts and not (enable_thinking is defined and enable_thinking is false) %}
    {%- set effort = (form.efforts | list | selectattr(0, 'equalto', reasoning_effort)
                      | first)[1] if reasoning_effort is defined else form.efforts[0][1] %}
    {%- if effort %}{% set ns.system = ns.system + [effort] %}{% endif %}
{%- endif %}
{%- if form.calls == 'xml' %}
    {%- if listed.text %}{% set ns.system = ns.system + [listed.text] %}{% endif %}
    {%- if own.is_there and (own.text or not listed.text) %}
        {%- set ns.system = ns.system + [own.text] %}
    {%- endif %}
{%- else %}
    {%- if own.is_there %}{% set ns.system = ns.system + [own.text] %}{% endif %}
    {%- if listed.text %}{% set ns.system = ns.system + [listed.text] %}{% endif %}
{%- endif %}
{%- if ns.system %}
    {{- '<|im_start|>system\n' + ns.system | join('\n\n') + '<|im_end|>\n' }}
{%- endif %}
{%- set keep_all = form.keeps_old %}
{%- if form.keeps_old is not none and preserve_thinking is defined %}
    {%- set keep_all = preserve_thinking %}
{%- endif %}
{%- for m in messages %}
    {%- set said = namespace(text=tidy(words(m)), thought='') %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + said.text + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- if form.thinks and m.reasoning_content is string %}
            {%- set said.thought = m.reasoning_content %}
        {%- elif form.finds_thoughts and '</think>' in said.text %}
            {%- set said.thought = said.text.split('</think>')[0].rstrip('\n')
                                   .split('<think>')[-1].lstrip('\n') %}
            {%- set said.text = said.text.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if (keep_all or loop.index0 > ns.asked)
               and (form.every_place or form.thinks and (loop.last or said.thought)) %}
            {%- set thought = said.thought.strip() if form.strips else said.thought.strip('\n') %}
            {{- '<think>\n' + thought + '\n</think>\n\n' + said.text.lstrip('\n') }}
        {%- else %}{{- said.text }}{% endif %}
        {%- for call in m.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {%- if not loop.first %}{{- '\n' }}
            {%- elif said.text %}{{- '\n\n' if form.calls == 'xml' else '\n' }}{% endif %}
            {{- '<tool_call>\n' }}
            {%- if form.calls == 'xml' %}
                {{- '<function=' + call.name + '>\n' }}
                {%- for key, value in call.arguments | items %}
                    {%- set as_json = form.json_values and value is not string
                                      or value is mapping
                                      or value is sequence and value is not string %}
                    {{- '<parameter=' + key + '>\n' }}
                    {{- value | tojson if as_json else value | string }}
                    {{- '\n</parameter>\n' }}
                {%- endfor %}
                {{- '</function>' }}
            {%- else %}
                {{- '{"name": "' + call.name + '", "arguments": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}
                {{- '}' }}
            {%- endif %}
            {{- '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + said.text + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- set think = enable_thinking if enable_thinking is defined else form.thinks_unasked %}
    {%- if form.thinks and not think %}{{- '<think>\n\n</think>\n\n' }}
    {%- elif form.opens_thought %}{{- '<think>\n' }}{% endif %}
{%- endif %}"""


def template_of(family):
    "A template that behaves as the family's."
    form = FORMS[family]
    before, after = TOOLS_AS_XML if form.calls == "xml" else TOOLS_AS_JSON
    facts = f"{{%- set form = {asdict(form)!r} %}}"
    return f"{facts}{{%- set before, after = {before!r}, {after!r} %}}{LOGIC}"


# What two releases do that no form of ours does: the thought is always opened, with no switch;
# a Qwen3 by its model_type whose calls are XML.
PLAIN = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
THINKING_2507 = r"""{%- for m in messages %}
{%- set content = m.content %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
CODER = r"""{%- if tools %}
{{- '<|im_start|>system\nYou are Qwen. You may call:\n<tools>' }}
{%- for tool in tools %}
{%- set tool = tool.function if tool.function is defined else tool %}
{{- '\n<function>\n<name>' + tool.name + '</name>\n' }}
{%- for name, about in tool.parameters.properties | items %}
{{- '<parameter>\n<name>' + name + '</name>\n<type>' + about.type | string + '</type>\n' }}
{%- for key in about if key != 'type' %}
{{- '<' + key + '>' + about[key] | string + '</' + key + '>\n' }}
{%- endfor %}
{{- '</parameter>\n' }}
{%- endfor %}
{{- '</function>' }}
{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>\n<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + ('\n' + m.content if m.content else '') }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' + value | string + '\n</parameter>\n' }}
{%- endfor %}
{{- '</function>\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
