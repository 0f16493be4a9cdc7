"""Continuations by a model's own PyTorch forward, which has no cache here."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from adamerge_jax.evaluation.generate import Writer
from adamerge_jax.models import family_of
from tests.references import parameters_of, randomise, saved_parameters

TOKENS = 40
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
MODELS = {
    # Learned positions, which count from the left.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=TOKENS, **SPECIAL)
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **SPECIAL
        )
    ),
    # A state that every token changes, in place of attention.
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, **SPECIAL)
    ),
}


def greedy(model: PreTrainedModel, prompt: list[int], stop: int, new_tokens: int) -> list[int]:
    """The likeliest tokens one after the other, up to one that stops, of whole forward passes."""
    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < new_tokens:
            token = int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax())
            if token == stop:
                break
            ids.append(token)
    return ids


@pytest.mark.parametrize("kind", MODELS)
def test_continuations_are_those_of_pytorch(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(MODELS[kind]()).eval()
    generator = np.random.default_rng(0)
    prompts = [generator.integers(1, TOKENS, size).tolist() for size in (3, 9, 7, 5)]
    free = [greedy(model, prompt, -1, 6) for prompt in prompts]
    stop = free[1][3]
    expected = [greedy(model, prompt, stop, 6) for prompt in prompts]
    assert len({*map(len, expected)}) > 1 and len({*chain(*free)}) > 1
    family = family_of(model.config, type(model).__name__)
    assert family.bridged and family.writes
    backbone = family.build_backbone(model.config)
    parameters = parameters_of(backbone, saved_parameters(model, tmp_path))
    for batch_size in (3, 8):  # the last call is not full
        writer = Writer(family, model.config, batch_size)
        assert writer.continuations(parameters, prompts, [stop], 6) == expected
