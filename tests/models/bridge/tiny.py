"""Tiny models of `transformers` for its PyTorch forward, and PyTorch's own answers."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    ModernBertConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    ResNetConfig,
    RoFormerConfig,
    XLMConfig,
)

from tests.references import SPECIAL_TOKENS, randomise

WIDTH = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)

TEXT_CONFIGS = {
    "bert": lambda **k: BertConfig(**WIDTH, max_position_embeddings=24, **k),
    "roformer": lambda **k: RoFormerConfig(
        **WIDTH, embedding_size=12, max_position_embeddings=24, **k
    ),
    "modernbert": lambda **k: ModernBertConfig(
        **WIDTH,
        max_position_embeddings=64,
        local_attention=4,
        global_attn_every_n_layers=2,
        **dict.fromkeys(SPECIAL_TOKENS, 0),
        **k,
    ),
    "deberta-v2": lambda **k: DebertaV2Config(
        **WIDTH,
        max_position_embeddings=24,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        **k,
    ),
    # Asserts values, and masks in place.
    "xlm": lambda **k: XLMConfig(
        emb_dim=16, n_layers=1, n_heads=2, max_position_embeddings=24, use_lang_emb=False, **k
    ),
}
"""Functions from further fields, such as the number of labels, to a config."""


class Tiny(NamedTuple):
    """A model with random weights, changes to them, and a batch."""

    model: PreTrainedModel
    parameters: dict[str, torch.Tensor]
    deltas: dict[str, torch.Tensor]
    inputs: dict[str, np.ndarray]

    def merged(self, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: value
            if name not in scales
            else value + torch.tensordot(scales[name], self.deltas[name], 1)
            for name, value in self.parameters.items()
        }

    def run(self, parameters: Mapping[str, torch.Tensor], **options: Any) -> Any:
        inputs = {
            name: torch.from_numpy(array).double()
            if array.dtype == np.float32
            else torch.from_numpy(array).long()
            for name, array in self.inputs.items()
        }
        return functional_call(self.model, parameters, kwargs={**inputs, **options})


def tiny(name: str) -> Tiny:
    """Makes a classifier of three classes and two experts of it, in float64."""
    generator = np.random.default_rng(0)
    if name == "resnet":
        config = ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
        model = AutoModelForImageClassification.from_config(config)
        inputs = {"pixel_values": generator.normal(size=(3, 3, 32, 32)).astype(np.float32)}
    else:
        config = TEXT_CONFIGS[name](vocab_size=40, num_labels=3)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
        mask = np.ones((3, 9), np.int32)
        mask[1, 7:] = 0
        inputs = {
            "input_ids": generator.integers(5, 40, (3, 9), dtype=np.int32),
            "attention_mask": mask,
        }
    model = randomise(model).double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    body = f"{model.base_model_prefix}."
    deltas = {
        n: torch.from_numpy(0.1 * generator.normal(size=(2, *p.shape)).astype(np.float32)).double()
        for n, p in parameters.items()
        if n.startswith(body)
    }
    return Tiny(model, parameters, deltas, inputs)


def tiny_language_model(name: str) -> tuple[PreTrainedModel, dict[str, np.ndarray]]:
    """Makes a language model and a batch."""
    generator = np.random.default_rng(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24)
    elif name == "bart":
        config = BartConfig(
            vocab_size=40,
            d_model=16,
            **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
            max_position_embeddings=24,
        )
    else:
        config = Qwen3MoeConfig(
            vocab_size=40,
            **WIDTH,
            num_key_value_heads=1,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
        )
    auto_class = AutoModelForSeq2SeqLM if name == "bart" else AutoModelForCausalLM
    model = randomise(auto_class.from_config(config, attn_implementation="eager"))
    mask = np.ones((2, 9), np.int32)
    mask[1, 7:] = 0
    token_ids = generator.integers(0, 40, (2, 9), dtype=np.int32)
    inputs = {"input_ids": token_ids, "attention_mask": mask}
    if name == "bart":
        inputs |= {"decoder_input_ids": token_ids[:, ::-1], "decoder_attention_mask": mask}
    return model, inputs


def gradient(
    function: Callable[[dict[str, torch.Tensor]], torch.Tensor], scales: dict[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """Returns the gradient of a PyTorch function with respect to each entry."""
    leaves = {name: scale.clone().requires_grad_() for name, scale in scales.items()}
    function(leaves).backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


class Square(torch.autograd.Function):
    """The square of x, with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient
