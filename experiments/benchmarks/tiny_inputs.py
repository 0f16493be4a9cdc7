"""Random inputs that a tiny model can read, by the names of its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from config_fields import first_of, parts_of
from tiny_arguments import argument_values, required_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Inputs = dict[str, Any]
"""Values by the names of arguments: tensors, lists of them, and sizes."""

ROWS, TOKENS = 2, 8


class NoInputsError(Exception):
    """A model for which no rule makes inputs that it reads, with the reason."""


def tiny_inputs(model: PreTrainedModel) -> Inputs:
    """Returns the first inputs that the model's forward reads without an error.

    Raises:
        NoInputsError: None of them can be read, with the error of the first.
    """
    import torch

    if type(model).forward is torch.nn.Module.forward and hasattr(model, "encode"):
        model.forward = model.encode  # a model without a forward of the whole
    reason = ""
    required = required_arguments(model)
    for inputs in _candidates(model):
        if missing := [name for name in required if name not in inputs]:
            reason = reason or f"no rule for {', '.join(missing)}"
            continue
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:  # whatever an architecture says of inputs that do not fit
            text = " ".join(str(error).split())[:100]
            reason = reason or f"{' + '.join(inputs)}: {type(error).__name__}: {text}"
        else:
            return inputs
    raise NoInputsError(reason or f"no rule for {model.main_input_name}")


def texts_of(model: PreTrainedModel) -> Inputs:
    """Returns texts for a model that could read more."""
    return _texts(model, inspect.signature(model.forward).parameters)


def _candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    """Yields inputs: with images before without, sounds in both layouts, texts alone at last."""
    import torch

    arguments = inspect.signature(model.forward).parameters
    texts = _texts(model, arguments)
    if "noise" in arguments:  # drawn by the model where it is not given
        yield from argument_values(model)
    if "image_grid_thw" in arguments:
        yield from _patched_images(model, arguments)
    if "image_sizes" in arguments and hasattr(model.config, "image_grid_pinpoints"):
        yield from _tiled_images(model, arguments)
    if "image_position_ids" in arguments:
        yield from _placed_patches(model, arguments)
    if "pixel_values" in arguments:
        for images in _images(model.config):
            if "input_ids" in arguments and _image_token(model.config) is not None:
                yield from _with_image_tokens(model, arguments, {"pixel_values": images})
            if "pixel_mask" in arguments and hasattr(model.config, "max_image_length"):
                # It says where images end, and the number of patches.
                mask = torch.ones(images.shape[0], *images.shape[-2:])
                yield {**texts, "pixel_values": images, "pixel_mask": mask}
            yield {**texts, "pixel_values": images}
            yield {"pixel_values": images}
    for name in ("pixel_values_videos", "input_features", "input_values", "audio_values"):
        if name in arguments:
            for sounds in _sounds(model.config, name):
                yield {**texts, name: sounds}
                yield {name: sounds}
    if texts:
        yield texts
        end = first_of(model.config, "eos_token_id")
        if isinstance(end, int) and "input_ids" in texts:
            ended = texts["input_ids"].clone()
            ended[:, -1] = end
            yield {**texts, "input_ids": ended}
    yield from _hidden_states(model, arguments)
    if "grid_thw" in arguments:
        yield from _patches_alone(model, arguments)
    if "flattened_patches" in arguments:
        yield from _flattened(model, texts)
    if "spatial_shapes" in arguments:
        yield from _shaped(model)
    yield from argument_values(model)


def _texts(model: PreTrainedModel, arguments: Any, tokens: int = TOKENS) -> Inputs:
    import torch

    generator = torch.Generator().manual_seed(0)
    largest = min(_vocabulary(model), 100)
    special = {
        value
        for part in parts_of(model.config)
        for name, value in part.to_dict().items()
        if isinstance(name, str) and name.endswith(("token_id", "token_index"))
        if isinstance(value, int)
    }
    usable = torch.tensor([n for n in range(largest) if n not in special] or [0])
    texts: Inputs = {}
    for name in ("input_ids", "decoder_input_ids", "qformer_input_ids"):
        is_decoders = name == "decoder_input_ids"
        is_read = name in arguments and (not is_decoders or _is_encoder_decoder(model))
        if is_read:
            drawn = torch.randint(len(usable), (ROWS, tokens), generator=generator)
            texts[name] = usable[drawn]
    if "input_ids" in texts and "attention_mask" in arguments:
        texts["attention_mask"] = torch.ones(ROWS, tokens, dtype=torch.long)
    if "bbox" in arguments:
        texts["bbox"] = torch.tensor([1, 2, 3, 4]).expand(ROWS, tokens, 4).clone()
    return texts


def _vocabulary(model: PreTrainedModel) -> int:
    try:
        return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError, KeyError):
        return getattr(model.config.get_text_config(), "vocab_size", 0) or 100


def _is_encoder_decoder(model: PreTrainedModel) -> bool:
    return any(getattr(part, "is_encoder_decoder", False) for part in parts_of(model.config))


_IMAGE_TOKENS = (
    *("image_token_id", "image_token_index", "media_placeholder_token_id"),
    *("video_token_id", "video_token_index"),
)


def _image_token(config: Any) -> int | None:
    token = first_of(config, *_IMAGE_TOKENS)
    return token if isinstance(token, int) else None


def _images(config: Any) -> Iterator[torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(1)
    channels = first_of(config, "num_channels", "in_channels", "in_chans", "channels") or 3
    channels = channels if isinstance(channels, int) else 3
    size = first_of(
        config, "image_size", "img_size", "input_size", "vision_image_size", "max_img_size"
    )
    sizes = [(64, 64), (32, 32), (224, 224), (256, 256)]
    if isinstance(size, int):
        sizes.insert(0, (size, size))
    elif isinstance(size, list | tuple):
        sizes.insert(0, tuple(size)[-2:])
    elif isinstance(size, dict):
        sizes.insert(0, (size.get("height", 64), size.get("width", 64)))
    frames = first_of(config, "num_frames", "frames_per_clip")
    for height, width in sizes:
        if frames is not None:
            yield torch.randn(ROWS, frames, channels, height, width, generator=generator)
        yield torch.randn(ROWS, channels, height, width, generator=generator)
        if frames is None:
            yield torch.randn(ROWS, 1, channels, height, width, generator=generator)
        else:
            yield torch.randn(ROWS * frames, channels, height, width, generator=generator)


def _with_image_tokens(
    model: PreTrainedModel, arguments: Any, images: Inputs, count: int | None = None
) -> Iterator[Inputs]:
    """Yields texts with as many image tokens as the model makes features of an image."""
    import torch

    height, width = images["pixel_values"].shape[-2:]
    features = getattr(model, "get_image_features", None)
    reads = inspect.signature(features).parameters if features is not None else {}
    size = reads.get("image_sizes")
    # A LLaVA may have a vision tower that takes none.
    is_wanted = size is not None and size.default is inspect.Parameter.empty
    if is_wanted and "image_sizes" not in images:
        images = {**images, "image_sizes": torch.tensor([[height, width]] * ROWS)}
    if count is None:
        if features is None:
            return
        try:
            with torch.no_grad():
                result = features(**{n: x for n, x in images.items() if n in reads})
        except Exception:  # the next inputs are tried
            return
        pooled = getattr(result, "pooler_output", None)
        result = getattr(result, "last_hidden_state", result) if pooled is None else pooled
        parts = list(result) if isinstance(result, list | tuple) else [result]
        count = sum(part.numel() // part.shape[-1] for part in parts) // ROWS
    if count > 2048:
        return
    texts = _texts(model, arguments, count + TOKENS)
    texts["input_ids"][:, 2 : 2 + count] = _image_token(model.config)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in arguments:
            is_image = texts["input_ids"] == _image_token(model.config)
            yield {**texts, **images, name: is_image.long()}
    yield {**texts, **images}


def _patched_images(model: PreTrainedModel, arguments: Any) -> Iterator[Inputs]:
    """Yields texts with images that are cut into patches, as in Qwen2-VL."""
    import torch

    vision = getattr(model.config, "vision_config", model.config)
    side = getattr(vision, "patch_size", None)
    merged = getattr(vision, "spatial_merge_size", 2)
    if not isinstance(side, int) or _image_token(model.config) is None:
        return
    grid = torch.tensor([[1, 2 * merged, 2 * merged]] * ROWS)
    channels = first_of(vision, "in_channels", "in_chans", "num_channels") or 3
    generator = torch.Generator().manual_seed(1)
    patches = int(grid.prod(-1).sum())
    for frames in dict.fromkeys((getattr(vision, "temporal_patch_size", 1), 1)):
        for shape in (
            (patches, channels * frames * side * side),
            *((*leading, channels, side, side) for leading in ((patches,), (1, patches))),
            (ROWS, patches // ROWS, channels * frames * side * side),
        ):
            pixels = torch.randn(*shape, generator=generator)
            images = {"pixel_values": pixels, "image_grid_thw": grid}
            yield from _with_image_tokens(model, arguments, images, count=4)


def _tiled_images(model: PreTrainedModel, arguments: Any) -> Iterator[Inputs]:
    """Yields texts with images that are cut into tiles, as in LLaVA-NeXT."""
    import torch

    side = model.config.vision_config.image_size
    size = model.config.image_grid_pinpoints[0]
    tiles = 1 + (size[0] // side) * (size[1] // side)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(ROWS, tiles, 3, side, side, generator=generator)
    images = {"pixel_values": pixels, "image_sizes": torch.tensor([size] * ROWS)}
    yield from _with_image_tokens(model, arguments, images)


def _placed_patches(model: PreTrainedModel, arguments: Any) -> Iterator[Inputs]:
    """Yields texts with patches of images and their places, as in Gemma 4."""
    import torch

    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return
    side = 2 * vision.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(ROWS, side * side, 3 * vision.patch_size**2, generator=generator)
    images = {"pixel_values": pixels, "image_position_ids": places.expand(ROWS, -1, 2)}
    yield from _with_image_tokens(model, arguments, images)


def _patches_alone(model: PreTrainedModel, arguments: Any) -> Iterator[Inputs]:
    """Yields the patches of images, which a tower of Qwen2-VL's kind reads."""
    import torch

    config = model.config
    side, frames = getattr(config, "patch_size", 14), getattr(config, "temporal_patch_size", 1)
    merged = getattr(config, "spatial_merge_size", 2)
    grid = torch.tensor([[1, 2 * merged, 2 * merged]] * ROWS)
    channels = first_of(config, "in_channels", "in_chans", "num_channels") or 3
    generator = torch.Generator().manual_seed(1)
    for name in ("hidden_states", "pixel_values"):
        for shape in ((channels * frames * side * side,), (channels, side, side)):
            if name in arguments:
                pixels = torch.randn(int(grid.prod(-1).sum()), *shape, generator=generator)
                yield {name: pixels, "grid_thw": grid}


