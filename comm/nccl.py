"""NCCL beside the fused exchange: how many multiprocessors its collectives may take.

A launch of the fused exchange holds all multiprocessors but ``SPARED`` until the other ranks have
come, and a collective holds one for each CTA (at most) until they have. Where both do not fit, a
rank that runs one can wait for a rank that runs the other, and that one for the first.

NCCL works off the collectives of a group one at a time, whatever streams they are on: so it is
enough that one of each group fits which runs beside launches (``Layout.beside``). What runs on the
stream of the launches is never beside one, and takes what it likes.
"""

import os
from typing import Any

from coterie.core.errors import UserError

SPARED = 16
"""Multiprocessors that a launch of the fused exchange leaves alone."""

_UPWARDS = ("NCCL_MAX_CTAS", "NCCL_MIN_NCHANNELS", "NCCL_MIN_NRINGS", "NCCL_MIN_P2P_NCHANNELS")
"""What NCCL heeds more than a group's options."""

_TOGETHER = "NCCL_CGA_CLUSTER_SIZE"
"""CTAs that start together, next to each other: 4 on Hopper, if nobody says otherwise."""


def ctas(groups: int) -> int | None:
    """What the collectives of each of ``groups`` may take that run beside launches; None: there are
    none. A power of two, to which NCCL rounds up what sends take.

    Raises:
        UserError: the environment makes NCCL take more.
    """
    if groups == 0:
        return None
    most: int = 1 << (SPARED // groups).bit_length() - 1
    for name in _UPWARDS:
        value = os.environ.get(name)
        if value is not None and not (value.isdecimal() and 1 <= int(value) <= most):
            raise UserError(
                f"{name} is {value}, but model.moe.exchange.kind is fused, beside which NCCL has "
                f"{SPARED} multiprocessors for {groups} group{'s' if groups > 1 else ''} of ranks: "
                f"accepted are 1 to {most}, or none"
            )
    if os.environ.get(_TOGETHER, "0") not in ("0", "1"):
        raise UserError(
            f"{_TOGETHER} is {os.environ[_TOGETHER]}, but model.moe.exchange.kind is fused, beside "
            f"which multiprocessors that are next to each other may never be free together: "
            f"accepted are 0 and 1, or none"
        )
    return most


def options(most: int) -> Any:
    """Of a group whose collectives take up to ``most`` CTAs, for ``new_group``."""
    from torch.distributed import ProcessGroupNCCL  # not in builds of torch for CPUs

    found = ProcessGroupNCCL.Options()
    found.config.max_ctas = most
    found.config.cga_cluster_size = 0  # the multiprocessors left alone lie anywhere
    return found
