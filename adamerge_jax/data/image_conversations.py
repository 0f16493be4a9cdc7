"""Conversations with images: their files, their tokens, and the arrays of both in a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

from adamerge_jax.data.answers import Answers, find_answers
from adamerge_jax.data.array_cache import ArrayCache
from adamerge_jax.data.conversations import Tokens, mark_responses, require_offsets
from adamerge_jax.data.decoder_examples import DecoderExamples
from adamerge_jax.data.examples import Examples, padded
from adamerge_jax.data.image_files import ImageFile, ImageFiles
from adamerge_jax.data.images import IMAGE_CACHE_BYTES
from adamerge_jax.data.processors import Processor, ReadText
from adamerge_jax.data.tables import Table
from adamerge_jax.errors import InputError, in_one_line
from adamerge_jax.models.images_in_text import COUNT, PIXELS, SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PATHS = ("image", "path")
"""Fields of an image in a message that name its file."""


class ConversationImages:
    """The images of a table's conversations, read with their texts and kept while there is room.

    Attributes:
        counts: The number of each conversation's images, as arrays.
    """

    def __init__(self, processor: Processor):
        """Takes the processor; `read` adds rows."""
        self._processor = processor
        self.counts: list[int] = []
        self._rows: list[tuple[str, ImageFiles, str]] = []
        self._last: list[int] = []
        self._cache = ArrayCache(IMAGE_CACHE_BYTES)

    def read(self, table: Table, folder: Path | None, *, with_end: bool) -> list[Tokens]:
        """Reads the conversations of a table as tokens, of which responses are predicted.

        Args:
            table: The table; its column `source.messages` holds the conversations.
            folder: The folder in which the images are; None where there is none.
            with_end: True to predict what the template puts behind a response, too.

        Raises:
            InputError: A row is no conversation, an image is missing, elsewhere or damaged, or the
                template or the processor does not fit.
        """
        tokenizer = self._processor.tokenizer
        require_offsets(tokenizer, table.name)
        sequences = []
        for number, messages in zip(
            table.rows.numbers, table.rows[table.source.messages], strict=True
        ):
            where = f"{table.name}: {table.source.path}, row {number}"
            in_parts, images = _images_of(messages, where, folder)
            marked = mark_responses(in_parts, where, table.source, tokenizer, with_end=with_end)
            row = len(self._rows)
            self._rows.append((marked.text, ImageFiles(images, where), where))
            ids, offsets, arrays = self._read(row)
            self.counts.append(0 if arrays is None else len(arrays))
            if arrays is not None:
                self._cache.keep(row, arrays)
            is_image = [token == self._processor.model.token for token in ids]
            self._last.append(max((at for at, piece in enumerate(is_image) if piece), default=-1))
            tokens = marked.tokens(ids, offsets)
            predicted = [
                counts and not piece
                for counts, piece in zip(tokens.predicted, is_image, strict=True)
            ]
            sequences.append(tokens._replace(predicted=predicted))
        return sequences

    def is_whole(self, row: int, length: int) -> bool:
        """Returns True if no image is cut off where a conversation is cut to so many tokens."""
        # Texts without images may have been joined and cut, so that they are no rows.
        return not any(self.counts) or self._last[row] < length

    def arrays(self, row: int) -> Shaped[np.ndarray, "images ..."] | None:
        """Returns the arrays of a conversation's images; None if it has none."""
        if not self.counts[row]:
            return None
        arrays = self._cache.get(row)
        if arrays is None:
            arrays = self._read(row).images
            self._cache.keep(row, arrays)
        return arrays

    def beside(self, tokens: DecoderExamples, rows: Sequence[int]) -> Examples:
        """Returns examples of chosen rows with their tokens and images."""
        return WithImages(tokens, self if any(self.counts) else None, rows, self._processor)

    def _read(self, row: int) -> ReadText:
        text, files, where = self._rows[row]
        return self._processor.read(text, [files.decode(i) for i in range(len(files))], where)


