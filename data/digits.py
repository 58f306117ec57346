"""Real images on every machine: scikit-learn's 1,797 handwritten digits (8 × 8, 17 grey levels)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coterie.data.split import held_out

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def caption(digit: int) -> str:
    """The caption of a digit: ``a digit seven``."""
    return f"a digit {NAMES[digit]}"


@dataclass(frozen=True)
class Digits:
    """Images with their labels."""

    image_NHW: npt.NDArray[np.int64]
    """N × 8 × 8, levels 0 … 16."""

    label_N: npt.NDArray[np.int64]
    """0 … 9."""

    def __len__(self) -> int:
        return len(self.label_N)

    def select(self, which_N: npt.NDArray[np.bool_]) -> "Digits":
        """Those where ``which_N`` is true."""
        return Digits(self.image_NHW[which_N], self.label_N[which_N])


def load_digits() -> Digits:
    """All 1,797 digits, in scikit-learn's order."""
    from sklearn import datasets  # slow to import, and needed only here

    bunch = datasets.load_digits()
    return Digits(bunch.images.astype(np.int64), bunch.target.astype(np.int64))


def split_digits(fraction: float) -> tuple[Digits, Digits]:
    """(train, held-out), ``fraction`` of each digit class held out, chosen by index alone."""
    digits = load_digits()
    chosen = np.zeros(len(digits), dtype=np.bool_)
    for label in range(10):
        index_M = np.flatnonzero(digits.label_N == label)
        chosen[index_M] = held_out([f"digit {index}" for index in index_M], fraction)
    return digits.select(~chosen), digits.select(chosen)
