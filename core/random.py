"""Random numbers that depend on what they are for, never on the rank or on what was drawn before.

Every draw is keyed: by (seed, name) for parameters, by (seed, step, layer, sample, position) for
noise inside a step. Hence the same numbers in every layout, under recompute, and after a resume,
without any generator state to save.
"""

import hashlib

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """A 63-bit key from integers and names; equal parts give an equal key on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`key` of ``parts``."""
    return torch.Generator().manual_seed(key(*parts))


def _as_int64(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea & Flood 2014), on int64 with wrapping arithmetic."""
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = _shift_right(x, shift).bitwise_xor_(x).mul_(_as_int64(multiplier))
    return _shift_right(x, 31).bitwise_xor_(x)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own shift of int64 copies the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def fold(keys: Tensor, *parts: int | str) -> Tensor:
    """Derive new int64 keys, of the same shape, from ``keys`` and constant ``parts``."""
    return _mix(keys ^ _as_int64(key(*parts)))


def fold_in(keys: Tensor, data: Tensor) -> Tensor:
    """Derive new int64 keys from ``keys`` and an int64 tensor of data (broadcast together)."""
    return _mix(_mix(keys) + data * _as_int64(0x9E3779B97F4A7C15))


def uniform(keys_T: Tensor, width: int, *, double: bool = False) -> Tensor:
    """Uniform numbers in [0, 1), shape ``(*keys.shape, width)``, one row for each int64 key.

    float32 with 24 random bits, or float64 with 53 when ``double``: no value rounds up to 1.
    """
    columns = torch.arange(width, device=keys_T.device)
    bits = fold_in(keys_T.unsqueeze(-1), columns)
    digits = 53 if double else 24
    top = _shift_right(bits, 64 - digits)
    return top.to(torch.float64 if double else torch.float32) * 2.0**-digits
