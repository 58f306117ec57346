"""What is saved is what is loaded, bit for bit, on any layout, whatever training does meanwhile."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from coterie.core.box import Box
from coterie.core.digest import digest
from coterie.core.errors import UserError
from coterie.parallel import checkpoint_tensors
from coterie.parallel.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    latest,
    list_checkpoints,
    load_tensors,
    read_manifest,
    read_state,
    verify,
)
from coterie.parallel.checkpoint_format import STATE, step_of
from coterie.parallel.part import Part
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
BYTES = (torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn)


def random_bits(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern that the dtype can have: NaNs with payloads, infinities, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, width), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def poisoned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Targets of a load that hold something else everywhere."""
    return {
        name: torch.empty_like(x).copy_(~x if x.dtype == torch.bool else torch.ones_like(x))
        for name, x in tensors.items()
    }


def wholes(tensors: dict[str, Tensor]) -> dict[str, Part]:
    return {name: Part.whole(tensor) for name, tensor in tensors.items()}


def load_one(path: Path, into: dict[str, Tensor], strict: bool = True) -> None:
    load_tensors(path, wholes(into), strict=strict)


def save_one(folder: Path, step: int, tensors: dict[str, Tensor], **config: Any) -> Path:
    with Checkpointer(folder, CheckpointConfig(**config)) as checkpointer:
        checkpointer.save(step, wholes(tensors), {"step": step})
    return folder / f"step_{step:08d}"


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(DTYPES + BYTES), st.lists(st.integers(0, 5), max_size=4)),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**32),
)
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tmp_path: Path, specs: list[tuple[torch.dtype, list[int]]], seed: int
) -> None:
    tensors = {f"t{i}": random_bits(s, d, seed + i) for i, (d, s) in enumerate(specs)}
    path = save_one(tmp_path, seed, tensors)
    into = {name: random_bits(list(x.shape), x.dtype, seed + 99) for name, x in tensors.items()}
    load_one(path, into)
    assert all(same_bits(into[name], tensors[name]) for name in tensors)


def test_strided_shared_and_scalar_tensors(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "transposed": base.t(),
        "every_other": base[::2],
        "tied": base,
        "parameter": torch.nn.Parameter(base.clone()),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "expanded": torch.tensor(2.5).expand(3, 2),
        "näme.with/odd characters": torch.randn(2),
    }
    path = save_one(tmp_path, 1, tensors)
    into = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in tensors.items()}
    into["transposed"] = torch.zeros(6, 4).t()
    into["parameter"] = torch.nn.Parameter(torch.zeros(6, 4))
    load_one(path, into)
    assert all(same_bits(into[name].detach(), tensors[name].detach()) for name in tensors)


def test_training_may_overwrite_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overwritten = threading.Event()
    write = checkpoint_tensors.write_safetensors

    def write_late(*args: Any) -> Any:
        assert overwritten.wait(30)
        return write(*args)

    monkeypatch.setattr(checkpoint_tensors, "write_safetensors", write_late)
    weight, state = torch.randn(100), {"seen": [1, 2]}
    expected = weight.clone()
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, wholes({"w": weight}), state)
        assert latest(tmp_path) is None  # save() has returned, and nothing is complete
        weight.fill_(-1)
        state["seen"].append(3)
        overwritten.set()
        checkpointer.save(
            2, wholes({"w": weight}), state
        )  # waits for the first; reuses its buffers
    into = {"w": torch.zeros(100)}
    first, second = list_checkpoints(tmp_path)
    load_one(first, into)
    assert torch.equal(into["w"], expected)
    assert read_state(first) == {"seen": [1, 2]}
    load_one(second, into)
    assert torch.equal(into["w"], weight)


