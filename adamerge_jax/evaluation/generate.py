"""Greedy continuations of many prompts, in batches of few shapes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array

from adamerge_jax.data.answers import InputsBeside
from adamerge_jax.data.examples import bucket_length, padded
from adamerge_jax.devices import fetch
from adamerge_jax.models.family import Family
from adamerge_jax.models.generation import make_greedy
from adamerge_jax.runs.counting import OnCount

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PADDING = 0
"""The token that pads: masked, so any will do."""


class Writer:
    """Continues prompts with models of one architecture; compiled once for each shape.

    Attributes:
        batch_size: Prompts per call.
    """

    def __init__(
        self,
        family: Family,
        config: "PretrainedConfig",
        batch_size: int,
        decoder_start: int | None = None,
    ):
        """Builds the network; it is compiled when it first runs.

        Args:
            family: The architecture, which `writes`.
            config: The config of the base.
            batch_size: Prompts per call.
            decoder_start: The token that an encoder-decoder's continuations start with; None for a
                decoder.
        """
        self._decoder_start = decoder_start
        backbone = family.build_backbone(config)
        self._generate = make_greedy(family, config, backbone, family.build_head(config))
        self.batch_size = batch_size

    def continuations(
        self,
        parameters: Mapping[str, Array],
        prompts: Sequence[list[int]],
        stops: Sequence[int],
        new_tokens: int,
        *,
        beside: InputsBeside | None = None,
        with_stop: bool = False,
        on_count: OnCount = lambda done: None,
    ) -> list[list[int]]:
        """Returns the likeliest tokens behind each prompt.

        Args:
            parameters: The model's parameters by name.
            prompts: The tokens of N prompts.
            stops: The tokens that end a continuation.
            new_tokens: The largest number of tokens.
            beside: The inputs beside the tokens of chosen prompts; None where there are none.
            with_stop: True to end a continuation with the token that stopped it.
            on_count: Called with the number of continuations that are written.
        """
        written: list[list[int]] = [[]] * len(prompts)
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        size = max(1, min(self.batch_size, len(prompts)))
        for start in range(0, len(order), size):
            index = order[start : start + size]
            # The last call repeats prompts up to the size that is compiled.
            repeated = np.resize(index, size)
            chosen = [prompts[i] for i in repeated]
            length = bucket_length(max(map(len, chosen)))
            token_ids, mask = padded(chosen, length, PADDING)
            further: dict[str, np.ndarray] = {}
            if self._decoder_start is not None:
                further = {"input_ids": token_ids, "attention_mask": mask}
                token_ids = np.full((size, 1), self._decoder_start, np.int32)
                mask = np.ones_like(token_ids)
            elif beside is not None:
                further = beside(repeated, length + new_tokens)
            tokens, lengths = self._generate(
                parameters,
                token_ids,
                mask,
                np.array(stops, np.int32),
                new_tokens=new_tokens,
                beside=further,
            )
            tokens, lengths = fetch(tokens), fetch(lengths)
            for row, i in enumerate(index):
                written[i] = tokens[row, : lengths[row] + with_stop].tolist()
            on_count(start + len(index))
        return written
