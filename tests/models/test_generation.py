"""Greedy continuations with cached keys and values are those that `transformers` writes."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from adamerge_jax.errors import InputError
from adamerge_jax.mixing import materialize, mix
from adamerge_jax.models import family_of
from adamerge_jax.models.generation import Generate, make_greedy
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.task_vectors import task_vectors
from tests.models.test_decoders import make, padded_batch
from tests.references import parameters_of, saved_parameters

NEW_TOKENS = 20

CASES = (
    "llama 3.1",
    "llama biases, own width of heads",
    "mistral",
    "qwen2 upper layers slide, tied",
    "qwen3",
    # Random models with tied embeddings repeat themselves.
    "gemma2 no caps, biases, untied",
    "gemma3 global rope scaled, cap, untied",
    "phi3 turns in part, long texts",
    "cohere biases, untied",
)


def greedy_of(model: torch.nn.Module, folder: Path) -> tuple[Generate, dict[str, np.ndarray]]:
    family = family_of(model.config)
    backbone, head = family.build_backbone(model.config), family.build_head(model.config)
    generate = make_greedy(family, model.config, backbone, head)
    return generate, parameters_of(backbone, saved_parameters(model, folder))


@pytest.mark.parametrize("case", CASES)
def test_continuations(case: str, tmp_path: Path) -> None:
    """20 tokens behind prompts of 14, 12 and 9, which pass the windows, padded on either side."""
    model = make(case)
    generate, parameters = greedy_of(model, tmp_path)
    left = padded_batch("left")
    expected = model.generate(
        **{name: torch.from_numpy(array) for name, array in left.items()},
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    ).numpy()[:, left["input_ids"].shape[1] :]
    assert len(np.unique(expected)) > 10
    order = np.argsort(1 - left["attention_mask"], axis=1, kind="stable")
    right = {name: np.take_along_axis(array, order, axis=1) for name, array in left.items()}
    nothing = np.zeros(0, np.int32)
    for batch in left, right:
        written = generate(parameters, *batch.values(), nothing, new_tokens=NEW_TOKENS)
        np.testing.assert_array_equal(written.tokens, expected)
        assert written.lengths.tolist() == [NEW_TOKENS] * 3


def test_texts_that_outgrow_the_short_rotation_are_refused(tmp_path: Path) -> None:
    generate, parameters = greedy_of(make("phi3 turns in part, short texts"), tmp_path)
    batch = padded_batch("left")
    with pytest.raises(InputError, match="a prompt of 14 tokens is to grow to 41"):
        generate(parameters, *batch.values(), np.zeros(0, np.int32), new_tokens=27)


def test_tokens_that_stop(tmp_path: Path) -> None:
    """A sequence ends at its first such token, also where others go on."""
    model = make("llama biases, own width of heads")
    generate, parameters = greedy_of(model, tmp_path)
    batch = padded_batch("right")
    arguments = (parameters, *batch.values())
    whole = np.asarray(generate(*arguments, np.zeros(0, np.int32), new_tokens=8).tokens)
    late = next(token for token in whole[1] if token not in (whole[0, 0], whole[1, 0]))
    stops = np.array([whole[0, 0], late], np.int32)
    expected = [
        next((at for at, token in enumerate(row) if token in stops), len(row)) for row in whole
    ]
    assert expected[0] == 0 < expected[1] < 8
    written = generate(*arguments, stops, new_tokens=8)
    assert written.lengths.tolist() == expected
    for row, length in enumerate(expected):
        np.testing.assert_array_equal(written.tokens[row, :length], whole[row, :length])
    last = int(whole[2, 0])
    assert generate(*arguments, np.array([last]), new_tokens=1).lengths.tolist()[2] == 0


def test_mixtures(tmp_path: Path) -> None:
    """An expert as the base with a task vector writes what the same parameters write."""
    generate, base = greedy_of(make("gemma3 global rope scaled, cap, untied"), tmp_path / "base")
    _, expert = greedy_of(
        make("gemma3 global rope scaled, cap, untied", seed=1), tmp_path / "expert"
    )
    deltas = task_vectors(base, [expert])
    half = np.float32(0.5)
    scales = {
        name: np.full(
            (*leaf.shape[: is_stacked(name)], *[1] * (leaf.ndim + 1 - is_stacked(name))), half
        )
        for name, leaf in base.items()
    }
    mixed = mix(base, deltas, scales)
    rest = (*padded_batch("left").values(), np.zeros(0, np.int32))
    expected = generate(jax.jit(materialize)(mixed), *rest, new_tokens=6)
    np.testing.assert_array_equal(generate(mixed, *rest, new_tokens=6).tokens, expected.tokens)
