"""What to train on: a built dataset, or the sizes of the built-in corpus."""

from typing import Literal

from pydantic import Field

from coterie.core.config import Config


class DataConfig(Config):
    """The dataset of a run.

    With ``path`` unset the built-in corpus is made (and cached) from what is on every machine:
    scikit-learn's digits, Python's documentation and Python's sources. The sizes below describe
    that corpus; of a dataset at ``path`` only ``sequence`` is read, and it must agree.
    """

    path: str | None = None
    """A dataset directory made by ``coterie data build``; unset: the built-in corpus."""

    corpus: Literal["digits"] = "digits"
    """The built-in corpus: captioned 8×8 digits interleaved with Python's documentation."""

    sequence: int = Field(default=256, ge=8, le=1 << 20)
    """Tokens the model sees at once (S); rows on disk hold one more."""

    documents: int = Field(default=8000, ge=2, le=10_000_000)
    """Interleaved documents to make, train and held-out together."""

    images_per_document: int = Field(default=1, ge=1, le=64)
    """Captioned images in each document."""

    passages_per_document: int = Field(default=1, ge=0, le=64)
    """Passages of text in each document."""

    passage_bytes: int = Field(default=56, ge=16, le=1 << 16)
    """The longest passage, in bytes (one byte is one token)."""

    sources: float = Field(default=0.25, ge=0, le=1)
    """The share of passages taken from Python's sources rather than its documentation."""

    held_out: float = Field(default=0.1, gt=0, lt=1)
    """The share of images, of text and of documents kept out of training."""

    seed: int = Field(default=0, ge=0)
    """Which images meet which passages, and in what order."""
