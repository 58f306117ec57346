"""The inverse of a row gather: for each token, the rows that were taken from it."""

from typing import NamedTuple

import torch
from torch import Tensor

from coterie.csrc import loader


class Inverse(NamedTuple):
    """Rows grouped by token: token t owns ``row_A[offset_T1[t]:offset_T1[t + 1]]``, ascending."""

    row_A: Tensor  # int64, a permutation of 0 … A-1
    offset_T1: Tensor  # int64, T + 1 numbers rising from 0 to A


def invert(token_A: Tensor, num_tokens: int) -> Inverse:
    """Invert ``token_A`` (int64, A token numbers below ``num_tokens``); never waits for a GPU.

    Compute it once per assignment and pass it to both :func:`permute` and :func:`unpermute`.

    Raises ValueError for another dtype or shape, RuntimeError (native, CPU) for a token number
    out of range.
    """
    check_token(token_A)
    return Inverse(*loader.kernel("invert", token_A.device.type)(token_A, num_tokens))


def check_token(token_A: Tensor) -> None:
    """Raise ValueError unless ``token_A`` is int64 with 1 dimension."""
    if token_A.dim() != 1 or token_A.dtype != torch.int64:
        raise ValueError(
            f"token_A must be int64 with 1 dimension, got {token_A.dtype} of shape "
            f"{tuple(token_A.shape)}"
        )


def check_rows(name: str, x: Tensor, rows: int | None, token_A: Tensor, inverse: Inverse) -> None:
    """Raise ValueError unless x, token_A and inverse fit together; ``rows`` is x's length."""
    check_token(token_A)
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be float32, float64, bfloat16 or float16 with 2 dimensions, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    if rows is not None and x.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows, got {x.shape[0]}")
    if inverse.row_A.shape != token_A.shape:
        raise ValueError(
            f"the inverse holds {inverse.row_A.numel()} rows and token_A {token_A.numel()}: "
            "make it by invert(token_A, num_tokens)"
        )
    if x.device != token_A.device or x.device != inverse.row_A.device:
        raise ValueError(
            f"{name}, token_A and the inverse must be on one device, got {x.device}, "
            f"{token_A.device} and {inverse.row_A.device}"
        )


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
