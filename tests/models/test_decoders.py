"""Every decoder family computes what `transformers` computes, and writes the same texts.

Tolerance and its reasons are those of `test_parity`. Of rows that are padded, what stands at
padding is not compared: there the two sides attend to different things, and nobody reads it.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adamerge_jax.errors import InputError
from adamerge_jax.mixing import materialize, mix
from adamerge_jax.models import family_of
from adamerge_jax.models.family import complete_head
from adamerge_jax.models.layers import attention
from adamerge_jax.models.rotary import Rotary
from adamerge_jax.parameter_names import is_stacked
from adamerge_jax.task_vectors import task_vectors
from tests.references import parameters_of, randomise, saved_parameters

TOLERANCE = 1e-4

LENGTH = 14
"""Tokens in a row; the windows below are shorter."""

SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    # The wavelengths of heads of 8 features are 6, 63, 628 and 6283: the first is kept, the second
    # lies between 128 / 4 and 128 / 1, the others grow.
    original_max_position_embeddings=128,
)
LLAMA3 = dict(rope_parameters=LLAMA3_ROPE, max_position_embeddings=256)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=500.0,
    short_factor=[1.0, 1.5, 2.0],
    long_factor=[1.5, 3.0, 5.0],
    partial_rotary_factor=0.75,
)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
YARN = dict(
    rope_type="yarn",
    rope_theta=500.0,
    factor=4.0,
    beta_fast=4.0,
    original_max_position_embeddings=16,
)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=500.0, factor=3.0)
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GEMMA = dict(SIZES, num_hidden_layers=4, head_dim=12, sliding_window=5, query_pre_attn_scalar=10)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "llama one key head, tied": (
        "LlamaForCausalLM",
        dict(SIZES, num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-2),
    ),
    "llama biases, own width of heads": (
        "LlamaForCausalLM",
        dict(SIZES, attention_bias=True, mlp_bias=True, head_dim=6, num_key_value_heads=4),
    ),
    "llama 3.1": ("LlamaForCausalLM", SIZES | LLAMA3),
    "llama linear, gelu": (
        "LlamaForCausalLM",
        dict(SIZES, rope_parameters=LINEAR_ROPE, hidden_act="gelu"),
    ),
    "mistral": ("MistralForCausalLM", dict(SIZES, sliding_window=4)),
    "mistral no window, tied": (
        "MistralForCausalLM",
        dict(SIZES, sliding_window=None, head_dim=10, tie_word_embeddings=True),
    ),
    "qwen2": ("Qwen2ForCausalLM", dict(SIZES, sliding_window=4)),
    "qwen2 upper layers slide, tied": (
        "Qwen2ForCausalLM",
        dict(
            SIZES,
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3": ("Qwen3ForCausalLM", dict(SIZES, head_dim=10)),
    "qwen3 layer types, biases, tied": (
        "Qwen3ForCausalLM",
        dict(
            SIZES | LLAMA3,
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            tie_word_embeddings=True,
        ),
    ),
    # Soft caps small enough to bend.
    "gemma2": (
        "Gemma2ForCausalLM",
        dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    ),
    "gemma2 no caps, biases, untied": (
        "Gemma2ForCausalLM",
        dict(
            GEMMA,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=LINEAR_ROPE,
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        # One layer in three sees everything.
        dict(GEMMA, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2)
        | dict(num_hidden_layers=6),
    ),
    "gemma3 global rope scaled, cap, untied": (
        "Gemma3ForCausalLM",
        dict(
            GEMMA,
            layer_types=["full_attention", "sliding_attention"] * 2,
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=2000.0, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=100.0),
            },
            final_logit_softcapping=4.0,
            tie_word_embeddings=False,
        ),
    ),
    "smollm3": ("SmolLM3ForCausalLM", dict(SIZES, no_rope_layers=[1, 0, 1])),
    "smollm3 slides, biases, untied": (
        "SmolLM3ForCausalLM",
        dict(
            SIZES,
            no_rope_layers=[0, 1, 0],
            use_sliding_window=True,
            sliding_window=4,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "olmo2": ("Olmo2ForCausalLM", dict(SIZES, attention_bias=True)),
    "phi3": ("Phi3ForCausalLM", dict(SIZES, sliding_window=4)),
    "phi3 turns in part, short texts": (
        "Phi3ForCausalLM",
        dict(SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=40),
    ),
    "phi3 turns in part, long texts": (
        "Phi3ForCausalLM",
        dict(
            SIZES,
            rope_parameters=LONGROPE,
            original_max_position_embeddings=8,
            tie_word_embeddings=True,
        ),
    ),
    "granite": (
        "GraniteForCausalLM",
        dict(
            SIZES,
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
            attention_multiplier=0.2,
            logits_scaling=2.5,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "cohere": ("CohereForCausalLM", dict(SIZES, logit_scale=0.3, use_qk_norm=True)),
    "cohere biases, untied": (
        "CohereForCausalLM",
        dict(SIZES, attention_bias=True, tie_word_embeddings=False),
    ),
    "cohere2": (
        "Cohere2ForCausalLM",
        dict(
            SIZES,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "stablelm": ("StableLmForCausalLM", dict(SIZES, use_qkv_bias=True)),
    "stablelm parallel": ("StableLmForCausalLM", dict(SIZES, use_parallel_residual=True)),
    "starcoder2": ("Starcoder2ForCausalLM", dict(SIZES, sliding_window=4)),
    "starcoder2 no biases, untied": (
        "Starcoder2ForCausalLM",
        dict(SIZES, use_bias=False, sliding_window=None, tie_word_embeddings=False),
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", dict(SIZES, **EXPERTS, norm_topk_prob=True, head_dim=10)),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        dict(SIZES, **EXPERTS, shared_expert_intermediate_size=28),
    ),
    "olmoe": ("OlmoeForCausalLM", dict(SIZES, **EXPERTS, norm_topk_prob=True)),
    "gpt_neox": ("GPTNeoXForCausalLM", dict(NEOX, rotary_pct=0.5)),
    "gpt_neox one after the other, no biases": (
        "GPTNeoXForCausalLM",
        dict(NEOX, use_parallel_residual=False, attention_bias=False),
    ),
    "gpt_neox tied": ("GPTNeoXForCausalLM", dict(NEOX, tie_word_embeddings=True)),
    "mixtral": (
        "MixtralForCausalLM",
        dict(SIZES, num_local_experts=6, num_experts_per_tok=2, sliding_window=4),
    ),
    "llama yarn": ("LlamaForCausalLM", dict(SIZES, rope_parameters=YARN)),
    "llama dynamic": (
        "LlamaForCausalLM",
        dict(SIZES, rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=3.0)),
    ),
}
ONE_OF_EACH_FAMILY = [
    "llama 3.1",
    "mistral",
    "qwen2 upper layers slide, tied",
    "qwen3",
    "gemma2",
    "gemma3",
]


def make(case: str, seed: int = 0) -> PreTrainedModel:
    class_name, settings = CASES[case]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**settings)
    # Attention as the formula says: the others leave out Gemma's soft cap.
    model = randomise(model_class._from_config(config, attn_implementation="eager"), seed)
    if class_name.startswith("Gemma"):
        # Its norms multiply by 1 + weight.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.sub_(1)
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def padded_batch(padding: str | None) -> dict[str, np.ndarray]:
    """3 rows, of which 0, 2 and 5 tokens are padding on that side."""
    token_ids = np.random.default_rng(0).integers(1, SIZES["vocab_size"], (3, LENGTH))
    mask = np.ones_like(token_ids)
    for row, count in enumerate((0, 2, 5) if padding else ()):
        mask[row, slice(0, count) if padding == "left" else slice(LENGTH - count, None)] = 0
    return {"input_ids": token_ids * mask, "attention_mask": mask}


class OurModel:
    """A checkpoint as we compute it, compiled once."""

    def __init__(self, model: PreTrainedModel, folder: Path):
        self.family = family_of(model.config)
        backbone, head = (
            self.family.build_backbone(model.config),
            self.family.build_head(model.config),
        )
        self.parameters = parameters_of(backbone, saved_parameters(model, folder))

        @jax.jit
        def run(parameters: dict, batch: dict) -> tuple:
            outputs = backbone(parameters, batch, hidden_states=True)
            return outputs, head(complete_head(head, {}, parameters), outputs)

        self.run = run

    def __call__(self, batch: dict[str, np.ndarray]) -> tuple:
        return self.run(self.parameters, batch)


def assert_close(actual: Any, expected: torch.Tensor, mask: np.ndarray) -> None:
    assert actual.shape == tuple(expected.shape)
    assert actual.dtype == jnp.float32
    assert np.isfinite(actual).all()
    kept = mask > 0
    np.testing.assert_allclose(
        np.asarray(actual)[kept], expected.detach().numpy()[kept], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states(case: str, tmp_path: Path) -> None:
    model = make(case)
    ours = OurModel(model, tmp_path)
    for padding in (None, "left", "right"):
        batch = padded_batch(padding)
        with torch.no_grad():
            expected = model(
                **{name: torch.from_numpy(array) for name, array in batch.items()},
                output_hidden_states=True,
            )
        outputs, logits = ours(batch)
        mask = batch["attention_mask"]
        assert_close(logits, expected.logits, mask)
        assert outputs.pooled is None
        assert len(outputs.hidden_states) == len(expected.hidden_states)
        assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
        for actual, state in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            assert_close(actual, state, mask)
        np.testing.assert_array_equal(outputs.last_hidden_state, outputs.hidden_states[-1])
        assert set(batch) == set(ours.family.inputs)


@pytest.mark.parametrize("case", ONE_OF_EACH_FAMILY)
def test_greedy_texts_are_the_same(case: str, tmp_path: Path) -> None:
    """32 tokens, the whole text computed anew for each; the best token leads by more than noise."""
    model = make(case)
    ours = OurModel(model, tmp_path)
    prompt = padded_batch(None)["input_ids"][:, :6]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    expected = loaded.generate(torch.from_numpy(prompt), max_new_tokens=32, do_sample=False)

    text = np.zeros((3, 6 + 32), np.int64)
    text[:, :6] = prompt
    for length in range(6, text.shape[1]):
        mask = np.broadcast_to(np.arange(text.shape[1]) < length, text.shape).astype(np.int64)
        _, logits = ours({"input_ids": text, "attention_mask": mask})
        second, first = np.sort(logits[:, length - 1])[:, -2:].T
        assert (first - second).min() > 10 * TOLERANCE
        text[:, length] = np.argmax(logits[:, length - 1], axis=-1)
    np.testing.assert_array_equal(text, expected.numpy())
    assert len(np.unique(text)) > 10


def test_batch_without_mask(tmp_path: Path) -> None:
    ours = OurModel(make("gemma3"), tmp_path)
    batch = padded_batch(None)
    _, expected = ours(batch)
    _, actual = ours({"input_ids": batch["input_ids"]})
    np.testing.assert_array_equal(actual, expected)


def test_texts_beyond_the_last_position_are_refused() -> None:
    backbone = family_of(make("llama").config).build_backbone(make("llama").config)
    with pytest.raises(InputError, match="65 tokens, the model has positions for 64"):
        jax.eval_shape(backbone, backbone.shapes, {"input_ids": np.zeros((1, 65), np.int32)})


@pytest.mark.parametrize("case", ONE_OF_EACH_FAMILY)
def test_half_precision_stays(case: str) -> None:
    """Activations have the parameters' dtype, logits are float32."""
    config = make(case).config
    family = family_of(config)
    backbone, head = family.build_backbone(config), family.build_head(config)

    def run(parameters: dict, batch: dict) -> tuple:
        outputs = backbone(parameters, batch, hidden_states=True)
        return outputs, head(complete_head(head, {}, parameters), outputs)

    parameters = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
        for name, leaf in backbone.shapes.items()
    }
    outputs, logits = jax.eval_shape(run, parameters, padded_batch("left"))
    assert outputs.last_hidden_state.dtype == outputs.hidden_states.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert logits.shape == (3, LENGTH, SIZES["vocab_size"])


