"""Chat templates are programs of anybody's: they end in time and size, errors are one sentence, the rest is equal."""

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from transformers.utils.chat_template_utils import render_jinja_template

from eval.rendering import Renderer
from llmops.console import UserError
from llmops.formats import template_limits
from llmops.formats.chat_format import ChatFormat
from llmops.formats.families import families
from llmops.formats.template_limits import LimitedTemplate
from llmops.models import tiny
from llmops.models.chat_model import ChatModel
from llmops.models.checkpoints import Checkpoint
from train.source import Source
from train.token_cache import load_or_encode

NAME = "the checkpoint's chat template"
ASKED = [{"role": "user", "content": "怎么续借？"}, {"role": "assistant", "content": "点“续借”。"}]
BIG = "{% set big = 'a' * 900000 %}"
GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"


def grow(start: str, following: str) -> str:
    """A value that doubles in every round."""
    return GROW.replace("START", start).replace("NEXT", following)


TOO_LARGE = {
    "product": "{{ 'a' * 10**9 }}", "product the other way": "{{ 10**9 * 'a' }}", "list": "{{ [0] * 10**9 }}",
    "power": "{{ 7 ** 9999999 }}", "power of powers": "{{ 10 ** (10 ** 9) }}", "integers": grow("7", "ns.x * ns.x"),
    "output": LOOPS.replace("BODY", "x"), "plus": grow("'aa'", "ns.x + ns.x"), "tilde": grow("'aa'", "ns.x ~ ns.x"),
    "lists": grow("[1]", "[ns.x, ns.x]"), "tuples": grow("(1,)", "(ns.x, ns.x)"),
    "dicts": grow("{}", "{'a': ns.x, 'b': ns.x}"), "namespaces": grow("1", "namespace(a=ns.x, b=ns.x)"),
    "list plus": grow("[1]", "ns.x + ns.x"), "dict()": grow("1", "dict(a=ns.x, b=ns.x)"),
    "macro": "{% macro f(t) %}{{ t }}{{ t }}{% endmacro %}" + grow("'aa'", "f(ns.x)"),
    "block": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
             "{% set ns.x = y %}{% endfor %}",
    "kept": BIG + "{% set ns = namespace(l=[]) %}{% for i in range(99) %}{% set ns.l = ns.l + [big ~ i] %}{% endfor %}",
    "slices": BIG + "{% for i in range(99) %}{% set b = big[i:] %}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}", "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent filter": "{{ '%1000000000d'|format(1) }}", "percent many": BIG + "{{ '%(a)s%(a)s' % {'a': big} }}",
    "format": "{{ '{:>1000000000}'.format(1) }}", "format nested": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}", "format many": BIG + "{{ '{0}{0}'.format(big) }}",
    "center": "{{ 'a'.center(1000000000) }}", "center filter": "{{ 'a'|center(1000000000) }}",
    "by item": "{{ 'a'['zfill'](1000000000) }}", "by attr": "{{ 'a'|attr('ljust')(1000000000) }}",
    "expandtabs": "{{ '\t\t'.expandtabs(1000000000) }}", "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "replace": BIG + "{{ big.replace('a', big) }}", "replace filter": BIG + "{{ big|replace('a', big) }}",
    "mapped": BIG + "{{ range(99999)|map('replace', '1', big)|join }}", "join": BIG + "{{ big.join('aaa') }}",
    "join filter": BIG + "{{ [big, big]|join }}", "batch": "{{ 'abc'|batch(1000000000, 'x')|list }}",
    "slice filter": "{{ 'abc'|slice(1000000000)|list }}", "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "json": "{{ messages|tojson(indent=1000000000) }}", "constant": "{{ 'a'|center(900000)|replace('a', 'b') * 9 }}",
}  # fmt: skip
REFUSED = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero (line 1",
    "\n{{ 1 + 'a' }}": "TypeError: unsupported operand type(s) for +: 'int' and 'str' (line 2",
    "{{ 10.0 ** 1000 }}": "OverflowError", "{% for i in range(10**9) %}{% endfor %}": "OverflowError: Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ nobody.name }}": "'nobody' is undefined", "{{ {}['a'].b }}": "has no attribute 'a'",
    "{{ messages[9]['role'] }}": "has no element 9", "{{ 'a'.index('b') }}": "ValueError: substring not found",
    "{{ raise_exception('no system message, please') }}": "no system message, please",
    "{{ ''.__class__.__mro__ }}": "is unsafe", "{% include 'x' %}": "no loader",
    "{{ 'a'.encode('punycode') }}": "it calls str.encode, which no limit is known for",
    "{{ (1).to_bytes(1000000000) }}": "it calls int.to_bytes", "{{ lipsum(n=1000000) }}": "'lipsum' is undefined",
    "{{ strftime_now('%1000000000d') }}": "formats a date with a width", "{{ messages() }}": "it calls list objects",
    "{{ [[1], [2]]|sum(start=[]) }}": "sum adds numbers", "{{ 10 ** 9999 }}": "ValueError: Exceeds the limit",
}  # fmt: skip
NO_TEMPLATE = {
    "{% for %}": "Expected an expression", "{{ messages": "unexpected end of template",
    "{{ 'a'|urlize }}": "No filter named 'urlize'", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
    "{{ " + "9" * 5000 + " }}": "ValueError: Exceeds the limit", "a" * 200_001: "has 200,001 characters",
}  # fmt: skip


