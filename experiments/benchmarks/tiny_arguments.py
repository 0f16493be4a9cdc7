"""Random values for arguments of a model's forward that few architectures have.

Parts of larger models read another part's output under names of their own, and some models read
more than texts and images. A rule is a function of the config; it returns the values to try.
"""

from __future__ import annotations

import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from config_fields import first_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROWS, TOKENS, SIDE = 2, 8, 4
"""Examples, tokens, and the rows and columns of a map of features."""

_BINS = (
    *("num_mel_bins", "feature_size", "feature_projection_input_dim", "input_feat_per_channel"),
    *("n_mels", "input_dim", "mel_bins"),
)
"""Names of the number of a spectrogram's bands."""

Rule = Callable[[Any], Sequence[Any]]


def argument_values(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Yields values for the required arguments of a forward, then for all that have a rule.

    Nothing is yielded for a forward with a required argument that has no rule, or whose arguments
    are all common ones.
    """
    signature = inspect.signature(model.forward).parameters
    required = required_arguments(model)
    known = [name for name in signature if name in _RULES]
    rules = _COMMON | _RULES
    is_usual = not known and "pixel_values" not in required
    if is_usual or any(name not in rules for name in required):
        return
    beside = [name for name in ("input_ids", "attention_mask") if name in signature]
    further = [name for name in known if name not in required]
    all_known = required + further
    images = ["pixel_values"] if "pixel_values" in signature else []
    states = ["inputs_embeds"] if "inputs_embeds" in signature else []
    choices = [required, all_known, all_known + images, all_known + beside]
    choices += [all_known + beside[:1], all_known + beside + images, all_known + states]
    choices = [dict.fromkeys(choice) for choice in choices]
    for names in dict.fromkeys(map(tuple, choices)):
        options = [rules[name](model.config) for name in names]
        for values in itertools.islice(itertools.product(*options), 64):
            yield dict(zip(names, values, strict=True))


def required_arguments(model: PreTrainedModel) -> list[str]:
    """Returns the names of a forward's arguments that have no default."""
    return [
        name
        for name, argument in inspect.signature(model.forward).parameters.items()
        if argument.default is argument.empty
        and argument.kind not in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL)
    ]


def _normal(*shape: int) -> torch.Tensor:
    import torch

    seed = zlib.crc32(repr(shape).encode())
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(*shape: int, below: int = 64) -> torch.Tensor:
    import torch

    seed = zlib.crc32(repr(shape).encode())
    return torch.randint(3, below, shape, generator=torch.Generator().manual_seed(seed))


def _ones(*shape: int) -> torch.Tensor:
    import torch

    return torch.ones(*shape, dtype=torch.long)


def _width(config: Any, *names: str) -> int:
    """Returns the width of states, by fields that come before the usual ones."""
    value = first_of(config, *names, "hidden_size", "d_model", "embed_dim", "dim")
    return value if isinstance(value, int) else 32


def _images(config: Any, *leading: int) -> torch.Tensor:
    size = first_of(config, "pretrain_image_size", "image_size", "crop_size", "max_img_size") or 64
    height, width = [size, size] if isinstance(size, int) else list(size)[-2:]
    channels = first_of(config, "num_channels", "in_channels") or 3
    return _normal(*(leading or (ROWS,)), channels, height, width)


def _patches(config: Any) -> list[torch.Tensor]:
    """Returns the patches of images with a grid of 4 x 4 each, in the layouts that there are."""
    side = first_of(config, "patch_size")
    if not isinstance(side, int):
        return []
    channels = first_of(config, "num_channels", "in_channels") or 3
    frames = first_of(config, "temporal_patch_size", "patch_temporal") or 1
    merged = first_of(config, "spatial_merge_size") or 1
    count = ROWS * SIDE * SIDE
    return [
        _normal(count, channels * frames * side * side),
        _normal(count, channels * side * side),
        _normal(count, channels, side, side),
        _normal(1, count, channels, side, side),
        _normal(1, channels, side, side * count),
        _normal(ROWS, SIDE * SIDE, channels * frames * side * side),
        _normal(ROWS, SIDE * SIDE, channels * side * side),
        _normal(count, frames, side, side, channels),
        _normal(count, merged * side, merged * side, channels),
    ]


