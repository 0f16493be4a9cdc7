"""Networks as functions of their parameters."""

import pytest
from transformers import BertConfig, LlamaConfig, ViTConfig

from adamerge_jax.models import family_of

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 16}


def head(kind, architecture, **changes):
    config = kind(**SIZES | HEADS | changes)
    config.architectures = [architecture]
    return family_of(config).build_head(config)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        (BertConfig, "BertForSequenceClassification"),
        (LlamaConfig, "LlamaForCausalLM"),
        (ViTConfig, "ViTForImageClassification"),
    ],
)
def test_heads_of_the_same_shape_are_the_same(kind, architecture):
    first = head(kind, architecture, num_labels=3)
    names = {0: "other", 1: "names", 2: "of classes"}
    assert first.is_same(head(kind, architecture, id2label=names))
    assert not first.is_same(head(kind, architecture, num_labels=3, hidden_size=16))


def test_other_heads_are_not_the_same():
    first = head(BertConfig, "BertForSequenceClassification", num_labels=3)
    assert not first.is_same(head(BertConfig, "BertForSequenceClassification", num_labels=4))
    assert not first.is_same(head(LlamaConfig, "LlamaForCausalLM"))
    assert not first.is_same(lambda parameters, outputs: outputs)
