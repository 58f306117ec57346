"""Logits of a model in any layout are those of one process, also on ranks without sequences."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.launch.images import image_drawer
from coterie.moe.tokens import TokenInfo
from coterie.parallel.forward import whole_logits
from tests.distributed import run_ranks
from tests.parallel.tiny import ALONE, VOCABULARY, decoder_of, join, model_of, tiny_config
from tests.parallel.tiny import relative_error as error

LENGTH = 7  # no multiple of what any layout splits
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep": {"ep": 2},
    "tp": {"tp": 2, "ep": 2},
    "cp": {"cp": 2},
    "pp": {"pp": 2},
    "zbv": {"pp": 2, "vpp": 2, "schedule": "zbv"},
    "dp_shard": {"dp_shard": 2},
}
MODEL: dict[str, Any] = {"layers": 4, "attention": {"heads": 2, "kv_heads": 2}}


def config_of(data: Path, axes: dict[str, Any]) -> Any:
    config = tiny_config(data)
    model = config.model_dump()["model"] | MODEL
    return tiny_config(data, model=model, parallel=axes)


def given(rows: int) -> tuple[Tensor, TokenInfo]:
    gen = torch.Generator().manual_seed(4)
    tokens_BS = torch.randint(97, 107, (3, LENGTH), generator=gen)[:rows]
    sequence_T = torch.arange(rows).repeat_interleave(LENGTH)
    return tokens_BS, TokenInfo(
        padding_T=torch.arange(rows * LENGTH) % LENGTH >= 6, sequence_T=sequence_T
    )


def on_rank(rank: int, data: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, axes in LAYOUTS.items():
        ranks = join(2, **axes)
        model = model_of(config_of(data, axes), ranks).eval()
        rows = 3 if ranks.place.dp == 0 else 0
        draw = image_drawer(["a"], VOCABULARY, "fp64", 1.0, 0)  # one prompt: some rank has none
        model.train()
        images = {prompt: image.tolist() for prompt, image in draw(model).items()}
        assert model.training
        model.eval()
        results[name] = (rows, whole_logits(model, *given(rows), "fp64"), images)
    return results


@pytest.fixture(scope="module")
def spread(data: Path) -> list[dict[str, Any]]:
    return run_ranks(2, on_rank, data, timeout=120)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_and_images_are_those_of_one_process(
    name: str, data: Path, spread: list[dict[str, Any]]
) -> None:
    model = model_of(config_of(data, {}), ALONE).eval()
    tokens_BS, info = given(3)
    truth = decoder_of(model)(tokens_BS, info).x.detach()
    assert error(whole_logits(model, tokens_BS, info, "fp64"), truth) < 1e-13
    images = image_drawer(["a"], VOCABULARY, "fp64", 1.0, 0)(model)
    for results in spread:
        rows, logits_BSV, drawn = results[name]
        assert logits_BSV.shape == (rows, LENGTH, VOCABULARY.size)
        assert rows == 0 or error(logits_BSV, truth) < 1e-12
        assert drawn == {prompt: image.tolist() for prompt, image in images.items()}
    assert any(results[name][0] for results in spread)
