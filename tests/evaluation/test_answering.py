"""The exact match of answers that a model writes itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from adamerge_jax.data.answers import Answers
from adamerge_jax.data.examples import Examples
from adamerge_jax.evaluation.answering import Answering
from adamerge_jax.evaluation.generate import Writer
from adamerge_jax.models import family_of
from tests.language_references import byte_tokenizer
from tests.models.test_decoders import make
from tests.references import parameters_of, randomise, saved_parameters


class Answered(Examples):
    """Examples of which nothing but the answers is read."""

    def __init__(self, answers: Answers | None):
        self.answers = answers

    def __len__(self) -> int:
        return 0

    def take(self, index, length):
        raise NotImplementedError


@pytest.mark.parametrize("batch_size", [2, 16])
def test_answers_are_those_that_transformers_writes(batch_size: int, tmp_path: Path) -> None:
    model = make("llama biases, own width of heads")
    generator = np.random.default_rng(0)
    prompts = [generator.integers(1, 60, size).tolist() for size in (3, 19, 7, 5, 11)]
    stop = 7
    written = []
    for prompt in prompts:
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        written.append(tokens[: tokens.index(stop)] if stop in tokens else tokens)
    assert any(written)
    # Two of the responses are other ones.
    responses = [[*tokens, 40] if row in (1, 2) else tokens for row, tokens in enumerate(written)]
    family = family_of(model.config)
    writer = Writer(family, model.config, batch_size)
    backbone = family.build_backbone(model.config)
    parameters = parameters_of(backbone, saved_parameters(model, tmp_path))
    assert writer.continuations(parameters, prompts, [stop], 9) == written
    answers = Answers(byte_tokenizer(), np.arange(5), prompts, responses, (stop,))
    scores = Answering(writer, None, 9).scores(parameters, answers)
    assert scores.values.tolist() == [1, 0, 0, 1, 1]
    assert scores.counts.tolist() == [1] * 5
    # Answers that may not be long enough are wrong.
    shortest = min(map(len, responses))
    short = Answering(writer, True, max(1, shortest - 1)).scores(parameters, answers)
    assert not short.values.any()


SIZES = {"d_model": 16, "vocab_size": 60, "decoder_start_token_id": 3}
ENCODER_DECODERS = {
    "t5": T5ForConditionalGeneration(
        T5Config(**SIZES, d_ff=24, d_kv=8, num_heads=2, num_layers=2, num_decoder_layers=2)
    ),
    "bart": BartForConditionalGeneration(
        BartConfig(
            **SIZES,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=40,
            forced_eos_token_id=None,
        )
    ),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_answers_of_encoder_decoders_are_those_that_transformers_writes(name, tmp_path):
    model = randomise(ENCODER_DECODERS[name], seed=3)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(4, 60, size).tolist() for size in (3, 9, 7, 5)]
    stop, written = 7, []
    for prompt in prompts:
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=stop
        )[0, 1:].tolist()
        written.append(tokens[: tokens.index(stop)] if stop in tokens else tokens)
    assert len({tuple(tokens) for tokens in written}) > 1
    family = family_of(model.config, type(model).__name__)
    assert family.encodes_prompts
    writer = Writer(family, model.config, 2, decoder_start=3)
    backbone = family.build_backbone(model.config)
    parameters = parameters_of(backbone, saved_parameters(model, tmp_path))
    assert writer.continuations(parameters, prompts, [stop], 9) == written


@pytest.mark.parametrize(
    ("exact_match", "lengths", "is_asked"),
    [
        (None, [3, 16, 90], True),
        (None, [3, 17, 17], False),
        (True, [90, 90], True),
        (False, [3], False),
        (True, None, False),
        (None, [], False),
    ],
)
def test_short_responses_are_asked_for(exact_match, lengths, is_asked):
    answers = None
    if lengths is not None:
        rows = [[1] * length for length in lengths]
        answers = Answers(byte_tokenizer(), np.arange(len(rows)), rows, rows, ())
    assert Answering(None, exact_match, 64).is_asked(Answered(answers)) is is_asked
