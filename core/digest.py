"""A content hash of a tensor that does not depend on how ranks have cut it."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from coterie.core.box import Box
from coterie.core.random import fold_in, key

_KEY = key("digest")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CPU_PIECE = 1 << 15
"""Elements at once on a CPU: temporaries stay in its cache, and torch starts no more threads."""
_GPU_PIECE = 1 << 22


def digest(tensor: Tensor, box: Box) -> int:
    """The hash, 0 to 2**64 - 1, of the part of a tensor that ``box`` describes.

    It is the sum modulo 2**64, over elements, of a mix of (index in the whole tensor, bits). So the
    digests of parts add up, modulo 2**64, to the digest of the whole, however it is cut; that of an
    empty part is 0. Dtype and shape are not in it; -0.0 and 0.0 differ.

    It guards against accidents (a lost, repeated, exchanged or changed element goes unnoticed once
    in about 2**64 times). It is no protection against someone who looks for a collision.
    """
    return int(digest_int64(tensor, box)) % (1 << 64)


def digest_int64(tensor: Tensor, box: Box) -> Tensor:
    """:func:`digest` as an int64 scalar on the tensor's device (negative from 2**63 on).

    int64 addition wraps, so an all-reduce sums digests as they are to be summed.
    """
    if tuple(tensor.shape) != box.shape:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is not the part {box}")
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    width = tensor.element_size()
    bits = bits_of(tensor)
    for piece in pieces(Box.all_of(box.shape), _GPU_PIECE if tensor.is_cuda else _CPU_PIECE):
        content = bits[piece.slices].to(torch.int64)
        if width in (2, 4):
            content &= (1 << 8 * width) - 1  # without copies of the sign
        total += fold_in(_index(piece, box, tensor.device) ^ _KEY, content).sum()
    return total


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of each element as an integer of its width, sharing memory."""
    return tensor.detach().view(_BITS[tensor.element_size()])


def pieces(box: Box, elements: int) -> Iterator[Box]:
    """``box`` in boxes of at most ``elements`` elements, whose contents in a row are its own."""
    if box.numel <= elements:
        if box.numel:
            yield box
        return
    dim = next(dim for dim, size in enumerate(box.shape) if size > 1)
    size = box.shape[dim]
    each = max(1, elements // prod(box.shape[dim + 1 :]))
    for start in range(0, size, each):
        yield from pieces(box.cut(dim, range(start, min(start + each, size))), elements)


def _index(piece: Box, box: Box, device: torch.device) -> Tensor:
    """For each element of ``piece`` (a box of ``box``), its index in the whole tensor."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for dim in reversed(range(len(box.whole))):
        start = box.offset[dim] + piece.offset[dim]
        along = torch.arange(start, start + piece.shape[dim], device=device) * stride
        index = index + along.reshape(-1, *(1,) * (len(box.whole) - 1 - dim))
        stride *= box.whole[dim]
    return index