def test_mixtures_and_their_gradients(tmp_path: Path) -> None:
    """A merge of two experts, mixed layer by layer, against the model merged first.

    Of Gemma 3 because one mixture is read twice, as embeddings and as the output layer.
    """
    models = [make("gemma3", seed) for seed in range(3)]
    family, config = family_of(models[0].config), models[0].config
    backbone, head = family.build_backbone(config), family.build_head(config)
    base, *experts = (
        parameters_of(backbone, saved_parameters(model, tmp_path / str(position)))
        for position, model in enumerate(models)
    )
    generator = np.random.default_rng(0)
    # One coefficient per tensor and expert.
    scales = {
        name: generator.uniform(
            0, 0.5, (*leaf.shape[: is_stacked(name)], 2, *[1] * (leaf.ndim - is_stacked(name)))
        ).astype(np.float32)
        for name, leaf in base.items()
    }

    def loss(scales: dict, base: dict, deltas: dict, batch: dict, merged_first: bool) -> jax.Array:
        parameters = mix(base, deltas, scales)
        if merged_first:
            parameters = materialize(parameters)
        logits = head(complete_head(head, {}, parameters), backbone(parameters, batch))
        return (jax.nn.log_softmax(logits)[..., 3] * batch["attention_mask"]).mean()

    run = jax.jit(jax.value_and_grad(loss), static_argnames="merged_first")
    arguments = scales, base, task_vectors(base, experts), padded_batch("left")
    expected_loss, expected = run(*arguments, merged_first=True)
    actual_loss, actual = run(*arguments, merged_first=False)
    np.testing.assert_allclose(actual_loss, expected_loss, rtol=1e-5)
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            actual[name], gradient, rtol=0, atol=1e-5 * largest, err_msg=name
        )


