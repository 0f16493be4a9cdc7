"""Heads on words, by families of our own and by PyTorch's forward, against `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    RobertaConfig,
    ViTConfig,
)

from adamerge_jax.errors import InputError
from adamerge_jax.models import family_of
from adamerge_jax.models.bridge.family import bridged_family
from adamerge_jax.models.family import complete_head
from adamerge_jax.models.problem import CLASSES, TOKEN_CLASSIFICATION, WORDS
from tests.models.bridge.tiny import WIDTH
from tests.references import randomise

SIZES = WIDTH | {"vocab_size": 40, "num_hidden_layers": 1, "max_position_embeddings": 24}
CONFIGS = {
    "bert": BertConfig(**SIZES, num_labels=3),
    "roberta": RobertaConfig(**SIZES, num_labels=3, pad_token_id=1),
    "distilbert": DistilBertConfig(
        dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=40, num_labels=3
    ),
}
MODELS = {WORDS: AutoModelForTokenClassification, CLASSES: AutoModelForSequenceClassification}
TOKENS = np.array([[2, 5, 6, 7, 8, 9], [2, 30, 31, 3, 1, 1]])
MASK = (TOKENS != 1).astype(int)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("problem", MODELS, ids=lambda problem: problem.name)
def test_logits_beside_the_other_head_are_those_of_transformers(name, problem):
    config = CONFIGS[name]
    model = randomise(MODELS[problem].from_config(config))
    is_ours = name != "distilbert"
    family = family_of(config) if is_ours else bridged_family(config, type(model).__name__)
    beside = [TOKEN_CLASSIFICATION] if problem == WORDS and not is_ours else [None]
    family = family.with_heads_of([*beside, problem.auto_class, TOKEN_CLASSIFICATION])
    backbone, head = family.build_backbone(config, "nothing"), family.build_head(config, problem)
    assert not any("pooler" in key for key in backbone.shapes)
    tensors = {key: jnp.array(value.numpy()) for key, value in model.state_dict().items()}
    stacked = {
        key: tensors[key]
        if key in tensors
        else jnp.stack([tensors[key.replace("*", str(layer))] for layer in range(leaf.shape[0])])
        for key, leaf in backbone.shapes.items()
    }
    inputs = {"input_ids": jnp.array(TOKENS), "attention_mask": jnp.array(MASK)}

    @jax.jit
    def run(parameters, task_parameters, inputs):
        outputs = backbone(parameters, inputs)
        return head(complete_head(head, task_parameters, parameters), outputs)

    ours = run(stacked, {key: tensors[key] for key in head.shapes}, inputs)
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS), torch.tensor(MASK)).logits.numpy()
    assert ours.shape == theirs.shape
    is_read = MASK.astype(bool) if problem == WORDS else ...
    # Two implementations in float32.
    np.testing.assert_allclose(np.asarray(ours)[is_read], theirs[is_read], atol=1e-4)
    last = family.head_form(problem.auto_class).last_layer
    assert {last.weight, last.bias} <= head.shapes.keys()


def test_models_with_other_backbones_and_without_such_heads():
    config = AlbertConfig(**SIZES, embedding_size=16)
    family = bridged_family(config, "AlbertForSequenceClassification")
    with pytest.raises(InputError, match="AlbertForTokenClassification has another backbone"):
        family.with_heads_of([None, TOKEN_CLASSIFICATION])
    with pytest.raises(InputError, match="AutoModelForTokenClassification are learned where"):
        family_of(ViTConfig()).with_heads_of([TOKEN_CLASSIFICATION])
