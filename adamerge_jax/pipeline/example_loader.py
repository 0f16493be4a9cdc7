"""The loader of examples, with the tokenizer, the processor and the limits of the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.checkpoints.peft import Expert
from adamerge_jax.data.end_of_text import PredictsEnd
from adamerge_jax.data.examples import Examples
from adamerge_jax.data.image_processors import PROCESSOR_FILE, load_image_processor
from adamerge_jax.data.images import ImageProcessor
from adamerge_jax.data.processors import Processor, has_processor, load_processor
from adamerge_jax.data.prompts import Prompts
from adamerge_jax.data.sources import load_examples, load_prompts
from adamerge_jax.data.token_limits import TokenLimits
from adamerge_jax.data.tokenizers import find_tokenizer, longest_text
from adamerge_jax.errors import InputError, in_hand
from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.models.family import Family
from adamerge_jax.models.inputs import ImageGeometry, stated_image_shape
from adamerge_jax.models.problem import CLASSES, Problem
from adamerge_jax.pipeline.models import Models
from adamerge_jax.recipes.schema import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class ExampleLoader:
    """Loads inputs: `(source, name in messages, problem, outputs, predicts_end) -> examples`.

    Without `predicts_end`, the end of text of a source that says `auto` is to be predicted.

    Attributes:
        family: The architecture of the models.
        root: Folder that relative paths start from.
        preprocessor: The tokenizer or image processor; None if no model brings one.
        max_length: Longest text in tokens.
        limits: The limits of token ids; None for images.
        decoder_start: The token that an encoder-decoder's responses start with.
        seed: The seed that draws the examples of a source with a limit.
        processor: The processor of a language model that reads images.
    """

    family: Family
    root: Path
    preprocessor: PreTrainedTokenizerBase | ImageProcessor | None
    max_length: int
    limits: TokenLimits | None
    decoder_start: int | None
    seed: int
    processor: Processor | None = None

    def __call__(
        self,
        source: DataSource,
        name: str,
        problem: Problem = CLASSES,
        outputs: int = 0,
        predicts_end: PredictsEnd = lambda examples: True,
    ) -> Examples:
        """Loads the examples of a source."""
        with in_hand(source.path):
            return load_examples(
                source,
                root=self.root,
                inputs=self.family.inputs,
                preprocessor=self.preprocessor,
                max_length=self.max_length,
                seed=self.seed,
                name=name,
                limits=self.limits,
                language=self.family.language,
                decoder_start=self.decoder_start,
                predicts_end=predicts_end,
                embeds=self.family.embeds,
                processor=self.processor,
                problem=problem,
                outputs=outputs,
            )

    def prompts(self, source: DataSource, name: str, *, is_chat: bool) -> Prompts | None:
        """Loads the prompts of a source without answers; None if it holds something else."""
        with in_hand(source.path):
            return load_prompts(
                source,
                root=self.root,
                tokenizer=self.preprocessor,
                is_chat=is_chat,
                max_length=self.max_length,
                name=name,
                limits=self.limits,
            )


def example_loader(
    models: Models,
    root: Path,
    *,
    tokenizer: str | None,
    max_length: int,
    seed: int,
    image_size: int | tuple[int, int] | None = None,
) -> ExampleLoader:
    """Returns the loader of model inputs.

    Args:
        models: The base and its experts, with a tokenizer or an image processor.
        root: Folder that relative paths start from.
        tokenizer: `base` or the task whose tokenizer the merge takes; None for the first.
        max_length: Longest text in tokens.
        seed: The seed that draws the examples of a source with a limit.
        image_size: Height and width to which images in conversations are resized.

    Raises:
        InputError: The tokenizer of `tokenizer` is missing, or those of the experts differ.
    """
    preprocessor = _load_preprocessor(models, tokenizer)
    shortest, limits = max_length, None
    if models.family.inputs[0] == "input_ids":
        longest = models.family.max_tokens(models.config)
        config = models.config.get_text_config()
        types = getattr(config, "type_vocab_size", None) or None  # a DeBERTa has 0
        limits = TokenLimits(config.vocab_size, longest, types)
        lengths = [max_length, longest, preprocessor and longest_text(preprocessor)]
        if models.family.embeds is not None:
            lengths.append(models.family.embeds.max_tokens)
        shortest = min(length for length in lengths if length is not None)
    decoder_start = _read_decoder_start(models) if models.config.is_encoder_decoder else None
    return ExampleLoader(
        models.family,
        root,
        preprocessor,
        shortest,
        limits,
        decoder_start,
        seed,
        _load_processor(models, preprocessor, image_size),
    )


def _load_preprocessor(
    models: Models, chosen: str | None
) -> PreTrainedTokenizerBase | ImageProcessor | None:
    """Loads the tokenizer or image processor of the base, or of the first expert that has one."""
    if models.family.inputs[0] == "input_ids":
        return find_tokenizer(models.by_name, chosen)
    model = _with_processor(models)
    if model is None:
        return None
    return load_image_processor(
        model.checkpoint.folder,
        f"{model.role} ({model.checkpoint.source})",
        _image_shape(models.family, model.checkpoint),
    )


def image_shape(models: Models) -> tuple[int, int, int]:
    """Returns channels, height and width of the images that the models read.

    Raises:
        InputError: The config states no size, and no image processor does.
    """
    return _image_shape(models.family, (_with_processor(models) or models.base).checkpoint)


def _with_processor(models: Models) -> Expert | None:
    """Returns the base or the first expert that has an image processor; None if none has."""
    for model in (models.base, *models.experts.values()):
        if (model.checkpoint.folder / PROCESSOR_FILE).is_file():
            return model
    return None


def _image_shape(family: Family, checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Returns channels, height and width of the images that a model reads.

    A model without an image_size, such as a ResNet, reads images as its processor makes them, and
    so does one that reads any size.
    """
    config = checkpoint.config
    if not family.bridged:
        image = ImageGeometry.of(getattr(config, "vision_config", config))
        made = _made_size(checkpoint) if family.reads_any_size else None
        return image.channels, *(made or (image.height, image.width))
    if (shape := stated_image_shape(config)) is not None:
        return shape
    made = _made_size(checkpoint)
    if made is None:
        raise InputError(
            f"{checkpoint.source}: neither image_size in its config.json nor size in its "
            f"{PROCESSOR_FILE} is the height and width of its images; add image_size"
        )
    vision = getattr(config, "vision_config", config)
    return getattr(vision, "num_channels", 3), *made