def _flattened(model: PreTrainedModel, texts: Inputs) -> Iterator[Inputs]:
    """Yields patches with their rows and columns, as a Pix2Struct reads them."""
    import torch

    width = first_of(model.config, "patch_embed_hidden_size") or 768
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(ROWS, 16, width, generator=generator)
    places = torch.cartesian_prod(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0))
    patches = torch.cat([places.expand(ROWS, 16, 2), pixels], dim=-1)
    yield {**texts, "flattened_patches": patches}


def _shaped(model: PreTrainedModel) -> Iterator[Inputs]:
    """Yields patches of images with their numbers of rows and columns, as in SigLIP 2."""
    import torch

    side = first_of(model.config, "patch_size")
    side = side if isinstance(side, int) else 16
    generator = torch.Generator().manual_seed(1)
    yield {
        "pixel_values": torch.randn(ROWS, 16, 3 * side * side, generator=generator),
        "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
    }


def _sounds(config: Any, name: str) -> Iterator[torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(2)
    if name == "pixel_values_videos":
        frames = first_of(config, "frames_per_clip", "num_frames") or 4
        size = first_of(config, "image_size", "crop_size") or 64
        size = size if isinstance(size, int) else 64
        yield torch.randn(ROWS, frames, 3, size, size, generator=generator)
        return
    bins = first_of(
        config,
        *("num_mel_bins", "feature_size", "feature_projection_input_dim", "input_feat_per_channel"),
        *("n_mels", "input_dim", "mel_bins"),
    )
    bins = bins if isinstance(bins, int) else 80
    if name == "input_features":
        positions = first_of(config, "max_source_positions")
        lengths = [64, 128] if positions is None else [2 * positions, positions, 64]
        for length in lengths:
            yield torch.randn(ROWS, bins, length, generator=generator)
            yield torch.randn(ROWS, length, bins, generator=generator)
        yield torch.randn(ROWS, 1, 1024, bins, generator=generator)
        return
    yield torch.randn(ROWS, 4000, generator=generator)
    yield torch.randn(ROWS, 1, 4000, generator=generator)
    length = first_of(config, "max_length") or 128
    yield torch.randn(ROWS, length, bins, generator=generator)
    yield torch.randn(ROWS, 64, bins, generator=generator)


def _hidden_states(model: PreTrainedModel, arguments: Any) -> Iterator[Inputs]:
    """Yields states for a part of a model that reads another's."""
    import torch

    width = first_of(model.config, "hidden_size", "d_model", "embed_dim", "dim")
    generator = torch.Generator().manual_seed(3)
    for name in ("hidden_states", "inputs_embeds", "query_embeds"):
        if name in arguments and isinstance(width, int):
            yield {name: torch.randn(ROWS, TOKENS, width, generator=generator)}
