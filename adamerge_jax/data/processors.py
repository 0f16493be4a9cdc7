"""The processor of a vision-language checkpoint: it reads texts with images in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from adamerge_jax.checkpoints.huggingface import Checkpoint
from adamerge_jax.data.image_processors import PROCESSOR_FILE, require_fields
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.files.json_object import read_object_if_there
from adamerge_jax.models.images_in_text import PIXELS, Grid, ImagesInText

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

WHOLE_FILE = "processor_config.json"
"""The file of a whole processor, in which newer versions of `transformers` keep its parts."""

TEMPLATE_FILE = "chat_template.json"
"""The file of a processor's chat template."""

_LARGEST_NUMBER = 2**16
"""The largest number in a processor's file, such as that of an image's tokens."""

_MOST_PIECES = 256
"""Pieces of an image at most: models are made for 4 to 40."""

_TOKENS_OF_PIECE = 256
"""Tokens that count as a piece, of an image that is not cut into any."""

_SIDE_OF_TILE = 336
"""Pixels of a tile's side where an image processor does not say it."""

_AREA_SIGNS = ("merge_size", "min_pixels", "max_pixels")
"""Fields of image processors whose sizes are numbers of pixels in an image."""


class ReadText(NamedTuple):
    """A text with images as tokens and arrays.

    Attributes:
        ids: Its tokens.
        offsets: The beginning and end of each in the text, which are the same for what stands for
            images.
        images: The arrays of its images, `[images, ...]`, as in `models/images_in_text.py`; None
            without images.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    images: Shaped[np.ndarray, "images ..."] | None


class Processor:
    """The processor of a model, and the images that all texts of a run have.

    Attributes:
        tokenizer: The tokenizer.
        model: The part of the model that knows where its images are.
        shape: The shape of every image's array; empty before the first.
        tiled_size: The height and width of every image before it is cut into tiles; None if images
            are not cut.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        tokenizer: PreTrainedTokenizerBase,
        model: ImagesInText,
        size: tuple[int, int] | None,
    ):
        """Keeps what reads texts and images.

        Args:
            processor: The processor.
            tokenizer: Its tokenizer.
            model: The part of the model that knows where its images are.
            size: Height and width to which images are resized first; None to leave them.
        """
        self.tokenizer = tokenizer
        self.model = model
        self._processor = processor
        self._size = size
        self.shape: tuple[int, ...] = ()
        self.tiled_size: tuple[int, int] | None = None

    @property
    def grid(self) -> Grid | None:
        """The grid of every image's patches; None without images or without grids."""
        if len(self.shape) != 4 or self.tiled_size is not None:
            return None
        frames, rows, columns, _ = self.shape
        return frames, rows, columns

    def read(self, text: str, images: Sequence[Image], where: str) -> ReadText:
        """Reads a text as the chat template has written it.

        Args:
            text: The text, with what stands for an image once for each.
            images: The images.
            where: Its place in error messages.

        Raises:
            InputError: There are more or fewer places than images, the processor fails, or images
                come out in another shape than those before.
        """
        self._require_places(text, len(images), where)
        resized = [self._resized(image) for image in images]
        begins = self.tokenizer.bos_token
        try:
            outputs = self._processor(
                text=[text],
                images=[resized] if resized else None,
                # As `transformers` does it: some templates write the beginning, others do not.
                add_special_tokens=not (begins and text.startswith(begins)),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_tensors=None,
            )
            ids, offsets = list(outputs["input_ids"][0]), outputs["offset_mapping"][0]
            # Some leave it out of texts without images.
            replaced = outputs.get("text_replacement_offsets") or [()]
            arrays, tiled_size = _arrays(outputs) if resized else (None, None)
        # The processors' own checks raise errors of many types.
        except Exception as error:
            raise InputError(
                f"{where}: the model's processor ({_name(self._processor)}) fails: "
                f"{in_one_line(error)}"
            ) from error
        self._require_shape(arrays, tiled_size, where)
        return ReadText(ids, _before(offsets, replaced[0]), arrays)

    def _resized(self, image: Image) -> Image:
        image = image.convert("RGB")
        if self._size is None:
            return image
        from PIL.Image import Resampling

        return image.resize(self._size[::-1], Resampling.BICUBIC)

    def _require_places(self, text: str, images: int, where: str) -> None:
        place = getattr(self._processor, "image_token", None)
        places = text.count(place) if place else images
        if places != images:
            raise InputError(
                f"{where}: the chat template writes {places} time(s) {place!r}, and the "
                f"conversation has {images} image(s); give the template's processor the images "
                f"that the text names, and no {place!r} within a text"
            )

    def _require_shape(
        self, images: np.ndarray | None, tiled_size: tuple[int, int] | None, where: str
    ) -> None:
        if images is None:
            return
        if not self.shape:
            self.shape, self.tiled_size = images.shape[1:], tiled_size
        if (images.shape[1:], tiled_size) != (self.shape, self.tiled_size):
            cut = f" of images of {tiled_size} pixels" if tiled_size else ""
            cut_before = f" of {self.tiled_size} pixels" if self.tiled_size else ""
            raise InputError(
                f"{where}: its images become arrays of shape {images.shape[1:]}{cut}, those before "
                f"{self.shape}{cut_before}; all images of a run must become one: set image_size in "
                "the recipe, to which images are resized first"
            )


