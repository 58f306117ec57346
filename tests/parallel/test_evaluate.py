"""Held-out loss equals a plain loop over the rows, whatever the batch and the ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.data import IGNORE, IMAGE, TEXT, TokenDataset, collate
from coterie.models import Decoder
from coterie.moe.routers.top_k import TopKRouter
from coterie.moe.tokens import TokenInfo
from coterie.parallel.evaluate import evaluate
from coterie.parallel.model import ParallelModel
from tests.distributed import run_ranks
from tests.parallel.tiny import (
    ALONE,
    SEQUENCE,
    VOCABULARY,
    bits_differ,
    decoder_of,
    held_out_of,
    join,
    model_of,
    tiny_config,
    weights,
)

ROWS = 7


def sharp_model(data: Path, ranks: Any, **axes: int) -> ParallelModel:
    """One whose router and embedding matter."""
    model = model_of(tiny_config(data, parallel=axes), ranks)
    with torch.no_grad():
        for name, parameter in model.named():
            if name == "embedding.weight":
                parameter.mul_(50)
        for module in model.modules():
            if isinstance(module, TopKRouter):
                module.weight.mul_(30)
    return model


@torch.no_grad()
def plain_loop(model: Decoder, dataset: TokenDataset, rows: int) -> dict[str, float]:
    """Row by row, target by target."""
    model.eval()
    sums: dict[int, list[float]] = {TEXT: [], IMAGE: []}
    for number in range(rows):
        index = torch.tensor([number]).numpy()
        batch = collate(dataset.rows(index), VOCABULARY, index, index)
        info = TokenInfo(
            padding_T=batch.tokens_BS.flatten() == VOCABULARY.pad,
            modality_T=batch.modality_BS.flatten(),
        )
        log_prob_SV = model(batch.tokens_BS, info).x[0].log_softmax(-1)
        for place in range(SEQUENCE):
            target = int(batch.targets_BS[0, place])
            if target != IGNORE:
                grey = 256 <= target < 256 + VOCABULARY.levels
                sums[IMAGE if grey else TEXT].append(-float(log_prob_SV[place, target]))
    both = sums[TEXT] + sums[IMAGE]
    return {
        "loss": sum(both) / len(both),
        "loss/text": sum(sums[TEXT]) / len(sums[TEXT]),
        "loss/image": sum(sums[IMAGE]) / len(sums[IMAGE]),
    }


def evaluated(
    data: Path, ranks: Any, cases: list[tuple[int, int | None]], **axes: int
) -> list[Any]:
    model = sharp_model(data, ranks, **axes)
    held_out = held_out_of(tiny_config(data))
    found = [evaluate(model, held_out, "fp64", batch, limit) for batch, limit in cases]
    for name, parameter in model.named():
        part = model.part(name, parameter)  # of a shard that was left gathered, too large
        assert part.tensor.shape == part.box.shape
    return found


LAYOUTS: list[dict[str, Any]] = [{}, {"ep": 2}, {"cp": 2}, {"pp": 2}, {"dp_shard": 2}]


def on_rank(rank: int, data: Path, cases: Any) -> list[list[Any]]:
    return [evaluated(data, join(2, **axes), cases, **axes) for axes in LAYOUTS]


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[int, dict[str, float]]:
    model, held_out = sharp_model(data, ALONE), held_out_of(tiny_config(data))
    assert len(held_out) == ROWS
    return {rows: plain_loop(decoder_of(model), held_out, rows) for rows in range(1, ROWS + 1)}


def test_the_case_can_tell(expected: dict[int, dict[str, float]]) -> None:
    """Every number of rows, and each modality, has a loss of its own."""
    numbers = [value for losses in expected.values() for value in losses.values()]
    assert len({round(number, 6) for number in numbers}) == len(numbers)


@pytest.mark.parametrize("limit", [None, 1, 3, 4, 7, 99])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8])
def test_one_process_equals_the_loop(
    batch: int, limit: int | None, data: Path, expected: dict[int, dict[str, float]]
) -> None:
    (metrics,) = evaluated(data, ALONE, [(batch, limit)])
    assert metrics == pytest.approx(expected[min(limit or ROWS, ROWS)], rel=1e-12)


def test_ranks_equal_the_loop(data: Path, expected: dict[int, dict[str, float]]) -> None:
    cases = [(batch, limit) for batch in (2, 4, 8) for limit in (None, 1, 3, 4, 5, 7)]
    first, second = run_ranks(2, on_rank, data, cases)
    assert first == second
    assert len(first) == len(LAYOUTS)
    for results in first:
        for (_, limit), metrics in zip(cases, results, strict=True):
            assert metrics == pytest.approx(expected[limit or ROWS], rel=1e-12)


def test_it_leaves_the_model_as_it_was(data: Path) -> None:
    model, held_out = sharp_model(data, ALONE), held_out_of(tiny_config(data))
    before = weights(model)
    for training in (True, False):
        model.train(training)
        evaluate(model, held_out, "fp64", 2)
        assert [module.training for module in model.modules()] == [training] * len(
            list(model.modules())
        )
    assert bits_differ(weights(model), before) == []
    assert all(parameter.grad is None for parameter in model.parameters())
