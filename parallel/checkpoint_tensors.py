"""Tensors in and out of a checkpoint: ``torch.distributed.checkpoint`` with safetensors files.

DCP plans which rank writes or reads which chunk of which tensor, so any layout can be loaded on any
other. Its own formats are not used: the default one keeps a pickle, and its safetensors writer
copies each file twice in memory, refuses strided tensors and keeps no checksums. Ours streams each
rank's chunks into one file, and hands their places and checksums to the manifest.
"""

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, StorageWriter
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from coterie.parallel.checkpoint_format import ChunkEntry, FileEntry, Manifest, TensorEntry

# What DCP says of every save by a single process, where it is what was asked for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _SAFETENSORS}


@dataclass(frozen=True)
class Staged:
    """A rank's chunks, copied to CPU memory: training may go on."""

    items: list[WriteItem]
    chunks: dict[str, Tensor]


class Stager:
    """Copies tensors into CPU buffers, which it keeps for the next time.

    Fresh memory costs more than the copy itself: the kernel clears each page at first touch.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def stage(self, tensors: dict[str, Tensor]) -> Staged:
        """Copy this rank's part of ``tensors``; a staged copy is valid until the next call.

        Raises:
            ValueError: a dtype that safetensors cannot hold, a DTensor with Partial placements, or
                a DTensor whose local part is not one box of the whole.
        """
        items: list[WriteItem] = []
        chunks: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in _SAFETENSORS or name == "__metadata__":
                raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot be in a checkpoint")
            local = tensor.detach()
            if isinstance(local, DTensor):
                if local.device_mesh.get_coordinate() is None:
                    continue
                if any(placement.is_partial() for placement in local.placements):
                    raise ValueError(f"tensor {name!r} has Partial placements: reduce it first")
            (item,) = _create_write_items(name, local)
            if isinstance(local, DTensor):
                local = local.to_local()
            assert item.tensor_data is not None
            if local.shape != item.tensor_data.chunk.sizes:
                raise ValueError(f"the local part of tensor {name!r} is not one box of the whole")
            # An empty shard has nothing to write or to list; a tensor empty as a whole is listed.
            if local.numel() == 0 and tensor.numel() > 0:
                continue
            items.append(item)
            chunks[name] = self._copy(name, local)
        self._buffers = chunks
        return Staged(items, chunks)

    def _copy(self, name: str, local: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu")
        return buffer.copy_(local)


class StagedPlanner(DefaultSavePlanner):
    """Plans a save of staged chunks; of replicas, one rank's is written."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def create_local_plan(self) -> SavePlan:
        """This rank's chunks, with a fingerprint of each."""
        prints = {
            i.index: _fingerprint(self._staged.chunks[i.index.fqn]) for i in self._staged.items
        }
        self.plan = SavePlan(self._staged.items, planner_data=prints)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError when ranks differ in what they hold as replicas of one chunk.

        Otherwise a sharded tensor that was not given as a DTensor would lose all shards but one.
        """
        first: dict[MetadataIndex, tuple[int, Any]] = {}
        for rank, plan in enumerate(all_plans):
            for index, fingerprint in plan.planner_data.items():
                other, expected = first.setdefault(index, (rank, fingerprint))
                if fingerprint != expected:
                    raise ValueError(
                        f"tensor {index.fqn!r} differs between ranks {other} and {rank}: "
                        f"replicas must be equal, and shards must be DTensors"
                    )
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The staged chunk."""
        return self._staged.chunks[index.fqn]


def _fingerprint(chunk: Tensor) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and a checksum of about a thousand elements."""
    flat = chunk.reshape(-1)
    sample = flat[:: max(1, flat.numel() // 1024)].contiguous()
    return tuple(chunk.shape), str(chunk.dtype), zlib.crc32(_raw(sample))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Written:
    """A file that a rank has written."""

    name: str
    entry: FileEntry


class TensorWriter(StorageWriter):
    """Writes each rank's chunks into ``partial/rank_00000.safetensors`` with fsync.

    On rank 0, ``finish(files, tensors)`` then completes the checkpoint. DCP carries an exception of
    any rank, in any of these steps, to all ranks.
    """

    def __init__(
        self,
        partial: Path,
        rank: int,
        finish: Callable[[dict[str, FileEntry], dict[str, TensorEntry]], None],
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
        """Without the fingerprints, which have done their work."""
        return [SavePlan(plan.items) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; a rank without chunks writes none."""
        results: list[WriteResult] = []
        if plan.items:
            name = f"rank_{self._rank:05d}.safetensors"
            chunks = [(item.index, cast(Tensor, planner.resolve_data(item))) for item in plan.items]
            written = _Written(name, write_safetensors(self._partial / name, chunks))
            results = [WriteResult(index, chunk.nbytes, written) for index, chunk in chunks]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, after all have written."""
        files: dict[str, FileEntry] = {}
        places: dict[tuple[str, torch.Size | None], str] = {}
        for result in (result for of_rank in results for result in of_rank):
            files[result.storage_data.name] = result.storage_data.entry
            places[result.index.fqn, result.index.offset] = result.storage_data.name
        tensors: dict[str, TensorEntry] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            tensors[name] = TensorEntry(
                dtype=str(entry.properties.dtype).removeprefix("torch."),
                shape=list(entry.size),
                chunks=[
                    ChunkEntry(
                        file=places[name, chunk.offsets],
                        offset=list(chunk.offsets),
                        shape=list(chunk.sizes),
                    )
                    for chunk in entry.chunks
                ],
            )
        self._finish(files, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any path."""
        return True


def write_safetensors(path: Path, chunks: list[tuple[MetadataIndex, Tensor]]) -> FileEntry:
    """Stream chunks into a safetensors file with DCP's sharding information, and fsync it.

    Raises:
        OSError: the disk is full, …
    """
    # Widest elements first: every tensor is then aligned to its element size.
    ordered = sorted(chunks, key=lambda pair: (-pair[1].itemsize, pair[0].fqn))
    header: dict[str, Any] = {}
    offsets = {index.fqn: {"saved_offsets": index.offset} for index, _ in chunks}
    header["__metadata__"] = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": json.dumps(offsets),
    }
    end = 0
    for index, chunk in ordered:
        start, end = end, end + chunk.nbytes
        header[index.fqn] = {
            "dtype": _SAFETENSORS[chunk.dtype],
            "shape": list(chunk.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        start_of_file = memoryview(len(text).to_bytes(8, "little") + text)
        for part in (start_of_file, *(_raw(chunk) for _, chunk in ordered)):
            digest.update(part)
            while part:  # an unbuffered write may be short
                part = part[file.write(part) :]
        os.fsync(file.fileno())
    return FileEntry(size=8 + len(text) + end, sha256=digest.hexdigest())


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
                box = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
                chunks.append(box)
                places[MetadataIndex(name, box.offsets)] = _HFStorageInfo(
                    relative_path=str(self._folder / chunk.file), shape=box.sizes, dtype=dtype
                )
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(entry.shape), chunks
            )
        return Metadata(state_dict_metadata=tensors, storage_data=places)