def rendered(source: str, messages: list[dict[str, str]] = ASKED, **variables: Any) -> str:
    """What the limited template writes."""
    template = LimitedTemplate(source, NAME)
    template.limits.start(len(messages))
    return template.render(messages, **variables)


@pytest.mark.parametrize("case", TOO_LARGE)
def test_sizes(case: str) -> None:
    """Whatever grows ends at once, before it is large."""
    started = time.monotonic()
    with pytest.raises(UserError, match=f"^{NAME} makes (a text or a list of )?more than .* characters") as error:
        rendered(TOO_LARGE[case])
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("body", ["", "{{ '' }}", "{% set x = a == b %}", "{{ ''|trim }}"])
def test_time(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that make nothing end at the clock."""
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    monkeypatch.setattr(template_limits, "BUILT", 10**9)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"^{NAME} takes longer than 0 seconds for a conversation of 11 characters"):
        rendered(LOOPS.replace("BODY", body))
    assert time.monotonic() - started < 1


def test_the_time_is_that_of_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """All renderings of one conversation share it; the next conversation has its own."""
    monkeypatch.setattr(template_limits, "SECONDS", 0.4)
    tokenizer = tiny.train_tokenizer(["怎么续借？"], 300)
    tokenizer.chat_template = "{% for i in range(60000) %}{% endfor %}"
    tokenizer.chat_template += tiny.TEMPLATE  # some hundredths of a second for each of 201 renderings
    chat = ChatFormat(tokenizer)
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(UserError, match="takes longer than 1 seconds"):
            chat.conversation(ASKED * 50)
        assert 1.4 < time.monotonic() - started < 2.5
        assert len(chat.conversation(ASKED)) == 1


@pytest.mark.parametrize("source", REFUSED)
def test_errors_are_one_sentence(source: str) -> None:
    """Every error of a template names it, its kind and its line."""
    with pytest.raises(UserError, match=f"^{NAME} refuses a conversation: ") as error:
        rendered(source)
    assert REFUSED[source] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", NO_TEMPLATE, ids=range(len(NO_TEMPLATE)))
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(UserError, match=f"^{NAME} ") as error:
        LimitedTemplate(source, NAME)
    assert NO_TEMPLATE[source] in str(error.value)


TOOLS = (
    "{%- macro each(items) -%}{% for i in items %}{{ caller(i) }}{% endfor %}{%- endmacro %}"
    "{%- macro listed(items, sep=', ') -%}{% for i in items %}{{ i }}{{ sep if not loop.last }}{% endfor %}"
    "{%- endmacro %}"
    "{%- set ns = namespace(first=true, text='', index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.first and message.role == 'user' %}{%- set ns.first = false %}{%- set ns.index = index %}{%- endif %}"
    "{%- endfor %}{{ ns.index }} {{ bos_token ~ (1, 2.5, none, true) ~ [messages[0].role] ~ {'a': messages|length} }}\n"
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
    "{%- endif %}{%- set ns.text = ns.text + m.content + '\\n' %}{%- if loop.index > 40 %}{%- break %}{%- endif %}"
    "{%- generation %}{{ m.content | trim }}{%- endgeneration %}{%- endfor %}"
    "{{ ns.text }}{{ listed(messages|map(attribute='role')|list) }}{{ messages|tojson(indent=2) }}{{ messages|tojson }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('|') }}{{ 'a\\nb'|indent(4) }}"
    "{{ '%s-%02d' % ('x', 7) }}{{ '{:>4}|{a}'.format(3, a='b') }}{{ 2 ** 10 - 7 // 2 * 3 % 5 }}{{ 7 / 2 }}{{ -3 + 1 }}"
    "{{ messages[0].content.split('么')[0].rstrip('\\n').lstrip() }}{{ messages[0]['content'][1:3] }}"
    "{%- call(x) each([1, 2]) %}{{ x }}{%- endcall %}{% set block %}{{ 'in' }} a block{% endset %}{{ block|upper }}"
    "{{ dict(a=1).items()|list }}{% for k, v in {'x': 1, 'y': [2, 3]}|items %}{{ k }}={{ v }}{% endfor %}"
    "{{ namespace(a=1).a }}{{ cycler('a', 'b').next() }}{% set c = joiner() %}{{ c() }}{{ c() }}"
    "{{ [3, 1, 2]|sort }}{{ [1, 2]|sum }}{{ missing|default('-') }}"
    "{{ 'ab'.replace('a', 'xx').title() ~ 'c'.center(5) }}{{ (range(5)|list)[1:] + ['x'] }}{{ 'x' in ['x'] }}"
)


FAMILY_TEMPLATES = [family.chat_template for family in families().values() if family.chat_template]


@pytest.mark.parametrize("source", [TOOLS, tiny.TEMPLATE, *FAMILY_TEMPLATES])
def test_renders_as_transformers_does(source: str, conversations: list) -> None:
    """Character for character, with all that templates use."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = LimitedTemplate(source, NAME)
    template.limits.start(100)
    for messages in conversations[:25]:
        for generate in (False, True):
            if source is TOOLS and messages[0]["role"] == "system":
                continue
            (expected,), _ = render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=generate, **special
            )
            found = template.render(messages, tools=None, documents=None, add_generation_prompt=generate, **special)
            assert found == expected


