"""T5 computes what `transformers` computes with PyTorch, in all states of encoder and decoder.

The tolerance is that of `test_parity.py`, for the same reason: values are of the order of 1 to 10
and both sides compute in float32.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from adamerge_jax.mixing import Mixture
from adamerge_jax.models import family_of
from adamerge_jax.models.family import Network, complete_head
from adamerge_jax.models.relative_positions import relative_buckets
from adamerge_jax.models.rematerialization import Rematerialize
from adamerge_jax.models.t5 import T5Backbone
from adamerge_jax.parameter_names import is_stacked, matches, tensors_of
from adamerge_jax.task_vectors import task_vectors
from tests.references import parameters_of, randomise, saved_parameters, shapes_in_file

TOLERANCE = 1e-4

# The heads fill 28 of 24 hidden units; buckets end at a distance of 20 tokens.
SIZES = dict(
    vocab_size=50,
    d_model=24,
    d_kv=7,
    d_ff=40,
    num_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    decoder_start_token_id=0,
)
VERSIONS = {
    "1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
    "1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "gated silu, shallow decoder": dict(
        feed_forward_proj="gated-silu",
        tie_word_embeddings=False,
        num_decoder_layers=2,
        layer_norm_epsilon=1e-3,
    ),
}


def config_of(version: str, **settings: object) -> T5Config:
    return T5Config(**SIZES | VERSIONS[version] | settings)


def random_model(config: T5Config, seed: int = 0) -> T5ForConditionalGeneration:
    """A model of random parameters, whose output layer is its own where the config says so.

    `transformers` ties the two in every T5 that it makes, whatever the config says, and unties them
    when it reads a file in which they differ.
    """
    model = T5ForConditionalGeneration(config)
    if not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    return randomise(model, seed)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A batch of 3 pairs of sequences: `padding` pads 0, 2 and 5 tokens of them on that side."""

    length: int = 12
    decoder_length: int = 9
    padding: str | None = None
    decoder_padding: str | None = None

    def batch(self, config: T5Config) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(0)
        batch = {}
        for prefix, length, padding in (
            ("", self.length, self.padding),
            ("decoder_", self.decoder_length, self.decoder_padding),
        ):
            token_ids = generator.integers(5, config.vocab_size, (3, length))
            if prefix:
                token_ids[:, 0] = config.decoder_start_token_id
            batch[f"{prefix}input_ids"] = token_ids
            if padding is None:
                continue
            mask = np.ones_like(token_ids)
            for row, count in enumerate((0, 2, 5)):
                mask[row, slice(0, count) if padding == "left" else slice(length - count, None)] = 0
            batch[f"{prefix}input_ids"] = np.where(mask, token_ids, config.pad_token_id)
            batch[f"{prefix}attention_mask"] = mask
        return batch


BATCHES = {
    "no padding": Pairs(),
    "one token": Pairs(length=1, decoder_length=1),
    "right padding": Pairs(padding="right", decoder_padding="right"),
    "left padding": Pairs(padding="left", decoder_padding="right"),
    "encoder padding": Pairs(padding="right"),
    "beyond the last bucket": Pairs(
        length=47, decoder_length=53, padding="left", decoder_padding="right"
    ),
}


class Encoder(T5Backbone):
    """A backbone that, called, only encodes."""

    __call__ = T5Backbone.encode