def test_state_comes_back_and_must_be_json(tmp_path: Path) -> None:
    state = {"lr": 0.1 + 0.2, "big": 2**63, "text": "ä", "none": None, "nested": [{"a": [True]}]}
    with Checkpointer(tmp_path, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(5, wholes({"w": torch.zeros(1)}), state)
        for wrong in ({1: 2}, {"x": float("nan")}, {"x": (1, 2)}):
            with pytest.raises(ValueError, match=r"JSON"):
                checkpointer.save(6, wholes({"w": torch.zeros(1)}), wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="complex64"):
            checkpointer.save(6, wholes({"c": torch.zeros(1, dtype=torch.complex64)}), {})
    assert read_state(tmp_path / "step_00000005") == state
    manifest = read_manifest(tmp_path / "step_00000005")
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.world_size == 1
    assert steps_in(tmp_path) == [5]


def test_keeps_the_newest(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
        for step in (5, 10, 15, 100_000_000):
            checkpointer.save(step, wholes({"w": torch.tensor(step)}), {})
    assert steps_in(tmp_path) == [15, 100_000_000]
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "step_00000015", "step_100000000"}


def test_resuming_from_an_earlier_step_leaves_the_later_ones_behind(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig(keep=3)) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, wholes({"w": torch.tensor(step)}), {})
    save_one(tmp_path, 15, {"w": torch.tensor(15)}, keep=3)
    assert steps_in(tmp_path) == [10, 15]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as checkpointer:
        checkpointer.save(1, wholes({"w": torch.tensor(1)}), {})
        checkpointer.save(2, wholes({"w": torch.tensor(2)}), {})
        checkpointer.wait()
        (tmp_path / "step_00000002" / "state.json").unlink()
        checkpointer.save(3, wholes({"w": torch.tensor(3)}), {})
    assert steps_in(tmp_path) == [1, 2, 3]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_one(tmp_path, 3, {"old": torch.tensor(1)})
    path = save_one(tmp_path, 3, {"new": torch.tensor(2)})
    into = {"new": torch.tensor(0)}
    load_one(path, into)
    assert into["new"] == 2


def test_due(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig(every=5)) as checkpointer:
        assert [s for s in range(1, 12) if checkpointer.due(s)] == [5, 10]
    with Checkpointer(tmp_path, CheckpointConfig(every=0)) as checkpointer:
        assert not any(checkpointer.due(s) for s in range(1, 12))