def test_heads_that_share_keys_are_as_if_keys_were_repeated() -> None:
    generator = np.random.default_rng(0)
    query = generator.normal(size=(2, 5, 6 * 4)).astype(np.float32)
    key, value = generator.normal(size=(2, 2, 7, 2, 4)).astype(np.float32)
    actual = attention(query, key.reshape(2, 7, 8), value.reshape(2, 7, 8), 6)
    repeated = (np.repeat(x, 3, axis=2).reshape(2, 7, 24) for x in (key, value))
    np.testing.assert_allclose(actual, attention(query, *repeated, 6), atol=1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
        dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0),
        dict(
            rope_type="yarn",
            rope_theta=1000000.0,
            factor=4.0,
            original_max_position_embeddings=32768,
        ),
        dict(
            rope_type="yarn",
            rope_theta=10000.0,
            factor=40.0,
            mscale=1.0,
            mscale_all_dim=0.8,
            truncate=False,
            original_max_position_embeddings=4096,
        ),
        dict(rope_type="proportional", rope_theta=1000000.0, partial_rotary_factor=0.25),
    ],
)
def test_rotary_angles_of_the_size_of_real_models(rope: dict | None) -> None:
    """Frequencies to 1e-6 relative; at 2000 positions that is an angle of 2e-3 at most."""
    config = transformers.LlamaConfig(
        num_hidden_layers=1, head_dim=128, max_position_embeddings=131072, rope_parameters=rope
    )
    rotary = LlamaRotaryEmbedding(config)
    partial = rope is not None and "partial_rotary_factor" in rope
    ours = Rotary.of(config, partial=partial)
    np.testing.assert_allclose(ours.speeds, rotary.inv_freq.numpy(), rtol=1e-6, atol=0)
    cosine, sine = rotary(torch.zeros(1), torch.arange(2000)[None])
    expected = torch.stack([cosine[0, :, :64], sine[0, :, :64]])
    np.testing.assert_allclose(ours.table(2000), expected.numpy(), atol=2e-3)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="spiral", rope_theta=1e4, factor=2.0),
        dict(rope_type="mrope", rope_theta=1e4, factor=2.0),
    ],
)
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_other_kinds_of_rope_are_refused(family: str, rope: dict) -> None:
    config_class = getattr(transformers, f"{family}Config")
    if family == "Gemma3Text":
        rope = {"full_attention": rope}
    layers = dict(layer_types=["sliding_attention", "full_attention", "full_attention"])
    config = config_class(**SIZES, **layers, rope_parameters=rope)
    kind = rope.get("full_attention", rope)["rope_type"]
    with pytest.raises(InputError, match=f"rope_type '{kind}' is not supported.*default, linear"):
        family_of(config).build_backbone(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.Gemma3TextConfig(**SIZES, use_bidirectional_attention=True),
            "attention is bidirectional",
        ),
        (transformers.Qwen2Config(**SIZES, is_causal=False), "attention is bidirectional"),
        (
            transformers.LlamaConfig(
                **SIZES, rope_parameters=dict(LONGROPE, partial_rotary_factor=0.5)
            ),
            "partial_rotary_factor is 0.5; the heads of a llama rotate whole",
        ),
        (transformers.StableLmConfig(**SIZES, qk_layernorm=True), "qk_layernorm is true"),
        (
            transformers.Qwen3Config(
                **SIZES, layer_types=["full_attention"] * 2 + ["chunked_attention"]
            ),
            "layer_types has 'chunked_attention', which is not supported",
        ),
        (
            transformers.Qwen2Config(**SIZES, layer_types=["sliding_attention"] * 3),
            "there is no sliding_window",
        ),
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(
    config: transformers.PretrainedConfig, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        family_of(config).build_backbone(config)
