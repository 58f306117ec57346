"""Keyed random numbers: stable, independent of how they are asked for, and random."""

import math

import pytest
import torch
from torch import Tensor

from coterie.core.random import fold, fold_in, generator, key, uniform


def _counter_keys(count: int) -> Tensor:
    """Keys as a step makes them: one base, positions in a row."""
    return fold_in(torch.full((count,), key(7, "step", 3)), torch.arange(count))


def test_values_are_pinned() -> None:
    """A change here changes every run's numbers and breaks resuming old ones."""
    assert key(1, "weights") == 5185046303310878342
    assert key() == 6510301506637419378
    keys = torch.tensor([0, 1, -1, 2**62])
    assert fold(keys, "layer", 3).tolist() == [
        -7317116402790607703,
        2388442044200598268,
        -2042219790292389325,
        -3471479344903615521,
    ]
    assert fold_in(keys, torch.tensor([0, 0, 5, 5])).tolist() == [
        0,
        8841707400507832957,
        -3127467600737763982,
        6768558876777514863,
    ]
    assert uniform(torch.tensor([42]), 3).tolist() == [
        [9955975 / 2**24, 10001215 / 2**24, 2690484 / 2**24]
    ]
    assert uniform(torch.tensor([42]), 2, double=True).tolist() == [
        [0.5934224109845303, 0.5961188718302076]
    ]


def test_uniform_is_splitmix64() -> None:
    """Column c of a key is the c-th number of Python's own splitmix64 seeded by the mixed key."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for number in (0, 1, -1, 123456789, -(2**63), 2**63 - 1):
        seed = mix(number & mask)
        words = [mix((seed + c * 0x9E3779B97F4A7C15) & mask) for c in range(5)]
        doubles = uniform(torch.tensor([number]), 5, double=True)[0].tolist()
        singles = uniform(torch.tensor([number]), 5)[0].tolist()
        assert doubles == [(word >> 11) / 2**53 for word in words]
        assert singles == [(word >> 40) / 2**24 for word in words]


def test_a_key_tells_types_order_and_borders_apart() -> None:
    different = [
        key(1),
        key("1"),
        key(True),
        key(-1),
        key(1, 2),
        key(2, 1),
        key(12),
        key("12"),
        key("1", "2"),
        key("a", "b"),
        key("ab"),
        key("a", ""),
        key("a"),
        key(),
        key(2**64 + 1),
    ]
    assert len(set(different)) == len(different)
    assert all(0 <= value < 2**63 for value in different)
    assert key(3, "router") == key(3, "router")


def test_generators_of_one_key_draw_the_same_and_of_others_do_not() -> None:
    one, same, other = generator(1, "w"), generator(1, "w"), generator(1, "v")
    drawn = [torch.rand(5, generator=g) for g in (one, same, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_folding_depends_on_each_part() -> None:
    keys = _counter_keys(1000)
    folded = [fold(keys, 0), fold(keys, 1), fold(keys, "1"), fold(keys, 0, 0), keys]
    assert torch.cat(folded).unique().numel() == 5000
    data = fold_in(keys[:, None], torch.arange(5))
    assert data.unique().numel() == 5000
    assert torch.equal(data[:, 3], fold_in(keys, torch.tensor(3)))


@pytest.mark.parametrize("double", [False, True])
def test_same_numbers_however_keys_are_split_or_shaped(double: bool) -> None:
    keys = _counter_keys(60)
    whole = uniform(keys, 7, double=double)
    assert whole.shape == (60, 7)
    assert whole.dtype == (torch.float64 if double else torch.float32)
    parts = [uniform(part, 7, double=double) for part in keys.split([1, 0, 29, 30])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(uniform(keys.view(3, 20), 7, double=double).view(60, 7), whole)
    assert torch.equal(uniform(keys.flip(0), 7, double=double).flip(0), whole)
    assert torch.equal(uniform(keys, 3, double=double), whole[:, :3])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("keys", ["counters", "folded"])
def test_statistics_of_uniform(double: bool, keys: str) -> None:
    """The numbers are fixed by their keys, so this passes always or never: limits of 4 sigma."""
    count, width = 20_000, 16
    keys_T = torch.arange(count) if keys == "counters" else _counter_keys(count)
    u = uniform(keys_T, width, double=double).double()
    n = count * width
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    centred = u - 0.5
    for first, second in (
        (centred[:-1], centred[1:]),  # neighbouring keys
        (centred[:, :-1], centred[:, 1:]),  # neighbouring columns
        (centred[:-1, 1:], centred[1:, :-1]),  # diagonals: key + 1 is not column + 1
        (centred[: count // 2], centred[count // 2 :]),
    ):
        correlation = float((first * second).mean()) * 12
        assert abs(correlation) < 4 / math.sqrt(first.numel())
    bins = 256
    seen = torch.histc(u, bins, 0, 1)
    chi2 = float(((seen - n / bins) ** 2 / (n / bins)).sum())
    assert abs(chi2 - (bins - 1)) < 4 * math.sqrt(2 * (bins - 1))
    low = (u * 2**20 % 1 * 16).long()  # bits 21 to 24 are as even as the first
    seen = torch.bincount(low.flatten(), minlength=16)
    chi2 = float(((seen - n / 16) ** 2 / (n / 16)).sum())
    assert abs(chi2 - 15) < 4 * math.sqrt(2 * 15)


def test_rows_and_columns_are_all_different() -> None:
    u = uniform(torch.arange(5000), 8, double=True)
    assert u.unique().numel() == u.numel()