def test_the_files_are_plain_safetensors_that_torch_reads_too(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(5, 3), "mask": torch.tensor([True, False]), "n": torch.tensor(4)}
    path = save_one(tmp_path, 1, tensors)
    loaded = load_file(path / "rank_00000.safetensors")
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    into = poisoned(tensors)
    dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(same_bits(into[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("into", "sentence"),
    [
        ({"wight": torch.zeros(2, 3)}, "has no tensor 'wight'; did you mean 'weight'?"),
        ({"weight": torch.zeros(3, 2)}, r"'weight' has shape \[2, 3\] in .* and \[3, 2\] in this"),
        ({"weight": torch.zeros(2, 3).double()}, "'weight' is float32 in .* and float64 in this"),
        ({"weight": torch.zeros(2, 3)}, "holds tensor 'moment', which this run does not have"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_untouched(
    tmp_path: Path, into: dict[str, Tensor], sentence: str
) -> None:
    path = save_one(tmp_path, 1, {"weight": torch.ones(2, 3), "moment": torch.ones(2)})
    with pytest.raises(UserError, match=sentence):
        load_one(path, into)
    assert not any(x.any() for x in into.values())


def test_weights_alone_can_be_loaded(tmp_path: Path) -> None:
    path = save_one(tmp_path, 1, {"weight": torch.ones(2, 3), "moment": torch.ones(2)})
    into = {"weight": torch.zeros(2, 3)}
    load_one(path, into, strict=False)
    assert torch.equal(into["weight"], torch.ones(2, 3))
    with pytest.raises(UserError, match="has no tensor 'bias'"):
        load_one(path, {"bias": torch.zeros(1)}, strict=False)


# -- layouts ----------------------------------------------------------------------------------

WHOLE = {
    "experts.w": ([4, 5, 3], torch.float32),
    "experts.moment": ([3, 7], torch.bfloat16),  # uneven
    "one": ([1, 6], torch.float64),  # all but one rank hold nothing of it
    "none": ([0, 2], torch.float32),
    "ids": ([9, 4], torch.int64),
    "mask": ([6], torch.bool),
}


def whole(seed: int = 0) -> dict[str, Tensor]:
    return {n: random_bits(s, d, seed + i) for i, (n, (s, d)) in enumerate(WHOLE.items())}


def cut(tensors: dict[str, Tensor], world: int, rank: int, seed: int) -> dict[str, Part]:
    """What ``rank`` holds when each tensor is cut at random into at most as many boxes as there are
    ranks (some empty, some held by several); "ids" and "mask" are whole on all ranks."""
    parts = {}
    for name, tensor in tensors.items():
        boxes = [Box.all_of(tuple(tensor.shape))]
        dice = random.Random(f"{name} {seed}")
        count = 1 if name in {"ids", "mask"} else dice.randint(1, world)
        while len(boxes) < count:
            box = boxes.pop(dice.randrange(len(boxes)))
            dim = dice.randrange(len(box.shape))
            at = dice.randint(0, box.shape[dim])
            boxes += [box.cut(dim, range(at)), box.cut(dim, range(at, box.shape[dim]))]
        box = boxes[(rank + seed) % count]
        parts[name] = Part(tensor[box.slices], box)
    return parts


def _save_cut(rank: int, folder: Path, world: int, seeds: list[int]) -> None:
    with Checkpointer(folder, CheckpointConfig(keep=100), dist.new_group()) as checkpointer:
        for seed in seeds:
            checkpointer.save(seed, cut(whole(), world, rank, seed), {"of": rank})


def _load_cut(rank: int, folder: Path, world: int, seed: int) -> list[str]:
    """The parts that do not come back, over all checkpoints in ``folder``."""
    group, wrong = dist.new_group(), []
    for path in list_checkpoints(folder):
        into = cut(poisoned(whole()), world, rank, seed)
        load_tensors(path, into, group)
        wanted = cut(whole(), world, rank, seed)
        wrong += [n for n in wanted if not same_bits(into[n].tensor, wanted[n].tensor)]
    return wrong


def test_any_cutting_is_loaded_on_any_other(tmp_path: Path) -> None:
    world, seeds = 3, list(range(1, 9))
    run_ranks(world, _save_cut, tmp_path, world, seeds)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == seeds
    for path in list_checkpoints(tmp_path):
        verify(path)
        assert read_state(path) == {"of": 0}
        assert read_manifest(path).world_size == world
        into = poisoned(whole())
        load_one(path, into)
        assert all(same_bits(into[name], x) for name, x in whole().items()), path
    assert run_ranks(4, _load_cut, tmp_path, 4, 77) == [[]] * 4


def test_the_cutting_of_these_tests_has_empty_and_many_boxes() -> None:
    cuts = [cut(whole(), 3, rank, seed) for rank in range(3) for seed in range(1, 9)]
    boxes = [part.box for parts in cuts for part in parts.values()]
    assert any(box.numel == 0 and 0 not in box.whole for box in boxes)
    assert any(0 < box.shape[-1] < box.whole[-1] for box in boxes if len(box.whole) > 1)


def _save_halves(rank: int, folder: Path) -> None:
    halves = {
        name: Part.whole(tensor)
        if name in {"ids", "mask"}
        else (lambda box: Part(tensor[box.slices], box))(half(tensor, rank))
        for name, tensor in whole().items()
    }
    with Checkpointer(folder, CheckpointConfig(), dist.new_group()) as checkpointer:
        checkpointer.save(1, halves, {"of": rank})


def half(tensor: Tensor, rank: int) -> Box:
    """Rank 0's or rank 1's rows; the upper half is the larger."""
    rows = tensor.shape[0]
    middle = -(-rows // 2)
    box = Box.all_of(tuple(tensor.shape))
    return box.cut(0, range(middle) if rank == 0 else range(middle, rows))


def test_two_ranks_write_two_files_and_each_chunk_once(tmp_path: Path) -> None:
    run_ranks(2, _save_halves, tmp_path)
    manifest = read_manifest(tmp_path / "step_00000001")
    assert sorted(manifest.files) == ["rank_00000.safetensors", "rank_00001.safetensors", STATE]
    chunks = {name: len(entry.chunks) for name, entry in manifest.tensors.items()}
    assert chunks == {
        "experts.w": 2, "experts.moment": 2, "one": 1, "none": 1, "ids": 1, "mask": 1
    }  # fmt: skip


def test_digests_are_those_of_the_whole_tensors_in_every_layout(tmp_path: Path) -> None:
    run_ranks(2, _save_halves, tmp_path)
    wanted = {n: f"{digest(x, Box.all_of(tuple(x.shape))):016x}" for n, x in whole().items()}
    for path in (tmp_path / "step_00000001", save_one(tmp_path / "one", 1, whole())):
        assert {n: e.digest for n, e in read_manifest(path).tensors.items()} == wanted


def _stages(rank: int, folder: Path) -> list[str]:
    """Pipeline stages: each rank has its own layer, and the embedding is on both."""
    group = dist.new_group()
    mine = {f"layer.{rank}": torch.full((3,), float(rank)), "embedding": torch.ones(2)}
    with Checkpointer(folder, CheckpointConfig(), group) as checkpointer:
        checkpointer.save(1, wholes(mine), {})
    into = {name: torch.zeros_like(x) for name, x in mine.items()}
    load_tensors(folder / "step_00000001", wholes(into), group)
    assert all(torch.equal(into[name], mine[name]) for name in mine)
    del into["layer.1" if rank else "embedding"]
    try:
        load_tensors(folder / "step_00000001", wholes(into), group)
    except UserError as error:
        return [str(error)]
    return []


def test_ranks_may_hold_different_layers(tmp_path: Path) -> None:
    first, second = run_ranks(2, _stages, tmp_path)
    assert first == second
    assert "holds tensor 'layer.1', which this run does not have" in first[0]


def _refused(rank: int, folder: Path, case: str) -> str:
    """What saving ``case`` of ``REFUSED`` says on this rank."""
    shape, offset, fill = REFUSED[case][rank]
    box = Box((4, 6), offset, shape)
    with Checkpointer(folder, CheckpointConfig(), dist.new_group()) as checkpointer:
        checkpointer.save(1, {"experts": Part(torch.full(shape, fill), box)}, {})
        try:
            checkpointer.wait()
        except RuntimeError as error:
            return str(error)
    return "saved"


Place = tuple[tuple[int, int], tuple[int, int], float]
REFUSED: dict[str, tuple[Place, Place]] = {
    "'experts' differs between ranks 0 and 1": (((4, 6), (0, 0), 1.0), ((4, 6), (0, 0), 2.0)),
    "ranks 0 and 1 hold overlapping parts of tensor 'experts'": (
        ((3, 6), (0, 0), 1.0),
        ((2, 6), (2, 0), 1.0),
    ),
    "shape [4, 6] at [0, 0] and shape [2, 6] at [0, 0]": (
        ((4, 6), (0, 0), 1.0),
        ((2, 6), (0, 0), 1.0),
    ),
    "no rank holds some of tensor 'experts' of shape [4, 6]": (
        ((1, 6), (0, 0), 1.0),
        ((2, 6), (2, 0), 1.0),
    ),
    "no rank holds some of tensor 'experts'": (((0, 6), (0, 0), 1.0), ((4, 0), (0, 0), 1.0)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_make_up_the_tensor_are_refused(tmp_path: Path, case: str) -> None:
    for message in run_ranks(2, _refused, tmp_path, case):
        assert case in message
    assert list_checkpoints(tmp_path) == []


def test_a_part_must_have_the_shape_of_its_box(tmp_path: Path) -> None:
    wrong = {"w": Part(torch.zeros(2, 3), Box((4, 3), (0, 0), (1, 3)))}
    with (
        Checkpointer(tmp_path, CheckpointConfig()) as checkpointer,
        pytest.raises(ValueError, match=r"'w' has shape \[2, 3\], but its box \[1, 3\]"),
    ):
        checkpointer.save(1, wrong, {})
    path = save_one(tmp_path, 1, {"w": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="'w' has shape"):
        load_tensors(path, wrong)
