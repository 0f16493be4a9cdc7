"""How far each model family is from `transformers`: the largest absolute differences, in a table.

    python experiments/benchmarks/parity.py

Tiny models with random parameters, in float32; PyTorch is needed for the reference. A difference
is that of the computation alone, since both sides read the same file.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from rich.table import Table
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from adamerge_jax.cli.console import make_console
from adamerge_jax.models import family_of
from adamerge_jax.models.family import Network
from adamerge_jax.models.layers import Outputs
from adamerge_jax.parameter_names import is_stacked, unstack

TOLERANCE = 1e-4
"""What counts as the same computation in float32."""

SIZES = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
TEXT = dict(vocab_size=100, max_position_embeddings=64, num_labels=5, **SIZES)
IMAGES = dict(image_size=32, patch_size=8, num_labels=5, **SIZES)

DINOV2 = dict(IMAGES, mlp_ratio=2)
SIGLIP = dict(vision_config=IMAGES, num_labels=5)

DISTILBERT = dict(dim=64, n_layers=4, n_heads=4, hidden_dim=128)
DISTILBERT |= dict(vocab_size=100, max_position_embeddings=64, num_labels=5)

SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
MODERN = dict(TEXT, local_attention=16, global_attn_every_n_layers=2, **dict.fromkeys(SPECIAL, 1))
DEBERTA = dict(TEXT, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"])
DEBERTA |= dict(share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False)

DECODER = dict(TEXT, num_key_value_heads=2, pad_token_id=1)
WINDOW = dict(sliding_window=16)
NEOX = {name: size for name, size in DECODER.items() if name != "num_key_value_heads"}
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=48,
)

Reference = tuple[np.ndarray, np.ndarray | None, np.ndarray]
"""Logits `[B, C]` or `[B, T, V]`, pooled `[B, H]` or None, hidden states `[L + 1, B, T, H]`."""


def classifier(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Reference:
    """What a classifier of `transformers` computes."""
    outputs = model(**batch, output_hidden_states=True)
    inner = model.base_model(**batch)
    pooled = inner.get("pooler_output")
    if pooled is None:
        pooled = inner.last_hidden_state[:, 0]
    return outputs.logits.numpy(), pooled.numpy(), torch.stack(outputs.hidden_states).numpy()


def classifier_of_patches(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Reference:
    """What a SigLIP computes, from the mean of patches, or a DINOv2, with its first token."""
    outputs = model(**batch, output_hidden_states=True)
    body: Any = model.vision_model if model.config.model_type == "siglip" else model.base_model
    last = body(**batch).last_hidden_state
    pooled = last.mean(1)
    if model.config.model_type != "siglip":
        patches = last[:, 1 + getattr(model.config, "num_register_tokens", 0) :]
        pooled = torch.cat([last[:, 0], patches.mean(1)], -1)
    return outputs.logits.numpy(), pooled.numpy(), torch.stack(outputs.hidden_states).numpy()


def language_model(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Reference:
    """What a decoder of `transformers` computes."""
    outputs = model(**batch, output_hidden_states=True)
    return outputs.logits.numpy(), None, torch.stack(outputs.hidden_states).numpy()


def encoder_decoder(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Reference:
    """What a T5 computes; hidden states are the decoder's."""
    outputs = model(**batch, output_hidden_states=True)
    return outputs.logits.numpy(), None, torch.stack(outputs.decoder_hidden_states).numpy()