def _made_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Returns height and width of the images that a processor makes; None if it states none."""
    fields = read_object_if_there(checkpoint.folder / PROCESSOR_FILE)
    size = (fields.get("do_center_crop") and fields.get("crop_size")) or fields.get("size")
    if isinstance(size, Mapping):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        return height, width
    return None


def _read_decoder_start(models: Models) -> int:
    """Reads the token that an encoder-decoder's responses start with."""
    start = getattr(models.config, "decoder_start_token_id", None)
    file = models.base.checkpoint.folder / "generation_config.json"
    if start is None:
        start = read_object_if_there(file).get("decoder_start_token_id")
    if not isinstance(start, int):
        raise InputError(
            f"base ({models.base.checkpoint.source}): decoder_start_token_id is neither in its "
            "config.json nor in its generation_config.json; add it (T5 has that of its padding, 0)"
        )
    return start


def _load_processor(
    models: Models, tokenizer: PreTrainedTokenizerBase | None, size: int | tuple[int, int] | None
) -> Processor | None:
    """Loads the processor of a language model that reads images: the first that there is."""
    if models.family.images is None or tokenizer is None:
        return None
    sides = (size, size) if isinstance(size, int) else size
    for model in models.by_name.values():
        if has_processor(model.checkpoint.folder):
            images = models.family.images
            return load_processor(model.checkpoint, model.role, tokenizer, images, sides)
    raise InputError(
        f"base ({models.base.checkpoint.source}): neither it nor an expert comes with a processor "
        "of images (preprocessor_config.json); save one with processor.save_pretrained(folder)"
    )
