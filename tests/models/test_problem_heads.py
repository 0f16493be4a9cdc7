"""Heads on words and of choices, of our own and by PyTorch's forward, against `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    RoFormerConfig,
    ViTConfig,
)

from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.models.bridge.family import bridged_family
from adamerge_jax.models.family import complete_head
from adamerge_jax.models.problem import (
    CHOICES,
    CLASSES,
    MULTIPLE_CHOICE,
    TOKEN_CLASSIFICATION,
    WORDS,
)
from tests.models.bridge.tiny import WIDTH
from tests.references import SPECIAL_TOKENS, randomise

SIZES = WIDTH | {"vocab_size": 40, "num_hidden_layers": 1, "max_position_embeddings": 24}
MODERN = SIZES | dict.fromkeys(SPECIAL_TOKENS, 1) | {"num_hidden_layers": 2, "num_labels": 3}
CONFIGS = {
    "bert": BertConfig(**SIZES, num_labels=3),
    "roberta": RobertaConfig(**SIZES, num_labels=3, pad_token_id=1),
    "distilbert": DistilBertConfig(
        dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=40, num_labels=3
    ),
    "electra": ElectraConfig(**SIZES, num_labels=3, embedding_size=12),
    "mpnet": MPNetConfig(**SIZES, num_labels=3),
    "roformer": RoFormerConfig(**SIZES, num_labels=3),
    "deberta-v2": DebertaV2Config(
        **SIZES, num_labels=3, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "modernbert": ModernBertConfig(**MODERN, classifier_pooling="mean"),
    "modernbert first": ModernBertConfig(**MODERN),
}
MODELS = {WORDS: AutoModelForTokenClassification, CLASSES: AutoModelForSequenceClassification}
TOKENS = np.array([[2, 5, 6, 7, 8, 9], [2, 30, 31, 3, 1, 1]])
MASK = (TOKENS != 1).astype(int)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("bert", WORDS),
        ("bert", CLASSES),
        ("roberta", WORDS),
        ("distilbert", WORDS),
        ("deberta-v2", WORDS),
        ("modernbert", WORDS),
        ("modernbert", CLASSES),
        ("electra", WORDS),
        ("mpnet", WORDS),
        ("roformer", WORDS),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_logits_beside_the_other_head_are_those_of_transformers(name, problem):
    config = CONFIGS[name]
    model = randomise(MODELS[problem].from_config(config))
    is_ours = name != "roformer"
    family = family_of(config) if is_ours else bridged_family(config, type(model).__name__)
    beside = [TOKEN_CLASSIFICATION] if problem == WORDS and not is_ours else [None]
    family = family.with_heads_of([*beside, problem.auto_class, TOKEN_CLASSIFICATION])
    backbone, head = family.build_backbone(config, "nothing"), family.build_head(config, problem)
    assert not any("pooler" in key for key in backbone.shapes)
    stacked = stack(model, backbone)
    compare(model, backbone, head, stacked, MASK.astype(bool) if problem == WORDS else ...)
    last = family.head_form(problem.auto_class).last_layer
    assert {last.weight, last.bias} <= head.shapes.keys()


def stack(model, backbone):
    """The parameters of a backbone from those of a PyTorch model."""
    tensors = {key: jnp.array(value.numpy()) for key, value in model.state_dict().items()}
    return {
        key: tensors[key]
        if key in tensors
        else jnp.stack([tensors[key.replace("*", str(layer))] for layer in range(leaf.shape[0])])
        for key, leaf in backbone.shapes.items()
    }


def compare(model, backbone, head, parameters, is_read, tokens=TOKENS, mask=MASK):
    """The logits of a backbone and a head, and those of `transformers`."""
    inputs = {"input_ids": jnp.array(tokens), "attention_mask": jnp.array(mask)}
    of_head = {key: jnp.array(model.state_dict()[key].numpy()) for key in head.shapes}

    @jax.jit
    def run(parameters, task_parameters, inputs):
        outputs = backbone(parameters, inputs)
        return head(complete_head(head, task_parameters, parameters), outputs)

    ours = run(parameters, of_head, inputs)
    with torch.no_grad():
        given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        theirs = model(**given).logits.numpy()
    assert ours.shape == theirs.shape
    # Two implementations in float32.
    np.testing.assert_allclose(np.asarray(ours)[is_read], theirs[is_read], atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "roberta",
        "distilbert",
        "deberta-v2",
        "electra",
        "modernbert",
        "modernbert first",
        "mpnet",
        "roformer",
    ],
)
def test_choices_are_compared_as_transformers_does(name):
    config = CONFIGS[name]
    model = randomise(AutoModelForMultipleChoice.from_config(config))
    is_ours = name != "roformer"
    family = family_of(config) if is_ours else bridged_family(config, type(model).__name__)
    family = family.with_heads_of([MULTIPLE_CHOICE])
    backbone, head = family.build_backbone(config, "nothing"), family.build_head(config, CHOICES)
    tokens = np.stack([TOKENS, TOKENS[::-1], TOKENS + 2], axis=1)
    mask = np.stack([MASK, MASK[::-1], np.ones_like(MASK)], axis=1)
    compare(model, backbone, head, stack(model, backbone), ..., tokens, mask)
    last = family.head_form(MULTIPLE_CHOICE).last_layer
    assert {last.weight, last.bias} <= head.shapes.keys()
    with pytest.raises(InputError, match="in a recipe of their own"):
        family.with_heads_of([None, MULTIPLE_CHOICE])


@pytest.mark.parametrize(
    ("field", "value"),
    [("summary_type", "mean"), ("summary_use_proj", False), ("summary_proj_to_labels", True)],
)
def test_choices_of_an_electra_are_compared_by_first_tokens(field, value):
    config = ElectraConfig(**SIZES, **{field: value})
    family = family_of(config).with_heads_of([MULTIPLE_CHOICE])
    with pytest.raises(InputError, match=f"config.json: {field} is {value!r}; .* where it is"):
        family.build_head(config, CHOICES)
    family_of(config).build_head(config)


def test_models_with_other_backbones_and_without_such_heads():
    config = AlbertConfig(**SIZES, embedding_size=16)
    family = bridged_family(config, "AlbertForSequenceClassification")
    with pytest.raises(InputError, match="AlbertForTokenClassification has another backbone"):
        family.with_heads_of([None, TOKEN_CLASSIFICATION])
    with pytest.raises(InputError, match="AutoModelForTokenClassification are learned where"):
        family_of(ViTConfig()).with_heads_of([TOKEN_CLASSIFICATION])
