"""A resharded checkpoint is the one that a run of that layout would have written, byte for byte."""

import json
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.box import Box
from coterie.core.errors import UserError
from coterie.launch.assemble import build_model
from coterie.launch.placement import boxes_of_rank
from coterie.parallel import checkpoint_reader
from coterie.parallel.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    load_tensors,
    read_manifest,
    read_state,
    verify,
)
from coterie.parallel.checkpoint_format import checksum
from coterie.parallel.checkpoint_reader import CheckpointReader
from coterie.parallel.distributed import Ranks, make_groups
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.part import Part
from coterie.parallel.reshard import reshard
from coterie.parallel.rules import layout_of
from coterie.parallel.run_state import model_parts, optimizer_parts
from tests.distributed import run_ranks
from tests.parallel.tiny import ALONE, same_bits, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAME = "step_00000007"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(6, 5, 4, generator=generator),
        "b": torch.randn(9, generator=generator).bfloat16(),
        "step": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "ids": torch.randint(0, 99, (4, 4), generator=generator),
    }


def cutting(world: int, seed: int) -> Callable[[int], dict[str, Box]]:
    """Each tensor in at most as many boxes as ranks, some of them empty."""

    def boxes_of_rank(rank: int) -> dict[str, Box]:
        found = {}
        for name, tensor in tensors().items():
            dice = random.Random(f"{name} {seed}")
            boxes = [Box.all_of(tuple(tensor.shape))]
            while len(boxes) < dice.randint(1, world) and tensor.dim():
                box = boxes.pop(dice.randrange(len(boxes)))
                dim = dice.randrange(tensor.dim())
                at = dice.randint(0, box.shape[dim])
                boxes += [box.cut(dim, range(at)), box.cut(dim, range(at, box.shape[dim]))]
            found[name] = boxes[rank % len(boxes)]
        return found

    return boxes_of_rank


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        parts = {name: Part.whole(tensor) for name, tensor in tensors().items()}
        checkpointer.save(7, parts, {"step": 7, "layout": {"world": 1}})
    return folder / NAME


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("seed", range(8))
def test_there_and_back_gives_the_same_bytes(source: Path, tmp_path: Path, seed: int) -> None:
    there = reshard(source, tmp_path / "there" / NAME, cutting(3, seed), 3)
    verify(there)
    assert read_manifest(there).world_size == 3 and read_state(there) == read_state(source)
    into = {name: torch.ones_like(tensor) for name, tensor in tensors().items()}
    load_tensors(there, {name: Part.whole(tensor) for name, tensor in into.items()})
    assert all(same_bits(into[name], tensor) for name, tensor in tensors().items())
    other = reshard(there, tmp_path / "other" / NAME, cutting(4, seed + 50), 4)
    back = reshard(other, tmp_path / "back" / NAME, cutting(1, 0), 1)
    assert contents(back) == contents(source)
    again = reshard(other, tmp_path / "again" / NAME, cutting(3, seed), 3)
    assert contents(again) == contents(there)


LAYOUTS: list[dict[str, int]] = [
    {"tp": 2, "ep": 2},
    {"pp": 2, "ep": 2},
    {"dp_shard": 4, "ep": 2},
    {"tp": 2, "dp_shard": 2, "etp": 2},
]


def layout_config(sizes: dict[str, int]) -> Any:
    heads = {"attention": {"heads": 2, "kv_heads": 2}}
    return tiny_config(Path("nowhere"), model=heads, parallel=sizes)


def _parts(config: Any, ranks: Ranks) -> dict[str, Part]:
    model = build_model(config, ranks)
    return {**model_parts(model), **optimizer_parts(model, Optimizer(model, config.optimizer))}


def _save_in(rank: int, source: Path, folder: Path, all_sizes: list[dict[str, int]]) -> None:
    """What runs of these layouts write that have loaded ``source``."""
    for number, sizes in enumerate(all_sizes):
        config = layout_config(sizes)
        layout = layout_of(config.parallel, 4, config.model)
        ranks = make_groups(layout, torch.device("cpu"), timedelta(seconds=60))
        parts = _parts(config, ranks)
        load_tensors(source, parts, ranks.control)
        with Checkpointer(folder / str(number), CheckpointConfig(), ranks.saving) as checkpointer:
            checkpointer.save(7, parts, read_state(source))


