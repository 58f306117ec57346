"""Tensors in and out of a checkpoint: ``torch.distributed.checkpoint`` with safetensors files.

DCP carries plans and results between the ranks, and an exception of any rank to all. What each rank
holds is told by boxes (:class:`coterie.parallel.part.Part`), so any layout can be loaded on any
other. DCP's own formats are not used: the default one keeps a pickle, and its safetensors writer
copies each file twice in memory, refuses strided tensors and keeps no checksums. Ours streams each
rank's chunks into one file, and hands their places, checksums and digests to the manifest.
"""

import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, StorageWriter
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from coterie.core.box import Box
from coterie.parallel.checkpoint_file import (
    DTYPES,
    SAFETENSORS,
    WrittenFile,
    rank_file,
    raw,
    write_safetensors,
)
from coterie.parallel.checkpoint_format import Manifest
from coterie.parallel.checkpoint_plan import Chunk, assign
from coterie.parallel.part import Part

# What DCP says of every save by a single process, where it is what was asked for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

Staged = dict[Chunk, Tensor]
"""A rank's chunks, copied to CPU memory: training may go on."""


class Stager:
    """Copies parts into CPU buffers, which it keeps for the next time.

    Fresh memory costs more than the copy itself: the kernel clears each page at first touch.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def stage(self, parts: dict[str, Part]) -> Staged:
        """Copy this rank's ``parts``; a staged copy is valid until the next call.

        Raises:
            ValueError: a dtype that safetensors cannot hold, or a tensor that is not of the shape
                that its box says.
        """
        staged: Staged = {}
        for name, part in parts.items():
            if part.tensor.dtype not in SAFETENSORS or name == "__metadata__":
                raise ValueError(f"tensor {name!r} of {part.tensor.dtype} cannot be saved")
            check_shape(name, part)
            chunk = Chunk.of(name, part.tensor.dtype, part.box)
            staged[chunk] = self._copy(name, part.tensor.detach().reshape(chunk.box.shape))
        self._buffers = {chunk.name: buffer for chunk, buffer in staged.items()}
        return staged

    def _copy(self, name: str, local: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu")
        return buffer.copy_(local)


def check_shape(name: str, part: Part) -> None:
    """Raises ValueError unless the part's tensor is of the shape that its box says."""
    if tuple(part.tensor.shape) != part.box.shape:
        raise ValueError(
            f"tensor {name!r} has shape {list(part.tensor.shape)}, "
            f"but its box {list(part.box.shape)}"
        )


class StagedPlanner(DefaultSavePlanner):
    """Plans a save of staged chunks; of replicas, one rank's is written."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = {chunk.name: (chunk, tensor) for chunk, tensor in staged.items()}

    def create_local_plan(self) -> SavePlan:
        """What this rank holds, with a fingerprint of each chunk."""
        prints = {chunk: _fingerprint(tensor) for chunk, tensor in self._staged.values()}
        return SavePlan([], planner_data=prints)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Who writes what.

        Raises:
            ValueError: parts overlap or leave gaps, or ranks differ in what they hold as replicas
                of one chunk: a tensor split without saying so would lose all parts but one.
        """
        held = [plan.planner_data for plan in all_plans]
        first: dict[Chunk, tuple[int, int]] = {}
        for rank, prints in enumerate(held):
            for chunk, fingerprint in prints.items():
                other, expected = first.setdefault(chunk, (rank, fingerprint))
                if fingerprint != expected:
                    raise ValueError(
                        f"tensor {chunk.name!r} differs between ranks {other} and {rank}: "
                        f"replicas must be equal, and parts must say their box"
                    )
        plans = [SavePlan([_write_item(chunk) for chunk in mine]) for mine in assign(held)]
        return plans, Metadata({})  # the manifest is made of what was written

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def staged(self, item: WriteItem) -> tuple[Chunk, Tensor]:
        """The staged chunk that ``item`` writes."""
        return self._staged[item.index.fqn]


def _write_item(chunk: Chunk) -> WriteItem:
    box, properties = chunk.box, TensorProperties(dtype=chunk.dtype)
    where = _place(box)
    data = TensorWriteData(where, properties, torch.Size(box.whole))
    index = MetadataIndex(chunk.name, where.offsets)
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _place(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))


def _fingerprint(tensor: Tensor) -> int:
    """A checksum of about a thousand elements."""
    flat = tensor.reshape(-1)
    return zlib.crc32(raw(flat[:: max(1, flat.numel() // 1024)].contiguous()))


class TensorWriter(StorageWriter):
    """Writes each rank's chunks into ``partial/rank_00000.safetensors`` with fsync.

    On rank 0, ``finish(files)`` then completes the checkpoint. DCP carries an exception of any
    rank, in any of these steps, to all ranks.
    """

    def __init__(
        self, partial: Path, rank: int, finish: Callable[[list[WrittenFile]], None]
    ) -> None:
        super().__init__()
        self._partial = partial
        self._rank = rank
        self._finish = finish

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Rank 0 alone makes the folder: on others it is missing if the disk is not shared."""
        if self._rank == 0:
            self._partial.mkdir()
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; a rank without chunks writes none."""
        results: list[WriteResult] = []
        if plan.items:
            staged = [cast(StagedPlanner, planner).staged(item) for item in plan.items]
            contents = {chunk: [(chunk.box, tensor)] for chunk, tensor in staged}
            written = write_safetensors(self._partial / rank_file(self._rank), contents)
            results = [WriteResult(plan.items[0].index, written.entry.size, written)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, after all have written."""
        self._finish([result.storage_data for of_rank in results for result in of_rank])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any path."""
        return True


class PartPlanner(DefaultLoadPlanner):
    """Plans what a rank reads: for each of its parts, where saved chunks and its box meet."""

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> LoadPlan:
        """Read items for every part that is not empty."""
        assert self.metadata is not None
        items = []
        for name, part in self._parts.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            if part.box.numel:
                items += create_read_items_for_chunk_list(name, saved, [_place(part.box)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where to write what was read."""
        return self._parts[index.fqn].tensor.detach()


class TensorReader(HuggingFaceStorageReader):
    """Reads chunks where the manifest says they are.

    DCP's reader opens every file on every rank to find out, and infers each tensor's shape from the
    files that happen to be there.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(str(path))
        self._folder = path
        self._manifest = manifest

    def read_metadata(self) -> Metadata:
        """DCP's view of the manifest; nothing is read."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _HFStorageInfo] = {}
        for name, entry in self._manifest.tensors.items():
            dtype = DTYPES[entry.dtype]
            chunks = []
            for chunk in entry.chunks:
                place = _place(entry.box(chunk))
                chunks.append(place)
                places[MetadataIndex(name, place.offsets)] = _HFStorageInfo(
                    relative_path=str(self._folder / chunk.file), shape=place.sizes, dtype=dtype
                )
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(entry.shape), chunks
            )
        return Metadata(state_dict_metadata=tensors, storage_data=places)
