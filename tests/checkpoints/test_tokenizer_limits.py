"""What a stranger's tokenizer may make of a text."""

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Replace as ReplaceTokens
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import NFKC, ByteLevel, Prepend, Replace, Sequence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from adamerge_jax.checkpoints.tokenizer_limits import require_bounded
from adamerge_jax.errors import InputError


def of(model=None, **parts):
    tokenizer = Tokenizer(WordLevel({"w": 0}, unk_token="w") if model is None else model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "rules",
    [
        [Replace("w", "w" * 1000)] * 2,
        [Replace(Regex("w*"), "v" * 200)] * 2,
        [Prepend("v" * 200)] * 2,
        [ByteLevel()] * 7,
        # Rules of as many letters as they find, behind which others find more.
        [Replace("w", "v" * 200), Replace("v", "u"), Replace("u", "t" * 200)],
        [Replace("w", "v" * 20_000)],
    ],
)
def test_steps_that_make_a_text_far_longer_are_refused(rules):
    with pytest.raises(InputError, match="more than 10,000 times as long"):
        require_bounded(of(normalizer=Sequence(rules)), "base")


def test_rules_of_texts_that_no_other_wrote_are_no_product():
    rules = [Replace(chr(0x2000 + number), "...") for number in range(100)]
    parts = dict(normalizer=Sequence([NFKC(), Prepend("_"), Replace(" ", "_"), *rules]))
    require_bounded(of(**parts, decoder=ReplaceTokens("_", " ")), "base")


def test_a_template_has_each_text_once():
    special_tokens = [("w", 0)]
    once = TemplateProcessing(single="w $A", pair="w $A w $B", special_tokens=special_tokens)
    require_bounded(of(post_processor=once), "base")
    twice = TemplateProcessing(single="w $A $A", special_tokens=special_tokens)
    with pytest.raises(InputError, match="2 texts; expected A, each once"):
        require_bounded(of(post_processor=twice), "base")


def test_tokens_that_are_drawn_are_refused():
    require_bounded(of(BPE({"w": 0}, [], dropout=0.0)), "base")
    with pytest.raises(InputError, match=r"dropout 0\.5"):
        require_bounded(of(BPE({"w": 0}, [], dropout=0.5)), "base")
