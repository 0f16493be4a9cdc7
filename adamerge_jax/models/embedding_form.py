"""The way from a text to its embedding, around the model itself."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

Pooling = Literal["mean", "cls", "lasttoken"]
"""The token vectors that make a text's: the mean of all, the first, or the last one."""

Similarity = Literal["cosine", "dot"]
"""The similarity of two embeddings: of their directions alone, or with their lengths."""


@dataclasses.dataclass(frozen=True)
class EmbeddingForm:
    """The way from a text to its embedding, around the model itself.

    Attributes:
        pooling: The token vectors that make the text's.
        normalised: True if embeddings are scaled to length 1.
        max_tokens: The tokens to which texts are cut; None for as many as the model reads.
        lowercase: True if texts are put in lower case first.
        prompts: Texts by name, which people put before theirs.
        default_prompt: The name of the one that is before every text; None for none.
        similarity: The similarity by which texts are compared.
    """

    pooling: Pooling
    normalised: bool
    max_tokens: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    similarity: Similarity = "cosine"

    @property
    def prompt(self) -> str:
        """The words before every text."""
        return "" if self.default_prompt is None else self.prompts[self.default_prompt]

    def as_read(self, text: str) -> str:
        """Returns a text as the tokenizer gets it."""
        text = self.prompt + text
        return text.lower() if self.lowercase else text