class WithImages(Examples):
    """Sequences of tokens with images among them, for a vision-language model."""

    def __init__(
        self,
        tokens: DecoderExamples,
        images: ConversationImages | None,
        rows: Sequence[int],
        processor: Processor,
    ):
        """Joins tokens and images.

        Args:
            tokens: The tokens.
            images: The images; None if there are none.
            rows: The row in `images` of each sequence of tokens.
            processor: The processor that has read them.
        """
        self._tokens = tokens
        self._images = images
        self._rows = np.asarray(rows)
        self._processor = processor
        self._positions: dict[int, Int[np.ndarray, "3 T"] | None] = {}
        self._most = 0 if images is None else max(images.counts[row] for row in rows)
        self.cut = tokens.cut

    def __len__(self) -> int:
        return len(self._tokens)

    def padded_length(self, index: Int[np.ndarray, " B"]) -> int:
        return self._tokens.padded_length(index)

    def take(self, index: Int[np.ndarray, " B"], length: int) -> dict[str, np.ndarray]:
        inputs = self._tokens.take(index, length)
        for number, ids, mask in zip(
            index, inputs["input_ids"], inputs["attention_mask"], strict=True
        ):
            if number not in self._positions:
                self._positions[number] = self._processor.model.positions(
                    ids[: mask.sum()].tolist(), self._processor.grid
                )
        positions = [self._positions[number] for number in index]
        return {**inputs, **_positions(positions, length), **self._image_arrays(index)}

    def _image_arrays(self, index: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Returns the images of chosen conversations and their numbers."""
        counts = np.zeros(len(index), np.int32)
        if self._images is None or not self._most:
            return {COUNT: counts}
        arrays = {}
        if self._processor.tiled_size is not None:
            arrays[SIZES] = np.zeros((len(index), 0, *self._processor.tiled_size), np.float32)
        pixels = np.zeros((len(index), self._most, *self._processor.shape), np.float32)
        for place, row in enumerate(self._rows[index]):
            images = self._images.arrays(row)
            if images is not None:
                pixels[place, : len(images)] = images
                counts[place] = len(images)
        return {PIXELS: pixels, COUNT: counts, **arrays}

    def find_answers(
        self,
        sequences: Sequence[Tokens],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        has_end: bool,
    ) -> Answers | None:
        """Finds the prompts and responses as `answers.find_answers`, with the prompts' images.

        Args:
            sequences: The tokens of these conversations.
            tokenizer: The tokenizer of all.
            max_length: Longest conversation in tokens.
            has_end: True if models end a response themselves.
        """
        model, grid = self._processor.model, self._processor.grid
        found = find_answers(sequences, tokenizer, max_length, has_end=has_end, image=model.token)
        if found is None:
            return None

        def beside(chosen: Int[np.ndarray, " n"], length: int) -> dict[str, np.ndarray]:
            text = int(model.token == 0)  # any token of a text stands for those to be written
            prompts = [found.prompts[at] for at in chosen]
            rows = [model.positions(ids + [text] * (length - len(ids)), grid) for ids in prompts]
            return _positions(rows, length) | self._image_arrays(found.examples[chosen])

        return dataclasses.replace(found, beside=beside)

    def take_labels(self, index: Int[np.ndarray, " B"], length: int) -> Int[np.ndarray, "B T"]:
        return self._tokens.take_labels(index, length)

    def take_ends(self, index: Int[np.ndarray, " B"], length: int) -> Bool[np.ndarray, "B T"]:
        return self._tokens.take_ends(index, length)


def _positions(
    rows: Sequence[Int[np.ndarray, "3 T"] | None], length: int
) -> dict[str, Int[np.ndarray, "B 3 T"]]:
    """Returns positions padded to a length; nothing where tokens have none of their own."""
    if rows[0] is None:
        return {}
    stacked = [padded(row, length, 0)[0] for row in rows if row is not None]
    return {"position_ids": np.stack(stacked)}


def _images_of(messages: Any, where: str, folder: Path | None) -> tuple[Any, list[ImageFile]]:
    """Returns a conversation whose contents are lists of parts, and the images in it."""
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return messages, []  # refused where it is written
    images: list[ImageFile] = []
    in_parts = []
    for message in messages:
        content = message.get("content")
        # Templates of vision-language models leave out a content that is no list of parts.
        contents = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(contents, Sequence):
            raise InputError(
                f"{where}: a message's content is {content!r:.80}; expected a text, or a list of "
                "parts"
            )
        parts: list[dict[str, Any]] = []
        for part in contents:
            fields = _part(part, where)
            if fields["type"] == "image":
                images.append(_file(fields, where, folder))
                fields = {"type": "image"}
            parts.append(fields)
        in_parts.append({**message, "content": parts})
    return in_parts, images


def _part(part: Any, where: str) -> dict[str, Any]:
    """Returns a part of a message: a text or an image."""
    fields = {}
    if isinstance(part, Mapping):
        # Tables give every part all columns.
        fields = {name: value for name, value in part.items() if value is not None}
    if fields.get("type") == "image" or (
        fields.get("type") == "text" and isinstance(fields.get("text"), str)
    ):
        return fields
    raise InputError(
        f"{where}: a part of a message is {part!r:.80}; expected "
        '{"type": "text", "text": ...} or {"type": "image", "image": "a file"}'
    )


def _file(fields: Mapping[str, Any], where: str, folder: Path | None) -> ImageFile:
    """Returns the file of an image in a message, or its contents."""
    value = next((fields[name] for name in _PATHS if name in fields), None)
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return value
    if not isinstance(value, str) or not value:
        raise InputError(
            f"{where}: an image is {dict(fields)!r:.80}; expected the name of its file, as "
            '{"type": "image", "image": "cat.png"}'
        )
    if "://" in value or value.startswith("data:"):
        raise InputError(
            f"{where}: image {value!r:.80} is no file; save it beside the table and give its name"
        )
    if folder is None:
        raise InputError(
            f"{where}: image {value!r:.80} is a file's name, and this table is in no folder of "
            "files; save the images in it"
        )
    try:
        file = (folder / value).resolve()
        is_inside, is_file = file.is_relative_to(folder.resolve()), file.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a character 0
        raise InputError(
            f"{where}: image {value!r:.80} cannot be a file's name: {in_one_line(error)}"
        ) from error
    if not is_inside:
        raise InputError(
            f"{where}: image {value!r:.80} is outside of the table's folder, {folder}; put it there"
        )
    if not is_file:
        raise InputError(f"{where}: there is no image {value!r:.80} in {folder}")
    return file
