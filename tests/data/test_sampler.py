"""The order of samples: complete, keyed, independent of the ranks, and resumable."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.core.errors import UserError
from coterie.data.batch import IGNORE, Batch
from coterie.data.manifest import Manifest, Shard, Split
from coterie.data.order import permutation, shuffled
from coterie.data.sampler import Sampler, each_row
from coterie.data.shards import TokenDataset, open_dataset
from coterie.data.vocabulary import Vocabulary

MakeDataset = Callable[..., Path]


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 99))
def test_each_epoch_is_every_row_once(size: int, epoch: int, seed: int) -> None:
    rows = shuffled(size, epoch * size, size, "rows", seed)
    assert sorted(rows) == list(range(size))


@given(st.integers(1, 30), st.lists(st.integers(1, 40), max_size=6))
def test_slices_are_those_of_one_stream(size: int, counts: list[int]) -> None:
    starts = np.cumsum([0, *counts])
    slices = [shuffled(size, int(s), c, "x") for s, c in zip(starts, counts, strict=False)]
    whole = shuffled(size, 0, sum(counts), "x")
    np.testing.assert_array_equal(np.concatenate([*slices, []]), whole)


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(permutation(50, "rows", seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    stream = shuffled(50, 0, 100, "rows")
    assert stream[:50].tolist() != stream[50:].tolist()


def test_the_seed_decides_the_batches() -> None:
    batches = [Sampler(_memory(50), 50, seed).batch_indices(0).tolist() for seed in (0, 0, 1)]
    assert batches[0] == batches[1] != batches[2]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert permutation(8, "rows", 0, 0).tolist() == [3, 2, 0, 1, 7, 5, 4, 6]


def test_the_order_looks_random() -> None:
    """Each item lands at each place about equally often (chi-squared, 49 degrees of freedom)."""
    size, trials = 8, 4000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), permutation(size, seed)] += 1
    expected = trials / size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert 20 < chi2 < 100


@given(
    world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    accumulation=st.sampled_from([1, 2]),
    step=st.integers(0, 9),
)
def test_the_ranks_together_see_the_global_batch_in_order(
    world: int, accumulation: int, step: int
) -> None:
    sampler = Sampler(_memory(10), global_batch=24, seed=5)
    whole = sampler.batch(step)
    parts = [
        [sampler.batch(step, micro, accumulation, rank, world) for rank in range(world)]
        for micro in range(accumulation)
    ]
    for name in ("tokens_BS", "targets_BS", "sample_B", "index_B"):
        together = torch.cat([getattr(part, name) for ranks in parts for part in ranks])
        assert torch.equal(together, getattr(whole, name))
    micro_samples = torch.cat([part.sample_B for part in parts[-1]])
    share = 24 // accumulation
    expected = torch.arange(share) + step * 24 + (accumulation - 1) * share
    assert torch.equal(micro_samples, expected)


def _memory(rows: int) -> TokenDataset:
    """A dataset without files, for tests that hypothesis repeats."""
    tokens = np.arange(rows * 5, dtype=np.uint16).reshape(rows, 5)
    shard = Shard(file="train-00000.npy", rows=rows, bytes=1, sha256="0" * 64)
    split = Split(shards=(shard,), documents=rows, tokens=rows * 5, image_tokens=0)
    manifest = Manifest(
        vocabulary=Vocabulary(), sequence=4, splits={"train": split}, recipe={}, fingerprint=""
    )
    return TokenDataset(Path("memory"), "train", manifest, [tokens])


def test_samples_are_numbered_uniquely_over_the_run(dataset: TokenDataset) -> None:
    sampler = Sampler(dataset, global_batch=4, seed=0)
    samples = torch.cat([sampler.batch(step).sample_B for step in range(6)])
    assert torch.equal(samples, torch.arange(24))


def test_rows_are_those_of_their_index(dataset: TokenDataset) -> None:
    batch = Sampler(dataset, global_batch=16, seed=0).batch(0)
    assert torch.equal(batch.tokens_BS[:, 0], batch.index_B)  # row n holds the byte n


def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(make_dataset: MakeDataset) -> None:
    path = make_dataset()

    def run(sampler: Sampler, steps: int) -> list[Batch]:
        seen = []
        for _ in range(steps):
            seen.append(sampler.batch(sampler.consumed))
            sampler.consumed += 1
        return seen

    whole = run(Sampler(open_dataset(path), 4, seed=3), 9)
    first = Sampler(open_dataset(path), 4, seed=3)
    start = run(first, 5)
    second = Sampler(open_dataset(path), 4, seed=3)
    second.load_state_dict(first.state_dict())
    assert second.epoch == 2.0
    rest = run(second, 4)
    for a, b in zip(whole, start + rest, strict=True):
        assert torch.equal(a.tokens_BS, b.tokens_BS)
        assert torch.equal(a.sample_B, b.sample_B)


def test_the_parts_hold_all_targets_of_the_global_batch(dataset: TokenDataset) -> None:
    sampler = Sampler(dataset, global_batch=6, seed=0)
    parts = [sampler.batch(2, micro, 2, rank, 3) for micro in range(2) for rank in range(3)]
    assert sum(int((p.targets_BS != IGNORE).sum()) for p in parts) == 6 * 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 4}, r"seed was 4 and is now 3; set it back"),
        ({"global_batch": 8}, r"global batch was 8 and is now 4; set it back"),
        ({"fingerprint": "f00"}, r"fingerprint was f00 and is now [0-9a-f]{64}; .*restore it"),
        ({"split": "held_out"}, r"split was held_out and is now train"),
        ({"rows": 11}, r"rows was 11 and is now 10"),
        ({"consumed": -1}, r"-1 batches"),
        ({"consumed": "many"}, r"'many' batches"),
        ({"epoch": 1}, r"has the keys .*expected are"),
    ],
)
def test_a_state_from_elsewhere_is_refused(
    dataset: TokenDataset, change: dict[str, object], words: str
) -> None:
    sampler = Sampler(dataset, 4, seed=3)
    with pytest.raises(UserError, match=words):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    assert sampler.consumed == 0


def test_a_changed_dataset_is_refused_at_resume(make_dataset: MakeDataset) -> None:
    old, new = (open_dataset(make_dataset(name=name, first=n)) for n, name in enumerate("ab"))
    with pytest.raises(UserError, match="the dataset was changed"):
        Sampler(new, 4, seed=0).load_state_dict(Sampler(old, 4, seed=0).state_dict())


@pytest.mark.parametrize(("accumulation", "world"), [(3, 1), (1, 3), (2, 4)])
def test_a_batch_that_does_not_divide_is_refused(
    dataset: TokenDataset, accumulation: int, world: int
) -> None:
    with pytest.raises(UserError, match=f"multiple of {accumulation * world}"):
        Sampler(dataset, 4, seed=0).batch(0, 0, accumulation, 0, world)
    with pytest.raises(UserError, match="at least 1"):
        Sampler(dataset, 0, seed=0)


@pytest.mark.parametrize(("global_batch", "world"), [(4, 1), (4, 2), (16, 4), (6, 3)])
def test_evaluation_sees_every_row_once(
    dataset: TokenDataset, global_batch: int, world: int
) -> None:
    ranks = [list(each_row(dataset, global_batch, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    assert {len(batch.index_B) for batch in batches} == {global_batch // world}
    index = torch.cat([batch.index_B for batch in batches])
    assert sorted(index[index >= 0].tolist()) == list(range(len(dataset)))
    for batch in batches:
        filler = batch.index_B < 0
        assert batch.padding_BS[filler].all()
        assert (batch.targets_BS[filler] == IGNORE).all()
        assert torch.equal(batch.tokens_BS[~filler, 0], batch.index_B[~filler])


def test_an_evaluation_batch_that_does_not_divide_is_refused(dataset: TokenDataset) -> None:
    with pytest.raises(UserError, match="multiple of 3"):
        next(each_row(dataset, 4, 0, 3))
