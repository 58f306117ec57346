"""The fused kernels as nvcc compiled them, instruction by instruction on the host.

What test_fused_on_host.py leaves to the GPU runs here too (tests/csrc/ptx): boxes that the TMA unit
loads and swizzles, products of warp groups by their descriptors, barriers and their phases, bulk
copies, registers that change hands, and what orders one warp's loads behind another's stores. All
that is asynchronous ends at a time drawn at random.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from built_code import extract_ptx
from compile_on_host import check_under_sanitizers, sanitized
from test_fused_on_host import (  # the same tests, of other code
    check,
    poisoned,  # noqa: F401
    test_a_rank_that_never_comes_is_named,  # noqa: F401
    test_both_passes,  # noqa: F401
    test_gradients_of_weights_by_themselves,  # noqa: F401
    test_no_bit_depends_on_the_manner_or_on_order,  # noqa: F401
    test_what_was_not_kept_is_computed_again,  # noqa: F401
)

from coterie.csrc.fused_launch import Manner
from tests.fused_layer import Layer


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ptx")
    assert extract_ptx("fused", folder)
    return folder


@pytest.fixture(autouse=True)
def ptx_instead(ptx: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels' PTX runs in place of their source."""
    monkeypatch.setenv("COTERIE_ON_HOST_PTX", str(ptx))
    yield


class Planted(NamedTuple):
    """Instructions of a kernel (all that match) that are replaced, and what is seen of it."""

    kernel: str
    old: str
    new: str
    seen: str


HANGS = "waits in vain|trap"  # of a barrier's thread, or of one that waits for a flag
WRONG = r"more than twice|nobody wrote"  # results
EARLY = f"nobody waits for|stored without a fence|nothing orders it|{WRONG}"
ERRORS = {
    "rows that are loaded without a fence": Planted(
        "dispatch_256", r"fence\.proxy\.async\.global;", "", "stored without a fence"
    ),
    "rows that are told of without a fence": Planted(
        "dispatch_128", r"(fence\.acq_rel\.gpu|membar\.gl);", "", "nothing orders it"
    ),
    "a slab that is told of without release": Planted(
        "combine_256", r"red\.release\.gpu", "red.relaxed.gpu", "nothing orders it"
    ),
    "a counter that is looked at without acquire": Planted(
        "combine_128", r"ld\.acquire\.gpu\.global", "ld.volatile.global", "nothing orders it"
    ),
    "a stage that is handed back while it is read": Planted(
        "dispatch_256", r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;", WRONG
    ),
    "sums that nobody waits for": Planted(
        "combine_128", r"wgmma\.wait_group\.sync\.aligned 0;", "", "nobody waits for"
    ),
    "more bytes than come": Planted(
        "combine_256", r"(mov\.u32 %r\d+), 49152;", r"\1, 49168;", HANGS
    ),
    "a stage that is never handed back": Planted(
        *("dispatch_128", r"mbarrier\.arrive\.shared::cluster\.b64 _, \[remAddr32\];", ""),
        seen=HANGS,
    ),
    "a stage that nobody waits for": Planted(
        "dispatch_256", "@P1 bra DONE;", "bra DONE;", "more threads arrive than are expected"
    ),
    "rows told of before they are written": Planted(
        "dispatch_256", r"cp\.async\.bulk\.wait_group 0;", "", EARLY
    ),
    "a slot that is filled again while it is read": Planted(
        "dispatch_128", r"cp\.async\.bulk\.wait_group\.read 1;", "", WRONG
    ),
    "a barrier that does not exist": Planted(
        "combine_256", r"bar\.sync %r\d+, ", "bar.sync 16, ", "there is no barrier 16"
    ),
    "more registers than there are": Planted(
        "dispatch_256", r"(setmaxnreg\.dec\.sync\.aligned\.u32) 40;", r"\1 80;", HANGS
    ),
    "boxes that overlap": Planted(
        "combine_backward_256", r"(add\.s32 %r\d+, %r\d+), 64;", r"\1, 32;", WRONG
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_are_seen(
    error: str, ptx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, old, new, seen = ERRORS[error]
    for path in ptx.glob("*.ptx"):
        text = path.read_text()
        if path.name.startswith(f"{kernel}."):
            text, count = re.subn(old, new, text)
            assert count > 0
        (tmp_path / path.name).write_text(text)
    monkeypatch.setenv("COTERIE_ON_HOST_PTX", str(tmp_path))
    columns, patience = int(kernel.rpartition("_")[2]), 1 if seen == HANGS else 60
    manner = Manner(1, 2, 2, patience=patience, tile_columns=columns)
    with pytest.raises((AssertionError, RuntimeError), match=seen):
        check(Layer(2, 4, 2, 70, 512, 128, seed=8), manner)


@pytest.mark.skipif(sanitized(), reason="runs itself")
def test_under_sanitizers() -> None:
    check_under_sanitizers(__file__, "256 and (plain or by_themselves)")
