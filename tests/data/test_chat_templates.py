"""Chat templates are strangers' programs: they write what `transformers` writes, or are stopped."""

import time

import pytest

from adamerge_jax.data import chat_templates
from adamerge_jax.data.chat_templates import Chat, write_chats
from tests.language_references import CHAT_TEMPLATE, byte_tokenizer

MESSAGES = [
    {"role": "system", "content": "be kind", "note": None},
    {"role": "user", "content": "who ? \N{COW FACE} \ud800"},
    {"role": "assistant", "content": "the cow", "parts": [{"n": 1.5}, True]},
]

TEMPLATES = {
    "usual": CHAT_TEMPLATE,
    "special tokens, tests and JSON": (
        "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}[{{ m | tojson }}]"
        "{% if 'note' in m %}!{% endif %}{% if loop.last %}{{ eos_token }}{% break %}{% endif %}"
        "{% endfor %}"
    ),
    "macros, namespaces and white space": (
        "{%- set ns = namespace(n=0) -%}\n{% macro say(m) %}\n  {{ m.content | trim | upper }}\n"
        "{% endmacro %}\n{% for m in messages %}\n{% set ns.n = ns.n + 1 %}\n"
        "  {{ ns.n }}{{ say(m) }}\n{% endfor %}"
    ),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_as_transformers_writes(kind):
    tokenizer = byte_tokenizer(chat_template=TEMPLATES[kind])
    chats = [Chat(MESSAGES), Chat(MESSAGES[:2], asked=True), Chat(MESSAGES[1:])]
    expected = [
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asked)
        for messages, asked in chats
    ]
    assert write_chats(tokenizer, chats) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('not\n so') }}", "not so"),
        ("{{ messages[9]['role']['x'] }}", "has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "Expected an expression"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ 'a' * 10**11 }}", "too much memory"),
        (
            "{% set ns = namespace(x=['a' * 10**5]) %}{% for i in range(99) %}"
            "{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "too much memory",
        ),
        ("{{ 'ab' * 40_000 }}", "more than 65536 characters"),
    ],
)
def test_refused(template, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        write_chats(byte_tokenizer(chat_template=template), [Chat(MESSAGES)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}" * 3 + "{% set x = 1 %}" + "{% endfor %}" * 3,
        "{{ 10 ** (10 ** 10) }}",  # inside of a function of C, which no signal interrupts
    ],
)
def test_endless_ones_are_stopped(template, monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    tokenizer = byte_tokenizer()
    before = write_chats(tokenizer, [Chat(MESSAGES)])
    started = time.monotonic()
    with pytest.raises(ValueError, match="it takes longer than 1 s"):
        write_chats(byte_tokenizer(chat_template=template), [Chat(MESSAGES)])
    assert time.monotonic() - started < 10
    # The next one is written by a new process.
    assert write_chats(tokenizer, [Chat(MESSAGES)]) == before


def test_a_process_that_ended_is_started_again():
    tokenizer = byte_tokenizer()
    before = write_chats(tokenizer, [Chat(MESSAGES)])
    process = chat_templates._PROCESS._process
    process.kill()
    assert write_chats(tokenizer, [Chat(MESSAGES)]) == before
    assert chat_templates._PROCESS._process is not process