def _states(*names: str) -> Rule:
    """Returns the rule of states, `[rows, tokens, width]`."""
    return lambda config: [_normal(ROWS, TOKENS, _width(config, *names))]


def _map(*names: str) -> Rule:
    """Returns the rule of a map of features, `[rows, width, side, side]`."""
    return lambda config: [_normal(ROWS, _width(config, *names), SIDE, SIDE)]


def _pyramid(config: Any) -> list[list[torch.Tensor]]:
    """Returns maps of features from the finest to the coarsest, and a single one."""
    width = _width(config)
    sides = (4 * SIDE, 2 * SIDE, SIDE)
    return [[_normal(ROWS, width, s, s) for s in sides], [_normal(ROWS, width, SIDE, SIDE)]]


def _image_places(config: Any) -> list[torch.Tensor]:
    """Returns the places of an image's states among the tokens: the first ones but one."""
    import torch

    places = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    places[:, 1 : 1 + (first_of(config, "latent_query_num") or 4)] = 1
    return [places]


def _patch_ids(config: Any) -> list[torch.Tensor]:
    """Returns the patch of each byte: SIDE patches of the same length."""
    import torch

    return [(torch.arange(TOKENS) * SIDE // TOKENS).expand(ROWS, TOKENS).clone()]


def _sizes(*row: int) -> Rule:
    """Returns the rule of sizes, a row for each image or sound."""

    def rule(config: Any) -> list[torch.Tensor]:
        import torch

        return [torch.tensor([row if len(row) > 1 else row[0]] * ROWS)]

    return rule


def _positions(config: Any) -> list[torch.Tensor]:
    """Returns the column and the row of each patch, `[rows, patches, 2]`."""
    import torch

    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    return [places.expand(ROWS, SIDE * SIDE, 2).clone()]


SIZES = frozenset(
    (
        *("grid_thw", "image_grid_thw", "target_sizes", "merge_sizes", "image_sizes"),
        *("spatial_shapes", "classes_structure", "num_patches", "pixel_mask"),
        *("pooled_patches_idx", "pixel_position_ids", "patch_ids"),
    )
)
"""Arguments that models read on the host: sizes, which are known as a function is compiled."""

_COMMON: dict[str, Rule] = {
    "attention_mask": lambda config: [_ones(ROWS, TOKENS)],
    "input_ids": lambda config: [_ids(ROWS, TOKENS)],
    "pixel_values": lambda config: [
        _images(config),
        _images(config, ROWS, 1),
        _images(config, ROWS, 2),
        _images(config, ROWS, 1, first_of(config, "max_num_tiles") or 4),
        *_patches(config),
    ],
    "input_features": lambda config: [
        value
        for bins in (first_of(config, *_BINS) or 80,)
        for value in (_normal(ROWS, 64, bins), _normal(ROWS, bins, 64), _normal(ROWS, 64, 2 * bins))
    ],
    "inputs_embeds": _states(),
}
"""Rules of arguments that many forwards have; they are given beside others alone."""

_RULES: dict[str, Rule] = {
    # Decisions and actions.
    "states": lambda config: [_normal(ROWS, TOKENS, config.state_dim)],
    "actions": lambda config: [
        _normal(ROWS, TOKENS, config.act_dim)
        if hasattr(config, "act_dim")
        else _normal(ROWS, config.chunk_size, config.max_action_dim)
    ],
    "rewards": lambda config: [_normal(ROWS, TOKENS, 1)],
    "returns_to_go": lambda config: [_normal(ROWS, TOKENS, 1)],
    "timesteps": lambda config: [_ids(ROWS, TOKENS)],
    # Sounds.
    "spectrogram": lambda config: [
        _normal(ROWS, 16, first_of(config, "model_in_dim", "num_mel_bins") or 80)
    ],
    "audio_input_ids": lambda config: [_ids(ROWS, TOKENS, config.n_mel_bins)],
    "input_features_mask": lambda config: [_ones(ROWS, 64)],
    "chunk_sample_lengths": lambda config: [_sizes(64 * config.hop_length)(config)[0]],
    # Sizes, which models read on the host.
    "grid_thw": _sizes(1, SIDE, SIDE),
    "image_grid_thw": _sizes(1, SIDE, SIDE),
    "target_sizes": _sizes(SIDE, SIDE),
    "merge_sizes": _sizes(1),
    "image_sizes": _sizes(64, 64),
    "num_patches": lambda config: [SIDE],
    "aspect_ratio_ids": lambda config: [_ones(ROWS, 1)],
    "aspect_ratio_mask": lambda config: [_ones(ROWS, 1, config.max_num_tiles)],
    "pixel_position_ids": _positions,
    # Maps and states of images.
    "image": lambda config: [_images(config)],
    "prompt_pixel_values": lambda config: [_images(config)],
    "prompt_masks": lambda config: [_images(config)],
    "task_inputs": lambda config: [_normal(ROWS, config.task_seq_len)],
    "pixel_attention_mask": lambda config: [_ones(ROWS, 1).bool()],
    "noise": lambda config: [
        _normal(ROWS, (config.image_size // config.patch_size) ** 2)
        if hasattr(config, "mask_ratio")
        else _normal(ROWS, config.chunk_size, config.max_action_dim)
    ],
    "state": lambda config: [_normal(ROWS, config.max_state_dim)],
    "timestep": lambda config: [_normal(ROWS).sigmoid()],
    "image_attention_mask": lambda config: [_ones(ROWS, TOKENS, 1)],
    "image_embeds_position_mask": _image_places,
    "vision_pos_encoding": _states(),
    "hidden_states": lambda config: [
        *_states()(config),
        _images(config),
        *_patches(config)[:2],
        *_map("latent_channels")(config),
    ],
    "patch_embeds": lambda config: [
        *_map()(config),
        *(_normal(ROWS, SIDE, width) for width in (_width(config), 2 * _width(config))),
        _normal(ROWS, SIDE, getattr(config, "hidden_size_global", 32)),
    ],
    "patch_ids": _patch_ids,
    "context": _states(),
    "context_input_ids": lambda config: [_ids(ROWS * config.n_docs, TOKENS)],
    "context_attention_mask": lambda config: [_ones(ROWS * config.n_docs, TOKENS)],
    "doc_scores": lambda config: [_normal(ROWS, config.n_docs)],
    "image_features": lambda config: [
        _normal(ROWS, TOKENS, _width(config) * layers)
        for layers in (len(first_of(config, "vision_feature_layer") or [0]),)
    ],
    "pooled_patches_idx": lambda config: [_ids(ROWS * SIDE, 4, below=ROWS * TOKENS)],
    "vision_features": lambda config: [*_pyramid(config), *_states()(config)],
    "vision_pos_embeds": _pyramid,
    "backbone_features": _pyramid,
    "text_features": _states(),
    "decoder_queries": _states(),
    "visual_feats": lambda config: [_normal(ROWS, TOKENS, config.visual_feat_dim)],
    "visual_pos": lambda config: [_normal(ROWS, TOKENS, config.visual_pos_dim)],
    # States that another part gives.
    "query_embeds": _states(),
    "encoder_hidden_states": lambda config: [
        _normal(ROWS, tokens, _width(config, "encoder_hidden_size", "cross_hidden_size"))
        for tokens in (TOKENS, SIDE * SIDE)
    ],
    "noise_embeds": _states(),
    # The names of classes to look for, and a task's words.
    "classes_input_ids": lambda config: [_ids(ROWS * 2, TOKENS)],
    "classes_attention_mask": lambda config: [_ones(ROWS * 2, TOKENS)],
    "tasks_input_ids": lambda config: [_ids(ROWS, TOKENS)],
    "tasks_attention_mask": lambda config: [_ones(ROWS, TOKENS)],
    "classes_structure": _sizes(2),
    "context_hidden_states": lambda config: [
        _normal(ROWS, TOKENS, _width(config) * len(first_of(config, "target_layer_ids") or [0]))
    ],
}