def load_processor(
    checkpoint: Checkpoint,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    model: ImagesInText,
    size: tuple[int, int] | None,
) -> Processor:
    """Loads the processor of a checkpoint; its code is that of `transformers`, never its own.

    Args:
        checkpoint: The checkpoint.
        role: Its role, for messages.
        tokenizer: The merge's tokenizer.
        model: The part of the model that knows where its images are.
        size: Height and width to which images are resized first; None to leave them.

    Raises:
        InputError: It is missing, impossible, or of no class of `transformers`.
    """
    where = f"{role} ({checkpoint.source})"
    folder = checkpoint.folder
    whole = read_object_if_there(folder / WHOLE_FILE)
    of_images = read_object_if_there(folder / PROCESSOR_FILE)
    vision = getattr(checkpoint.config, "vision_config", checkpoint.config)
    channels = getattr(vision, "in_channels", getattr(vision, "num_channels", 3))
    for name, fields in {
        PROCESSOR_FILE: of_images,
        f"image_processor in {WHOLE_FILE}": whole.get("image_processor", {}),
    }.items():
        try:
            by_area = isinstance(fields, Mapping) and any(sign in fields for sign in _AREA_SIGNS)
            require_fields(fields, channels, by_area=by_area)
            _require_few_pieces(fields)
        except InputError as error:
            raise InputError(f"{where}: its {name}: {error}") from error
    for name, value in whole.items():
        if isinstance(value, int | float) and not 0 <= value <= _LARGEST_NUMBER:
            raise InputError(
                f"{where}: its {WHOLE_FILE}: {name} is {value!r:.80}; expected a number from 0 to "
                f"{_LARGEST_NUMBER}"
            )
    if tokenizer.chat_template is None:
        # Older versions of `transformers` keep the template of a processor in a file of its own.
        template = read_object_if_there(folder / TEMPLATE_FILE).get("chat_template")
        tokenizer.chat_template = template if isinstance(template, str) else None
    class_names = [fields.get("processor_class") for fields in (of_images, whole)]
    try:
        kind = _class_of(class_names, checkpoint.config.model_type, where)
        processor = _make(kind, folder, whole, tokenizer)
    except InputError:
        raise
    except ImportError as error:  # a library that only some processors need
        raise InputError(
            f"{where}: its processor cannot be loaded: {in_one_line(error)}"
        ) from error
    except Exception as error:  # of many types
        raise InputError(
            f"{where}: its processor ({PROCESSOR_FILE}, {WHOLE_FILE}) cannot be read: "
            f"{in_one_line(error)}; save it again with processor.save_pretrained(folder)"
        ) from error
    return Processor(processor, tokenizer, model, size)


def _require_few_pieces(fields: Mapping[str, Any]) -> None:
    """Refuses an image processor that cuts an image into more pieces than a memory holds."""
    size, piece = fields.get("size"), fields.get("max_image_size")
    longest = size.get("longest_edge") if isinstance(size, Mapping) else None
    pieces: dict[str, float] = {
        name: fields[name]
        for name in ("max_patches", "pan_and_scan_max_num_crops")
        if isinstance(fields.get(name), int)
    }
    if isinstance(piece, Mapping) and longest is not None:
        side = piece.get("longest_edge")
        if not isinstance(side, int) or side < 1:
            raise InputError(f"max_image_size.longest_edge is {side!r:.80}; expected pixels")
        pieces["size / max_image_size"] = (longest / side) ** 2
    if isinstance(tokens := fields.get("max_soft_tokens"), int):
        side = fields.get("patch_size", 16) * fields.get("pooling_kernel_size", 3)
        pieces["max_soft_tokens"] = tokens * side**2 / _SIDE_OF_TILE**2
    if (pinpoints := fields.get("image_grid_pinpoints")) is not None:
        pieces["image_grid_pinpoints"] = _most_tiles(pinpoints, size)
    patch, merged = fields.get("patch_size", 14), fields.get("merge_size")
    if isinstance(patch, int) and isinstance(merged, int):
        side = patch * merged
        most = max(filter(None, (longest, fields.get("min_pixels"), fields.get("max_pixels"), 1)))
        # Each is one token.
        pieces["size / (patch_size * merge_size)**2"] = most / side**2 / _TOKENS_OF_PIECE
    for name, count in pieces.items():
        if count > _MOST_PIECES:
            raise InputError(
                f"{name} makes {count:.0f} pieces of an image; expected at most {_MOST_PIECES}"
            )