def test_long_conversations_are_within_the_limits() -> None:
    """A conversation of a million characters in a thousand messages, and one message of ten million."""
    many = [ASKED[i % 2] | {"content": "续" * 1000} for i in range(1000)]
    for messages in (many, [ASKED[0] | {"content": "a" * 10**7}]):
        text = rendered(tiny.TEMPLATE, messages, add_generation_prompt=False)
        assert text.count("<|im_end|>") == len(messages)
        gathered = "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}"
        assert rendered(gathered + "{{ ns.t|length }}", messages) == str(sum(len(m["content"]) for m in messages))


def test_data_and_commands_say_where(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """A checkpoint's own chat_template.jinja, from its folder to the line of the data that it fails at."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoints["llama"].iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    text = "{% if messages|length > 2 %}{{ 'a' * 10**9 }}{% endif %}" + tiny.TEMPLATE
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    data = write_jsonl(tmp_path / "train.jsonl", [ASKED, ASKED * 2])
    chat = ChatModel(Checkpoint(folder)).chat
    with pytest.raises(UserError, match=f"train.jsonl:2: {NAME} makes a text or a list of more than 1,000,220 char"):
        load_or_encode(Source((data,), folder, "auto", 256, False), chat, tmp_path / "cache")
    (folder / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(UserError, match=f"^{NAME} is no Jinja template that can be used: Expected an expression"):
        _ = ChatModel(Checkpoint(folder)).chat
    with pytest.raises(UserError, match="or turn chat_template off to ask in plain text"):
        Renderer(ChatModel(Checkpoint(folder)), True)
