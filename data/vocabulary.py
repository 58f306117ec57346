"""One vocabulary for text and images: bytes, then grey levels, then four markers.

==================  ====================  =======
ids                 meaning               default
==================  ====================  =======
0 … 255             a byte of UTF-8       0–255
256 … 255 + levels  a grey level          256–272
256 + levels        BOI, an image begins  273
257 + levels        EOI, an image ends    274
258 + levels        EOD, a document ends  275
259 + levels        PAD                   276
==================  ====================  =======

Only the grey levels have modality ``IMAGE``. The markers are ``TEXT``: they are chosen among text
(BOI ends a caption, EOD a passage), and so an image's modality span is exactly its pixels.
"""

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import Tensor

from coterie.core.config import Config

TEXT, IMAGE = 0, 1
"""Modality ids."""
MODALITIES = ("text", "image")
"""Their names, by id."""

BYTES = 256

Tokens = npt.NDArray[np.uint16]
"""Token ids as they are stored."""


class Vocabulary(Config):
    """The ids of one dataset: written in its ``dataset.json``, compared by value."""

    levels: int = Field(default=17, ge=2, le=(1 << 16) - BYTES - 4)
    """Grey levels of an image; scikit-learn's digits have 17."""

    side: int = Field(default=8, ge=1, le=1024)
    """Pixels along each side of an image."""

    @property
    def size(self) -> int:
        """How many ids there are (V): 277 by default."""
        return BYTES + self.levels + 4

    @property
    def boi(self) -> int:
        """Begin of image."""
        return BYTES + self.levels

    @property
    def eoi(self) -> int:
        """End of image."""
        return BYTES + self.levels + 1

    @property
    def eod(self) -> int:
        """End of document; every document has it, as its last token."""
        return BYTES + self.levels + 2

    @property
    def pad(self) -> int:
        """Padding; never inside a document."""
        return BYTES + self.levels + 3

    @property
    def codes_per_image(self) -> int:
        """Grey-level tokens in one image, without its markers."""
        return self.side * self.side

    @overload
    def is_image(self, tokens: Tensor) -> Tensor: ...

    @overload
    def is_image(
        self, tokens: npt.NDArray[np.uint16] | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]: ...

    def is_image(
        self, tokens: Tensor | npt.NDArray[np.uint16] | npt.NDArray[np.int64]
    ) -> Tensor | npt.NDArray[np.bool_]:
        """bool, the shape of ``tokens``: which are grey levels. NumPy arrays or torch tensors."""
        return (tokens >= BYTES) & (tokens < BYTES + self.levels)

    def modality(self, tokens: Tensor) -> Tensor:
        """int64, the shape of ``tokens``: ``TEXT`` or ``IMAGE``."""
        return self.is_image(tokens).long()

    def encode_text(self, text: str) -> Tokens:
        """The bytes of UTF-8."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode_text(self, tokens: npt.ArrayLike) -> str:
        """The text among ``tokens``; ids that are no bytes are left out, bad UTF-8 becomes �."""
        ids = np.asarray(tokens).ravel()
        return ids[ids < BYTES].astype(np.uint8).tobytes().decode(errors="replace")

    def encode_image(self, image_HW: npt.NDArray[np.integer]) -> Tokens:
        """The ``side``² codes of a square image of levels, row by row from the top left.

        Raises ValueError for another shape, or a level outside 0 … ``levels`` - 1.
        """
        if image_HW.shape != (self.side, self.side):
            raise ValueError(f"image is {image_HW.shape}, not {self.side} × {self.side}")
        if image_HW.min() < 0 or image_HW.max() >= self.levels:
            raise ValueError(f"image has levels outside 0 … {self.levels - 1}")
        return (image_HW.ravel() + BYTES).astype(np.uint16)

    def decode_image(self, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The ``side`` × ``side`` levels of exactly one image's codes (without markers).

        Raises ValueError when there are more or fewer codes, or ids that are none.
        """
        ids = np.asarray(codes).astype(np.int64).ravel()
        if ids.size != self.codes_per_image or not self.is_image(ids).all():
            raise ValueError(f"an image is {self.codes_per_image} grey-level ids, in a row")
        return (ids - BYTES).reshape(self.side, self.side)

    def decode(self, tokens: npt.ArrayLike) -> list[str | npt.NDArray[np.int64]]:
        """A mixed stream as its pieces in order: text, and images as arrays of levels.

        A run of grey levels of the right length is ``side`` × ``side``; of any other length (cut
        short, say) it is one-dimensional. Markers separate pieces and are not shown themselves.
        """
        ids = np.asarray(tokens).astype(np.int64).ravel()
        kind = np.where(ids < BYTES, TEXT, np.where(self.is_image(ids), IMAGE, -1))
        starts = np.flatnonzero(np.diff(kind, prepend=-2))
        runs = zip(kind[starts], np.split(ids, starts[1:]), strict=True) if ids.size else []
        return [
            self.decode_text(run) if what == TEXT else self._levels(run)
            for what, run in runs
            if what != -1
        ]

    def _levels(self, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self.decode_image(codes) if codes.size == self.codes_per_image else codes - BYTES

    def join(self, pieces: Sequence[npt.ArrayLike]) -> Tokens:
        """One document: the pieces in order, then EOD."""
        return np.concatenate([*pieces, [self.eod]]).astype(np.uint16)

    def captioned(self, image_HW: npt.NDArray[np.integer], caption: str) -> Tokens:
        """The piece ``caption BOI codes EOI``."""
        codes = self.encode_image(image_HW)
        begin, end = np.array([self.boi]), np.array([self.eoi])
        return np.concatenate([self.encode_text(caption), begin, codes, end]).astype(np.uint16)