def torch_batch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def assert_close(actual: jax.Array, expected: torch.Tensor) -> None:
    assert actual.shape == tuple(expected.shape)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=VERSIONS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A config, a model, and the tensors in its file."""
    config = config_of(request.param)
    model = random_model(config)
    return config, model, saved_parameters(model, tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("pairs", BATCHES)
def test_logits_and_states(pairs: str, checkpoint: tuple) -> None:
    config, model, tensors = checkpoint
    batch = BATCHES[pairs].batch(config)
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    encoder = Network(lambda: Encoder(config, "elementwise"))

    @jax.jit
    def run(parameters: dict, batch: dict) -> tuple:
        outputs = backbone(parameters, batch, hidden_states=True)
        logits = head(complete_head(head, {}, parameters), outputs)
        return outputs, logits, encoder(parameters, batch, hidden_states=True)

    outputs, logits, encoded = run(parameters_of(backbone, tensors), batch)

    with torch.no_grad():
        expected = model(**torch_batch(batch), output_hidden_states=True)
    assert_close(logits, expected.logits)
    assert_close(encoded.last_hidden_state, expected.encoder_last_hidden_state)
    assert_close(outputs.last_hidden_state, expected.decoder_hidden_states[-1])
    assert len(encoded.hidden_states) == config.num_layers + 1
    assert len(outputs.hidden_states) == config.num_decoder_layers + 1
    for part, states in (
        (encoded, expected.encoder_hidden_states),
        (outputs, expected.decoder_hidden_states),
    ):
        assert part.pooled is None
        for actual, state in zip(part.hidden_states, states, strict=True):
            assert_close(actual, state)
    assert set(batch) <= set(family.inputs)


def test_padding_changes_nothing(checkpoint: tuple) -> None:
    """A pair alone has the logits that it has beside longer ones, padded on either side."""
    config, _, tensors = checkpoint
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    parameters = parameters_of(backbone, tensors)

    @jax.jit
    def run(parameters: dict, batch: dict) -> jax.Array:
        return head(complete_head(head, {}, parameters), backbone(parameters, batch))

    for side in ("left", "right"):
        batch = Pairs(padding=side, decoder_padding=side).batch(config)
        source, target = (
            batch[name][2] > 0 for name in ("attention_mask", "decoder_attention_mask")
        )
        together = run(parameters, batch)[2, target]
        alone = {
            "input_ids": batch["input_ids"][2:, source],
            "decoder_input_ids": batch["decoder_input_ids"][2:, target],
        }
        np.testing.assert_allclose(run(parameters, alone)[0], together, rtol=0, atol=TOLERANCE)


def test_nothing_but_padding_is_finite(tmp_path: Path) -> None:
    config = config_of("1.1")
    tensors = saved_parameters(random_model(config), tmp_path)
    backbone = family_of(config).build_backbone(config)
    batch = Pairs(padding="right", decoder_padding="left").batch(config)
    batch["attention_mask"][1] = 0
    batch["decoder_attention_mask"][2] = 0

    def total(parameters: dict, batch: dict) -> tuple:
        outputs = backbone(parameters, batch, hidden_states=True)
        return jnp.square(outputs.last_hidden_state).sum(), outputs

    gradients, outputs = jax.jit(jax.grad(total, has_aux=True))(
        parameters_of(backbone, tensors), batch
    )
    for array in jax.tree.leaves((gradients, outputs)):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 20), (64, 256), (12, 100)])
def test_relative_buckets(bidirectional: bool, count: int, furthest: int) -> None:
    distances = np.arange(-700, 701)
    expected = T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional, count, furthest
    )
    actual = relative_buckets(distances, count, furthest, bidirectional=bidirectional)
    np.testing.assert_array_equal(actual, expected.numpy())
    # Distance 0 has no bucket among those of later keys.
    assert len(set(actual)) == count - bidirectional


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_greedy_continuation(version: str, tmp_path: Path) -> None:
    steps = 32
    config = config_of(version, eos_token_id=None)
    model = random_model(config)
    with torch.no_grad():
        # What follows shall depend on positions and not be one token again and again.
        for name, parameter in model.named_parameters():
            kept = "norm" in name or name == "shared.weight"
            factor = 10 if "relative" in name else 1 if kept else 1.5
            parameter.mul_(factor)
    tensors = saved_parameters(model, tmp_path)
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    batch = Pairs(padding="left").batch(config)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}

    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    expected = reloaded.generate(**torch_batch(prompt), do_sample=False, max_new_tokens=steps)

    @jax.jit
    def next_tokens(parameters: dict, batch: dict, written: int) -> jax.Array:
        logits = head(complete_head(head, {}, parameters), backbone(parameters, batch))
        return logits[:, written - 1].argmax(-1)

    parameters = parameters_of(backbone, tensors)
    decoded = np.full((3, steps + 1), config.pad_token_id)
    decoded[:, 0] = config.decoder_start_token_id
    for written in range(1, steps + 1):
        mask = np.broadcast_to(np.arange(steps + 1) < written, decoded.shape).astype(int)
        inputs = prompt | {"decoder_input_ids": decoded, "decoder_attention_mask": mask}
        decoded[:, written] = next_tokens(parameters, inputs, written)
    np.testing.assert_array_equal(decoded, expected.numpy())
    assert next_tokens._cache_size() == 1
    assert all(len(set(row)) >= 4 for row in decoded)
    assert len({tuple(row) for row in decoded}) == 3


def test_names_are_those_of_the_file(checkpoint: tuple) -> None:
    config, model, tensors = checkpoint
    family = family_of(config)
    backbone = shapes_in_file(family.build_backbone(config))
    head = shapes_in_file(family.build_head(config))
    assert backbone == {name: tensor.shape for name, tensor in tensors.items()}
    assert head == {name: backbone[name] for name in head}
    assert list(head) == ["shared.weight" if config.scale_decoder_outputs else "lm_head.weight"]
    # What the model also calls its parameters, and what old files hold beside them.
    aliases = set(model.state_dict()) - set(backbone)
    aliases.add("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
    ignored = family.ignored(config)
    assert {name for name in aliases | set(backbone) if matches(name, ignored)} == aliases
    assert AutoModelForSeq2SeqLM._model_mapping[type(config)] is T5ForConditionalGeneration
    assert family.language and family.auto_class == "AutoModelForSeq2SeqLM"
    assert family.max_tokens(config) is None


def test_heads_are_those_of_the_projections() -> None:
    config = config_of("1.1")
    family = family_of(config)
    shapes = shapes_in_file(family.build_backbone(config))
    heads = family.heads(config)
    found = {
        name: shapes[name][axis] // count
        for name in shapes
        for pattern, (axis, count) in heads.items()
        if matches(name, [pattern])
    }
    # Four projections in three encoder blocks, twice four in three decoder blocks.
    assert len(found) == 4 * 3 + 8 * 3
    assert all("Attention." in name for name in found)
    assert set(found.values()) == {config.d_kv}


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_config_read_from_a_file_says_the_same_of_the_head(version: str, tmp_path: Path) -> None:
    config = config_of(version)
    config.save_pretrained(tmp_path)
    read = T5Config.from_pretrained(tmp_path)
    family = family_of(config)
    assert family.build_backbone(read).shapes == family.build_backbone(config).shapes
    assert family.build_head(read).shapes == family.build_head(config).shapes


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("last", [None, "float32"])
def test_dtypes(version: str, dtype: str, last: str | None) -> None:
    """Outputs have the parameters' dtype. `transformers` keeps `wo` in float32 beside float16."""
    config = config_of(version)
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)
    parameters = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, last if last and name.endswith(".wo.weight") else dtype
        )
        for name, leaf in backbone.shapes.items()
    }

    def run(parameters: dict, batch: dict) -> tuple:
        outputs = backbone(parameters, batch)
        return outputs.last_hidden_state, head(complete_head(head, {}, parameters), outputs)

    hidden, logits = jax.eval_shape(run, parameters, Pairs().batch(config))
    assert hidden.dtype == dtype
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(("version", "rematerialize"), [("1.0", "elementwise"), ("1.1", "layer")])
def test_mixtures_and_their_gradients(
    version: str, rematerialize: Rematerialize, tmp_path: Path
) -> None:
    """A backbone of Mixtures against PyTorch, which merges first; the rest is the chain rule.

    The tolerance on gradients is relative to the largest one, as in `test_parity.py`.
    """
    config = config_of(version)
    family = family_of(config)
    backbone, head = family.build_backbone(config, rematerialize), family.build_head(config)
    models = [random_model(config, seed) for seed in range(3)]
    base, *experts = (
        parameters_of(backbone, saved_parameters(model, tmp_path / str(position)))
        for position, model in enumerate(models)
    )
    # The axis of experts comes after that of layers.
    axes = {name: int(is_stacked(name)) for name in base}
    differences = {
        name: np.stack([expert[name] - leaf for expert in experts], axes[name])
        for name, leaf in base.items()
    }
    generator = np.random.default_rng(0)
    scales = {
        name: generator.uniform(
            0, 0.6, (*leaf.shape[: axes[name]], 2, *[1] * (leaf.ndim - axes[name]))
        ).astype(np.float32)
        for name, leaf in base.items()
    }
    batch = Pairs(padding="left", decoder_padding="right").batch(config)

    merged = dict(models[0].named_parameters())
    with torch.no_grad():
        for name, leaf in base.items():
            array = leaf + (differences[name] * scales[name]).sum(axes[name])
            for tensor, row in zip(
                tensors_of(name, leaf.shape), array if axes[name] else [array], strict=True
            ):
                merged[tensor].copy_(torch.from_numpy(row))
    expected_loss = models[0](**torch_batch(batch)).logits.square().mean()
    expected_loss.backward()
    expected = {}
    for name, axis in axes.items():
        rows = [merged[tensor].grad.numpy() for tensor in tensors_of(name, base[name].shape)]
        products = np.stack(rows)[:, None] * differences[name]
        expected[name] = products.sum(tuple(range(2, products.ndim)), keepdims=True)
        expected[name] = expected[name] if axis else expected[name][0]

    def loss(scales: dict, base: dict, deltas: dict, batch: dict) -> jax.Array:
        mixtures = {name: Mixture(base[name], deltas[name], scales[name]) for name in base}
        outputs = backbone(mixtures, batch)
        return jnp.square(head(complete_head(head, {}, mixtures), outputs)).mean()

    actual_loss, gradients = jax.jit(jax.value_and_grad(loss))(
        scales, base, task_vectors(base, experts), batch
    )
    np.testing.assert_allclose(actual_loss, expected_loss.item(), rtol=1e-5)
    largest = max(np.abs(each).max() for each in expected.values())
    for name, each in expected.items():
        assert np.abs(each).min() > 0, name
        np.testing.assert_allclose(gradients[name], each, rtol=0, atol=1e-5 * largest, err_msg=name)