def _most_tiles(pinpoints: Any, size: Any) -> float:
    """Returns the largest number of tiles that an image is cut into.

    Args:
        pinpoints: The heights and widths, in pixels, of which an image takes the one that fits.
        size: The field `size` of the image processor, which tells the side of a tile.

    Raises:
        InputError: They are no sizes.
    """
    sides = [value for value in size.values() if value] if isinstance(size, Mapping) else []
    side = sides[0] if sides else _SIDE_OF_TILE
    try:
        areas = [height * width for height, width in pinpoints]
        return max(areas) / side**2
    except (TypeError, ValueError) as error:
        raise InputError(
            f"image_grid_pinpoints is {pinpoints!r:.80}; expected heights and widths"
        ) from error


def has_processor(folder: Path) -> bool:
    """Returns True if a folder has the files of a processor of images."""
    return any((folder / name).is_file() for name in (PROCESSOR_FILE, WHOLE_FILE))


def _class_of(names: Sequence[Any], model_type: str, where: str) -> type[ProcessorMixin]:
    """Returns the class of a processor: a class of `transformers`, by its name or the model's."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    names = [*names, PROCESSOR_MAPPING_NAMES.get(model_type)]
    for name in names:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, transformers.ProcessorMixin):
            return kind
    shown = ", ".join(repr(name) for name in names if name) or "none"
    raise InputError(
        f"{where}: its processor is of no class of transformers ({shown}), and code of its own is "
        "never run; save it as one of transformers"
    )


def _make(
    kind: type[ProcessorMixin],
    folder: Path,
    whole: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> ProcessorMixin:
    """Makes a processor of texts and images; what reads videos or sound is left out."""
    from transformers import AutoImageProcessor

    class OfImages(kind):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
            return type(value)

    OfImages.__name__ = kind.__name__
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, trust_remote_code=False),
        "tokenizer": tokenizer,
    }
    fields = {
        name: value
        for name, value in whole.items()
        if not isinstance(value, Mapping) and name not in ("auto_map", "chat_template")
    }
    arguments = [parts.get(name) for name in kind.get_attributes()]
    return OfImages.from_args_and_dict(arguments, fields)


def _name(processor: ProcessorMixin) -> str:
    return type(processor).__name__


def _arrays(
    outputs: Mapping[str, Any],
) -> tuple[Shaped[np.ndarray, "images ..."], tuple[int, int] | None]:
    """Returns the arrays of images that a processor has made, and the images' size if it cut them.

    Returns:
        The arrays, `[images, ...]`; the height and width of each image before it was cut into
        tiles, None if it was not.
    """
    pixels = np.asarray(outputs[PIXELS], np.float32)
    if "image_grid_thw" in outputs:
        grids = np.asarray(outputs["image_grid_thw"])
        _require_alike(grids, "grids", "patches")
        return pixels.reshape(len(grids), *grids[0], -1), None
    if "image_position_ids" in outputs:
        return _patches_in_grid(pixels, np.asarray(outputs["image_position_ids"])), None
    if "image_sizes" in outputs and pixels.ndim == 5:
        sizes = np.asarray(outputs["image_sizes"])
        _require_alike(sizes, "tiles of images", "pixels")
        height, width = sizes[0].tolist()
        return pixels, (height, width)
    # Some processors have an axis of texts in front of that of images.
    return pixels.reshape(-1, *pixels.shape[-3:]), None


def _require_alike(sizes: Int[np.ndarray, "images axes"], of: str, unit: str) -> None:
    if (sizes != sizes[0]).any():
        raise ValueError(
            f"its images become {of} of {' and '.join(map(str, sizes.tolist()))} {unit}; set "
            "image_size in the recipe, to which images are resized first"
        )


def _patches_in_grid(
    patches: Float[np.ndarray, "images most F"], places: Int[np.ndarray, "images most 2"]
) -> Float[np.ndarray, "images 1 h w F"]:
    """Returns patches `[images, 1, h, w, F]` from rows of patches with padding behind them.

    Args:
        patches: The patches of each image, row after row.
        places: The column and the row of each patch; -1 for padding.
    """
    columns, rows = (places.max(axis=1) + 1).T
    _require_alike(np.stack([rows, columns], axis=1), "grids", "patches")
    row, column = np.divmod(np.arange(rows[0] * columns[0]), columns[0])
    in_grid = places[:, : len(row)]
    if (in_grid != np.stack([column, row], axis=1)).any():
        raise ValueError("the patches of its images are not in rows, one behind the other")
    return patches[:, : len(row)].reshape(len(patches), 1, rows[0], columns[0], -1)


def _before(
    offsets: Sequence[tuple[int, int]], replaced: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int]]:
    """Returns the places of tokens in a text before pieces of it were replaced.

    Args:
        offsets: The places in the text after it.
        replaced: The pieces: their places before (`span`) and after (`new_span`).
    """
    moved = []
    for start, end in offsets:
        shift = 0
        for piece in replaced:
            (old, old_end), (new, new_end) = piece["span"], piece["new_span"]
            if start >= new_end:
                shift = old_end - new_end
            elif end > new:
                start, end, shift = old, old, 0
                break
        moved.append((start + shift, end + shift))
    return moved
