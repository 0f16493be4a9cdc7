"""Assertions in the code of models, while JAX compiles it."""

import jax
import jax.numpy as jnp
import pytest
from transformers import XLMConfig, XLMModel
from transformers.models.xlm import modeling_xlm

from adamerge_jax.models.bridge.assertions import without_assertions_of_values
from adamerge_jax.models.bridge.torch_in_jax import torch_in_jax


def test_assertions_of_values_pass_and_others_hold():
    model = XLMModel(XLMConfig(vocab_size=9, emb_dim=4, n_layers=1, n_heads=1))
    code = modeling_xlm.get_masks.__code__
    environment = torch_in_jax()

    def masks(lengths):
        with environment:
            made = modeling_xlm.get_masks(4, environment.j2t_iso(lengths), False)
            return environment.t2j_iso(made[0])

    def forward(tokens, positions):
        with environment:
            result = model.forward(environment.j2t_iso(tokens), position_ids=positions)
            return environment.t2j_iso(result[0])

    with without_assertions_of_values(model):
        assert jax.jit(masks)(jnp.array([2, 4])).tolist() == [[True] * 2 + [False] * 2, [True] * 4]
        with pytest.raises(AssertionError):  # of shapes
            jax.eval_shape(
                lambda tokens: forward(tokens, environment.j2t_iso(jnp.ones((1, 3), int))),
                jnp.ones((1, 5), int),
            )
    assert modeling_xlm.get_masks.__code__ is code