def test_it_is_what_a_run_of_that_layout_writes(tmp_path: Path) -> None:
    parts = _parts(layout_config({}), ALONE)
    generator = torch.Generator().manual_seed(1)
    for part in parts.values():  # moments too, which are zero at first
        part.tensor.copy_(torch.randn(part.box.shape, generator=generator))
    with Checkpointer(tmp_path / "alone", CheckpointConfig()) as checkpointer:
        checkpointer.save(7, parts, {"step": 7})
    source = tmp_path / "alone" / NAME
    run_ranks(4, _save_in, source, tmp_path / "runs", LAYOUTS, timeout=120)
    for number, sizes in enumerate(LAYOUTS):
        config = layout_config(sizes)
        layout = layout_of(config.parallel, 4, config.model)
        made = reshard(
            source,
            tmp_path / "made" / str(number) / NAME,
            lambda rank, c=config, o=layout: boxes_of_rank(c, o, rank),  # type: ignore[misc]
            4,
        )
        ran = contents(tmp_path / "runs" / str(number) / NAME)
        assert len(ran) == 6  # each rank writes a file
        assert contents(made) == ran, sizes


def test_only_a_piece_at_a_time_is_in_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reshard(source, tmp_path / "whole" / NAME, cutting(3, 5), 3)
    largest = 0
    read = CheckpointReader._read

    def watch(self: CheckpointReader, name: str, box: Box) -> Tensor:
        nonlocal largest
        content = read(self, name, box)
        largest = max(largest, content.nbytes)
        return content

    monkeypatch.setattr(checkpoint_reader, "PIECE", 24)
    monkeypatch.setattr(CheckpointReader, "_read", watch)
    done = []
    pieces = reshard(source, tmp_path / "pieces" / NAME, cutting(3, 5), 3, advance=done.append)
    assert contents(pieces) == contents(whole)
    assert 0 < largest <= 24
    assert sum(done) == sum(tensor.nbytes for tensor in tensors().values())


def test_an_exception_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        assert len(list((tmp_path / "out").glob(".step_*/rank_*"))) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(source, tmp_path / "out" / NAME, cutting(2, 0), 2, advance=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def without(name: str) -> dict[str, Box]:
    return {n: box for n, box in cutting(1, 0)(0).items() if n != name}


@pytest.mark.parametrize(
    ("boxes", "sentence"),
    [
        (without("b"), "holds tensor 'b', which its model does not have"),
        ({**without("w"), "wt": Box.all_of((2,))}, "has no tensor 'wt'.*did you mean 'w'"),
        ({**without("w"), "w": Box.all_of((6, 5))}, r"'w' has shape \[6, 5, 4\] in .*\[6, 5\]"),
    ],
)
def test_boxes_that_do_not_fit(
    source: Path, tmp_path: Path, boxes: dict[str, Box], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        reshard(source, tmp_path / "out" / NAME, lambda rank: boxes, 1)
    assert not (tmp_path / "out").exists()


def test_destinations_that_will_not_do(source: Path, tmp_path: Path) -> None:
    for destination, sentence in (
        (source, "exists already"),
        (tmp_path / "step_00000008", "is not named after step 7"),
        (tmp_path / "elsewhere", "is not a checkpoint"),
    ):
        with pytest.raises(UserError, match=sentence):
            reshard(source, destination, cutting(1, 0), 1)


def test_a_digest_that_the_content_does_not_have(source: Path, tmp_path: Path) -> None:
    """The files have their checksums, but the manifest was made for other content."""
    envelope = json.loads((source / "manifest.json").read_text())
    envelope["manifest"]["tensors"]["w"]["digest"] = "0" * 16
    envelope["checksum"] = checksum(envelope["manifest"])
    (source / "manifest.json").write_text(json.dumps(envelope))
    with pytest.raises(UserError, match="content of tensor 'w' does not match its digest"):
        reshard(source, tmp_path / "out" / NAME, cutting(2, 0), 2)
    assert list((tmp_path / "out").iterdir()) == []
