"""Random chat templates, grown from what published ones are made of: text or one line, within the bounds."""

from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from modalloy.errors import ModalloyError
from modalloy.model.bounded import MAX_CHARACTERS, render

MESSAGES = [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a dog"}]
PIECES = [
    "{% for m in messages %}",
    "{% for i in range(300) %}",
    "{%- endfor -%}",
    "{% endfor %}",
    "{% if m.role == 'user' %}",
    "{% elif loop.first %}",
    "{% else %}",
    "{% endif %}",
    "{% set x = 'ab' * 99 %}",
    "{% set x = x + x %}",
    "{% set n = namespace(s=messages) %}",
    "{% set n.s = n.s + n.s %}",
    "{% macro f(a) %}",
    "{% endmacro %}",
    "{{ f(x) }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{% raw %}",
    "{% include 'x' %}",
    "{# note",
    "#}",
    "{{ m.content | trim }}",
    "{{ messages | tojson(indent=x) }}",
    "{{ messages[-1].content.split('i')[0] }}",
    "{{ x.__class__ }}",
    "{{ raise_exception(x) }}",
    "{{ strftime_now('%d') }}",
    "{{ bos_token ~ n }}",
    "{{ 7 ** 7 ** 7 }}",
    "{{ '%99999d' % 1 }}",
    "{{ [[[[",
    "}}",
    "%}",
    "<|im_start|>\n",
    "\ue002\ud800",
]


@examples(150)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=14).map("".join))
def test_a_random_template_gives_text_or_one_line(template: str) -> None:
    try:
        text = render(template, {"messages": MESSAGES, "bos_token": "<s>"}, "here")
    except ModalloyError as error:
        assert str(error).startswith("here: its chat template ") and len(str(error)) < 700
    else:
        assert text.strip() and len(text) <= MAX_CHARACTERS
        text.encode("utf-8")
