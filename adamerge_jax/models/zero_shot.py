"""Zero-shot heads: embeddings of the names of a task's classes by CLIP's text tower.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
2021, section 3.1.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from adamerge_jax.errors import InputError
from adamerge_jax.models.clip_text import ClipText
from adamerge_jax.models.family import Network
from adamerge_jax.models.layers import Config, Outputs, parameter, value
from adamerge_jax.objectives.similarity import unit_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 64
"""Prompts that are embedded at once."""

PLACEHOLDER = "{}"
"""The place of a class name in a template."""


class ZeroShotHead(nnx.Module):
    """Scaled cosine similarity of an image to each class name.

    `logits = exp(logit_scale) * unit_length(pooled) @ text_embeddings.T + bias`

    `text_embeddings`, `[C, D]`, have length 1, and `bias`, `[C]`, is 0 unless heads were scaled.
    No checkpoint holds them: `zero_shot_head` makes them, and C is `config.num_labels` only in the
    shapes that are declared here.
    """

    def __init__(self, config: Config):
        self.text_embeddings = parameter(config.num_labels, config.projection_dim)
        self.logit_scale = parameter()
        self.bias = parameter(config.num_labels)

    def __call__(self, outputs: Outputs) -> Float[Array, "B C"]:
        similarity = unit_length(outputs.pooled) @ value(self.text_embeddings).T
        return jnp.exp(value(self.logit_scale)) * similarity + value(self.bias)


def text_network(config: Config) -> Network:
    """Returns the text tower, `(parameters, inputs) -> embeddings [B, D]`.

    Its `shapes` are those of the base's parameters that `zero_shot_head` needs.
    """
    return Network(partial(ClipText, config))


def zero_shot_head(
    config: Config,
    parameters: Mapping[str, Array],
    tokenizer: "PreTrainedTokenizerBase",
    class_names: Sequence[str],
    templates: Sequence[str],
) -> dict[str, Array]:
    """Makes a task's head from the names of its classes.

    Each name is put into each template and embedded by the text tower. The embeddings are
    normalised, averaged over the templates, and normalised again.

    Args:
        config: The base's config, a whole CLIP.
        parameters: The base's parameters under the names in `text_network(config).shapes`.
        tokenizer: The base's tokenizer.
        class_names: C names, in the order of the task's labels.
        templates: Sentences with a `{}` for the name, such as `a photo of a {}.`

    Returns:
        `text_embeddings`, `[C, D]` of length 1 in float32, `logit_scale`, `[]`, and `bias`, `[C]`
        zeros.

    Raises:
        InputError: There is no class name or no template, a template has no `{}`, or a sentence
            is longer than the text tower can read.
    """
    if not class_names:
        raise InputError("class_names: is empty; give the name of every class of the task")
    if not templates:
        raise InputError("templates: is empty; give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if PLACEHOLDER not in template:
            raise InputError(
                f"templates: {template!r} has no {PLACEHOLDER} to put the name of a class in"
            )

    network = text_network(config)
    needed = {name: parameters[name] for name in network.shapes}
    sentences = [
        template.replace(PLACEHOLDER, name) for name in class_names for template in templates
    ]
    tokens = _tokenize(sentences, tokenizer, config.text_config.max_position_embeddings)
    embeddings = unit_length(_embed(network, needed, tokens))
    means = embeddings.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return {
        "text_embeddings": unit_length(means),
        "logit_scale": needed["logit_scale"],
        "bias": jnp.zeros(len(means)),
    }


def _tokenize(
    sentences: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int
) -> dict[str, np.ndarray]:
    """Returns token ids and attention mask, `[sentences, length]` each."""
    tokens = tokenizer(list(sentences), padding="max_length", max_length=length)
    for sentence, token_ids in zip(sentences, tokens["input_ids"], strict=True):
        # Cut short, a sentence may lose the name it is about.
        if len(token_ids) > length:
            raise InputError(
                f"class_names and templates: {sentence!r} has {len(token_ids)} tokens, the text "
                f"tower reads {length}; shorten the name or the template"
            )
    return {name: np.asarray(tokens[name]) for name in ("input_ids", "attention_mask")}


def _embed(
    network: Network, parameters: Mapping[str, Array], tokens: Mapping[str, np.ndarray]
) -> Array:
    """Embeds token sequences batch by batch; returns `[sentences, D]`."""
    count = len(tokens["input_ids"])
    size = min(BATCH_SIZE, count)
    embed = jax.jit(network)
    batches = []
    for start in range(0, count, size):
        # The last batch repeats its last sentence up to the shape that is already compiled.
        index = np.minimum(np.arange(start, start + size), count - 1)
        batch = {name: values[index] for name, values in tokens.items()}
        batches.append(embed(parameters, batch))
    return jnp.concatenate(batches)[:count]
