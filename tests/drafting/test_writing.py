"""Values that strangers chose, as YAML in one line."""

import pytest
import yaml

from adamerge_jax.drafting.writing import _flow

TEXTS = [
    *("a\nbase: other", "x # y", "- z", "yes", "1e3", "a: b", "'", '"', "{}", "*a", "&b", "%", "@"),
    *(
        "!!python/object:os.system",
        "\u2028k",
        "\x85q",
        "q\x85r",
        "\x1b[0m",
        "\u202ea",
        "k" * 2000,
        "",
    ),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_it_was_given(text: str):
    value = {"path": text, "text": [text, "é"]}
    line = f"expert: {_flow(text)}"
    assert len(line.splitlines()) == 1 and line.isprintable()
    assert yaml.safe_load(f"{line}\ntest: {_flow(value)}  # why") == {"expert": text, "test": value}
