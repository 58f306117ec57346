"""Shuffling as a pure function: keyed permutations, and endless shuffled streams made of them."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from coterie.core.random import fold_in, key

Indices = npt.NDArray[np.int64]


def permutation(size: int, *parts: int | str) -> Indices:
    """A permutation of ``range(size)``, read-only, that depends on ``parts`` alone.

    It sorts keyed 64-bit hashes (all different: the hash is a bijection of the index), so unlike
    ``torch.randperm`` it is the same under every torch version. 8 bytes an item.
    """
    hashes = fold_in(torch.tensor(key("permutation", *parts)), torch.arange(size))
    order: Indices = torch.argsort(hashes, stable=True).numpy()
    order.flags.writeable = False
    return order


_kept_permutation = lru_cache(maxsize=4)(permutation)  # an epoch is asked for step by step


def shuffled(size: int, start: int, count: int, *parts: int | str) -> Indices:
    """Items ``start`` … ``start + count`` of an endless stream over ``range(size)``.

    The stream is one epoch after another, each in its own keyed order; a slice may straddle
    epochs, or hold several of them.
    """
    place = np.arange(start, start + count)
    items = np.empty(count, dtype=np.int64)
    epoch_of = place // size
    for epoch in np.unique(epoch_of):
        inside = epoch_of == epoch
        items[inside] = _kept_permutation(size, *parts, int(epoch))[place[inside] % size]
    return items