def zero_shot_classifier(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Reference:
    """What a CLIP computes for five texts and the batch's images."""
    text = torch.arange(50).reshape(5, 10)
    outputs = model(input_ids=text, **batch)
    features = model.get_image_features(**batch, output_hidden_states=True)
    states = torch.stack(features.hidden_states).numpy()
    return outputs.logits_per_image.numpy(), features.pooler_output.numpy(), states


def head_of_checkpoint(
    model: PreTrainedModel, head: Network, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The head's parameters, which are in the file."""
    return {name: tensors[name] for name in head.shapes}


def zero_shot_head(
    model: PreTrainedModel, head: Network, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The reference's text embeddings of the same five texts, so that the backbone is compared."""
    text = torch.arange(50).reshape(5, 10)
    embeddings = model.get_text_features(text).pooler_output
    normalised = torch.nn.functional.normalize(embeddings, dim=-1)
    return {
        "text_embeddings": normalised.numpy(),
        "logit_scale": tensors["logit_scale"],
        "bias": np.zeros(len(normalised), np.float32),
    }


def text_batch() -> dict[str, np.ndarray]:
    """8 sequences of up to 48 tokens, padded on the right."""
    generator = np.random.default_rng(0)
    token_ids = generator.integers(5, 100, (8, 48))
    mask = (np.arange(48) < np.arange(6, 54, 6)[:, None]).astype(np.int64)
    return {"input_ids": np.where(mask, token_ids, 1), "attention_mask": mask}


def pair_batch() -> dict[str, np.ndarray]:
    """The same sequences for an encoder, and 8 shorter ones for a decoder."""
    batch = text_batch()
    shorter = {f"decoder_{name}": array[:, :24] for name, array in batch.items()}
    return batch | shorter


def image_batch(height: int = 32, width: int = 32) -> dict[str, np.ndarray]:
    """8 images of noise."""
    pixels = np.random.default_rng(0).normal(size=(8, 3, height, width))
    return {"pixel_values": pixels.astype(np.float32)}


def differences(
    model: PreTrainedModel,
    batch: Mapping[str, np.ndarray],
    reference: Callable[..., Reference],
    complete_head: Callable[..., dict[str, np.ndarray]],
) -> list[float | None]:
    """The largest absolute differences of logits, pooled (None if there is none), hidden states."""
    family = family_of(model.config)
    backbone, head = family.build_backbone(model.config), family.build_head(model.config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    parameters = {
        name: np.stack([tensors[each] for each in unstack(name, shape.shape[0])])
        if is_stacked(name)
        else tensors[name]
        for name, shape in backbone.shapes.items()
    }
    with torch.no_grad():
        expected = reference(model, {name: torch.from_numpy(x) for name, x in batch.items()})
        of_head = complete_head(model, head, tensors)

    @jax.jit
    def run(parameters: dict, of_head: dict, batch: dict) -> tuple[jax.Array, Outputs]:
        outputs = backbone(parameters, batch, hidden_states=True)
        return head(of_head, outputs), outputs

    logits, outputs = run(parameters, of_head, dict(batch))
    actual = logits, outputs.pooled, outputs.hidden_states
    # Padding may have nothing to attend to, and what it computes then is arbitrary.
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    of_tokens: Any = ... if mask is None else (..., mask > 0, slice(None))
    compared = (of_tokens if family.language else ..., ..., of_tokens)
    return [
        None if e is None else float(np.abs(a - e)[which].max())
        for a, e, which in zip(actual, expected, compared, strict=True)
    ]


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Draws every parameter anew, so that no bias is 0 and no norm is 1.

    CLIP's logits keep their scale. The norms of Gemma multiply by 1 + weight.
    """
    centre = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                continue
            mean = centre if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.1, generator=generator)
    return model.eval()


def main() -> None:
    """Prints the table; exits with 1 if a difference is above the tolerance."""
    # Sharing a thread count makes two runs on one machine comparable to the last digit.
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    text, images = text_batch(), image_batch()
    clip = transformers.CLIPConfig(
        vision_config=IMAGES,
        text_config=dict(TEXT, bos_token_id=98, eos_token_id=99),
        projection_dim=32,
    )
    checkpoint = classifier, head_of_checkpoint
    patches = classifier_of_patches, head_of_checkpoint
    # Images of another size than the config states, for which positions are resized.
    oblong = image_batch(48, 24)
    decoder = text, language_model, head_of_checkpoint
    cases = [
        (transformers.BertForSequenceClassification, TEXT, text, *checkpoint),
        (transformers.DistilBertForSequenceClassification, DISTILBERT, text, *checkpoint),
        (
            transformers.ElectraForSequenceClassification,
            TEXT | dict(embedding_size=32),
            text,
            *checkpoint,
        ),
        (transformers.MPNetForSequenceClassification, TEXT, text, *checkpoint),
        (transformers.RobertaForSequenceClassification, TEXT, text, *checkpoint),
        (transformers.XLMRobertaForSequenceClassification, TEXT, text, *checkpoint),
        (transformers.CamembertForSequenceClassification, TEXT, text, *checkpoint),
        (transformers.DebertaV2ForSequenceClassification, DEBERTA, text, *checkpoint),
        (transformers.ModernBertForSequenceClassification, MODERN, text, *checkpoint),
        (transformers.ViTForImageClassification, IMAGES, images, *checkpoint),
        (transformers.DeiTForImageClassification, IMAGES, images, *checkpoint),
        (transformers.Dinov2ForImageClassification, DINOV2, oblong, *patches),
        (transformers.Dinov2WithRegistersForImageClassification, DINOV2, oblong, *patches),
        (transformers.SiglipForImageClassification, SIGLIP, images, *patches),
        (transformers.CLIPModel, clip.to_dict(), images, zero_shot_classifier, zero_shot_head),
        (transformers.LlamaForCausalLM, DECODER | dict(rope_parameters=LLAMA3_ROPE), *decoder),
        (transformers.MistralForCausalLM, DECODER | WINDOW, *decoder),
        (transformers.Qwen2ForCausalLM, DECODER, *decoder),
        (transformers.Qwen3ForCausalLM, DECODER | dict(head_dim=24), *decoder),
        (transformers.Gemma2ForCausalLM, DECODER | WINDOW | dict(head_dim=24), *decoder),
        (
            transformers.Gemma3ForCausalLM,
            DECODER | WINDOW | dict(head_dim=24, sliding_window_pattern=2),
            *decoder,
        ),
        (transformers.Qwen3MoeForCausalLM, DECODER | EXPERTS, *decoder),
        (
            transformers.MixtralForCausalLM,
            DECODER | dict(num_local_experts=8, num_experts_per_tok=2),
            *decoder,
        ),
        (
            transformers.Qwen2MoeForCausalLM,
            DECODER | EXPERTS | dict(shared_expert_intermediate_size=96),
            *decoder,
        ),
        (transformers.OlmoeForCausalLM, DECODER | EXPERTS, *decoder),
        (transformers.SmolLM3ForCausalLM, DECODER, *decoder),
        (transformers.Olmo2ForCausalLM, DECODER, *decoder),
        (transformers.Phi3ForCausalLM, DECODER | WINDOW, *decoder),
        (transformers.GraniteForCausalLM, DECODER | dict(residual_multiplier=0.5), *decoder),
        (transformers.CohereForCausalLM, DECODER, *decoder),
        (transformers.Cohere2ForCausalLM, DECODER | WINDOW, *decoder),
        (transformers.StableLmForCausalLM, DECODER, *decoder),
        (transformers.Starcoder2ForCausalLM, DECODER | WINDOW, *decoder),
        (transformers.GPTNeoXForCausalLM, NEOX, *decoder),
        (
            transformers.T5ForConditionalGeneration,
            dict(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4),
            pair_batch(),
            encoder_decoder,
            head_of_checkpoint,
        ),
    ]
    table = Table(title="Largest absolute difference to transformers, float32")
    table.add_column("model")
    for column in ("logits", "pooled", "hidden states"):
        table.add_column(column, justify="right")
    worst = 0.0
    for model_class, settings, batch, reference, complete_head in cases:
        model = randomise(
            model_class(model_class.config_class(**settings, attn_implementation="eager"))
        )
        found = differences(model, batch, reference, complete_head)
        shown = ("-" if difference is None else f"{difference:.1e}" for difference in found)
        table.add_row(model_class.__name__, *shown)
        # NumPy's maximum, unlike Python's, of anything and NaN is NaN.
        worst = np.max([worst, *(difference for difference in found if difference is not None)])
    make_console().print(table)
    raise SystemExit(0 if worst <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
