"""Strangers' chat templates: rendered as transformers does, within bounds, and refused in one line."""

import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from modalloy.errors import CheckpointError
from modalloy.model import bounded
from modalloy.model.bounded import render

MESSAGES = [
    {"role": "system", "content": "  be brief "},
    {"role": "user", "content": "what is <b>this</b> & 'that'?"},
    {"role": "assistant", "content": "a dog", "tool_calls": [{"name": "f", "arguments": {"é": [1, 2.5, None, True]}}]},
    {"role": "user", "content": 'and "now"\n'},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "ünïcode", "parameters": {"type": "object"}}}
# what published templates do: trimming, loop controls, namespaces, macros, JSON, tests, slices, dates, generation blocks
TEMPLATES = {
    "trimmed blocks": (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\nU: {{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n"
    ),
    "dashes": (
        "{%- for m in messages -%} {{- m.role + ': ' + m.content|trim -}} {%- if not loop.last %}|"
        "{% endif -%} {%- endfor -%}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ loop.index }}"
        "{% if loop.index0 > 1 %}{% break %}{% endif %}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}"
        "{{ m.content }}{% endgeneration %}{{ x is defined }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    ),
    "json": (
        "{{ messages|tojson }}{{ tools|tojson(indent=4) }}"
        "{{ messages[2].tool_calls[0].arguments|tojson(sort_keys=true, separators=(',', ':')) }}"
        "{{ 'é<>'|tojson(ensure_ascii=true) }}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}"
        "{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.n }} {{ dict(a=1)|items|list }} "
        "{{ ns.missing is defined }}"
    ),
    "macro": (
        "{% macro turn(m, tag='x') %}<{{ tag }}>{{ caller() if caller else m.content }}</{{ tag }}>"
        "{% endmacro %}{% for m in messages %}{{ turn(m, tag=m.role) }}{% endfor %}"
        "{% call turn(messages[0]) %}c{% endcall %}"
    ),
    "tests": (
        "{{ tools is none }} {{ tools is iterable }} {{ messages[0] is mapping }} "
        "{{ documents is defined }} {{ bos_token }}{{ nothing }}{{ messages[1:]|length }}"
        "{{ messages[0].content is string }}"
    ),
    "strings": (
        "{{ messages[1].content.split('&')[-1].strip().upper() }}{{ 'a' ~ 1 ~ none }}"
        "{{ 'x'.join(['a', 'b']) }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}"
        "{{ messages|rejectattr('role', 'eq', 'user')|list|count }}"
    ),
    "filters": (
        "{{ messages[0].content|trim|capitalize|replace('b', 'B') }}{{ [3, 1]|sort|join(',') }}"
        "{{ '<a>'|e }}{{ 'ab'|first }}{{ messages|groupby('role')|map('first')|list }}{{ 1.0|int }}"
        "{{ 'a'|default('b') }}"
    ),
    "date": "{{ strftime_now('%Y-%m') }}{% if strftime_now is defined %}!{% endif %}",
    "do nothing": (
        "{# comment #}{% raw %}{{ raw }}{% endraw %}{% filter upper %}abc{% endfilter %}{% set block %}q"
        "{% endset %}{{ block }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(name: str) -> None:
    given = {"tools": [TOOL], "documents": None, "add_generation_prompt": True, "bos_token": "<s>"}
    wanted, _ = render_jinja_template(conversations=[MESSAGES], chat_template=TEMPLATES[name], **given)
    assert render(TEMPLATES[name], {"messages": MESSAGES, **given}, "here") == wanted[0]


BOMBS = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
    "power": ("{{ (10 ** (10 ** 8))|string|length }}", "more than"),
    "memory": ("{{ 'a' * 10000000000 }}", "GB of memory"),
    "output": ("{% for i in range(9) %}{{ 'a' * 30 }}{% endfor %}", "more than 200 characters"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "nesting": ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "its chat template"),
    "padding": ("{{ '%*d' % (999999999999, 1) }}", "its chat template"),
}
REFUSALS = {
    "raises": (
        "{{ raise_exception('only users\\nmay speak') }}",
        r"refuses this conversation \(only users may speak\)",
    ),
    "syntax": ("a\n{% endif %}", r"TemplateSyntaxError.*\(line 2\)"),
    "undefined": ("{{ messages[9].content }}", "UndefinedError"),
    "types": ("{{ 1 + 'a' }}", "TypeError"),
    "sandbox": ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    "format": ("{{ '{0.__class__}'.format(1) }}", "renders nothing"),
    "changes": ("{{ messages.append(1) }}", "SecurityError"),
    "files": ("{% import '/etc/passwd' as x %}", "TypeError"),
    "nothing": ("{% if false %}a{% endif %} \n", "renders nothing"),
    "half": ("{{ '\\ud83d' }}", "half a surrogate pair"),
    "range": ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_templates_without_end_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    monkeypatch.setattr(bounded, "MAX_CHARACTERS", 200)
    child = bounded.Child()
    monkeypatch.setattr(bounded, "_child", child)
    template, wanted = BOMBS[name]
    with pytest.raises(CheckpointError, match=wanted):
        render(template, {"messages": MESSAGES}, "here")
    assert render("{{ messages[0].role }}", {"messages": MESSAGES}, "here") == "system"  # and the next one goes on
    child.close()


@pytest.mark.parametrize("name", REFUSALS)
def test_templates_that_fail_are_one_line(name: str) -> None:
    template, wanted = REFUSALS[name]
    with pytest.raises(CheckpointError, match=f"here: its chat template .*{wanted}") as found:
        render(template, {"messages": MESSAGES}, "here")
    assert "\n" not in str(found.value) and len(str(found.value)) < 700


def test_a_stranger_s_long_message_is_cut() -> None:
    with pytest.raises(CheckpointError) as found:
        render("{{ raise_exception('a' * 100000) }}", {}, "here")
    assert len(str(found.value)) < 700


def test_the_child_gets_nothing_but_plain_values() -> None:
    from modalloy.model.rendering import rendered_by

    class Tokenizer:
        special_tokens_map = {"bos_token": "<s>"}  # noqa: RUF012

    found = rendered_by(
        "{{ bos_token }}{{ messages[0].image }}{{ messages[0].gone is defined }}",
        [{"image": time, "gone": None}],
        Tokenizer(),
        "x",
    )
    assert found == "<s><module>False"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.content }}]{% endfor %}",
        "{% for m in messages %}[{{ m.content|trim }}]{% endfor %}",
    ],
)
def test_a_message_that_is_continued_is_cut_as_transformers_does(template: str) -> None:
    from tokenizers import Tokenizer, models

    from modalloy.model.rendering import rendered_by

    fast: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "it is "}]
    wanted = fast.apply_chat_template(messages, chat_template=template, tokenize=False, continue_final_message=True)
    assert rendered_by(template, messages, fast, "x", continue_final_message=True) == wanted
