"""Checkpoints: saved in the background while training goes on, loaded on any layout.

A checkpoint holds tensors (weights, optimizer moments; each rank gives its parts by name) and one
JSON state (step, sampler, config, …). A kill at any moment costs no checkpoint that was complete;
every byte is under a checksum; reading executes nothing from the files.
"""

import importlib.metadata
import json
import platform
import shutil
import threading
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from coterie.comm.objects import from_rank_zero, gather_objects
from coterie.core.errors import UserError, nearest
from coterie.parallel.checkpoint_file import DTYPES, WrittenFile, tensor_entries
from coterie.parallel.checkpoint_format import (
    STATE,
    Manifest,
    damaged,
    find_damage,
    latest,
    list_checkpoints,
    read_manifest,
    read_state,
    verify,
)
from coterie.parallel.checkpoint_store import (
    RunLock,
    partial_path,
    publish,
    recover,
    retire,
    write_file,
    write_manifest,
)
from coterie.parallel.checkpoint_tensors import (
    PartPlanner,
    Staged,
    StagedPlanner,
    Stager,
    TensorReader,
    TensorWriter,
    check_shape,
)
from coterie.parallel.config import CheckpointConfig
from coterie.parallel.part import Part

__all__ = [
    "CheckpointConfig",
    "Checkpointer",
    "latest",
    "list_checkpoints",
    "load_tensors",
    "read_manifest",
    "read_state",
    "verify",
]


class Checkpointer:
    """Saves the checkpoints of one run into a folder; every rank of ``group`` makes one.

    Making it locks the folder for this run and clears what a killed run left half done, so make it
    before asking for the :func:`latest` checkpoint. One per folder in a process.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, group: ProcessGroup | None = None
    ) -> None:
        """``group``: a gloo group of its own over the ranks that save (None: this process alone).

        A background save talks over it while training talks over others.

        Raises:
            UserError: the folder cannot be written, or another live run writes to it.
        """
        self.folder = folder
        self.config = config
        self._group = group
        self._rank = _rank(group)
        self._lock: RunLock | None = None
        self._token: str = from_rank_zero(self._open, group)
        self._stager = Stager()
        self._step = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after ``step`` finished steps."""
        return self.config.every > 0 and step % self.config.every == 0

    def save(self, step: int, parts: dict[str, Part], state: dict[str, Any]) -> None:
        """Copy everything, then write it in the background; every rank calls.

        Waits first for a save still under way. On return the tensors may be overwritten. Ranks may
        have different names (pipeline stages), and empty parts. Together their parts make up each
        tensor: those of two ranks are the same, with equal content, or do not overlap. ``state`` is
        plain JSON; rank 0's is written.

        Raises:
            UserError: the previous save failed for want of space or permission; all ranks raise.
            ValueError: ``state`` is not plain JSON, or a tensor cannot be saved.
            RuntimeError: the previous save failed otherwise: parts that do not fit together, …
        """
        self.wait()
        text = json.dumps(state, allow_nan=False)
        if json.loads(text) != state:
            raise ValueError("state must be plain JSON: string keys, lists, numbers, strings")
        staged = self._stager.stage(parts)
        self._step = step
        if not self.config.asynchronous:
            self._run(step, staged, text)
            self.wait()
            return
        self._thread = threading.Thread(
            target=self._run, args=(step, staged, text), name=f"checkpoint {step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way, if any.

        Raises:
            UserError: it failed for want of space or permission; all ranks raise.
            RuntimeError: it failed otherwise: parts that do not fit together, …
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise self._explain(error) from error

    def close(self) -> None:
        """Wait, and unlock the folder. Raises as :meth:`wait`."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _open(self) -> str:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self.folder)
            recover(self.folder)
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self.folder}: {error.strerror}"
            ) from error
        return token_hex(4)

    def _run(self, step: int, staged: Staged, state: str) -> None:
        partial = partial_path(self.folder, step, self._token)

        def finish(written: list[WrittenFile]) -> None:
            world = 1 if self._group is None else dist.get_world_size(self._group)
            complete(partial, step, world, written, state)
            try:
                retire(self.folder, newest=step, keep=self.config.keep)
            except OSError as error:
                raise UserError(
                    f"cannot delete old checkpoints in {self.folder}: {error.strerror}"
                ) from error

        try:
            dcp.save(
                {},
                storage_writer=TensorWriter(partial, self._rank, finish),
                planner=StagedPlanner(staged),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except BaseException as error:  # DCP's own is not an Exception
            self._error = error
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # gives the space back

    def _explain(self, error: BaseException) -> Exception:
        rank, cause = _first_failure(error)
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, OSError):
            last = latest(self.folder)
            intact = f"the last complete one is {last}" if last else "there is no earlier one"
            return UserError(
                f"the checkpoint of step {self._step} could not be written to {self.folder} "
                f"(rank {rank}: {cause.strerror or cause}); {intact}"
            )
        return RuntimeError(f"saving the checkpoint of step {self._step} failed: {cause}")


def complete(partial: Path, step: int, world: int, written: list[WrittenFile], state: str) -> Path:
    """Add state and manifest to a save whose tensor files are all there, and give it its name."""
    files = {file.name: file.entry for file in written}
    files[STATE] = write_file(partial / STATE, state.encode())
    manifest = Manifest(
        step=step,
        world_size=world,
        versions=_versions(),
        files=files,
        tensors=tensor_entries(written),
    )
    write_manifest(partial, manifest)
    return publish(partial)


def load_tensors(
    path: Path, into: dict[str, Part], group: ProcessGroup | None = None, *, strict: bool = True
) -> None:
    """Check the checkpoint at ``path`` and load it into parts in place; every rank of ``group``.

    Any parts, whatever layout saved it. Together the ranks must ask for every tensor of the
    checkpoint; with ``strict=False`` they may ask for some only (weights without optimizer).
    Nothing is written to the tensors unless all is in order.

    Raises:
        UserError: on all ranks: it is damaged, lacks a tensor, holds one that no rank asks for, or
            one of another shape or dtype.
        ValueError: a part's tensor is not of its box's shape.
    """
    for name, part in into.items():
        check_shape(name, part)
    error: str | None = None
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(path)
        share = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if reason := find_damage(path, *share):
            raise damaged(path, reason)
        _check_match(path, manifest, into)
    except UserError as refusal:
        error = str(refusal)
    answers = gather_objects((error, list(into)), group)
    for problem, _ in answers:
        if problem is not None:
            raise UserError(problem)
    assert manifest is not None
    asked = {name for _, names in answers for name in names}
    for name in manifest.tensors:
        if strict and name not in asked:
            raise UserError(
                f"checkpoint {path} holds tensor {name!r}, which this run does not have"
                f"{nearest(name, asked)}"
            )
    try:
        dcp.load(
            {},
            storage_reader=TensorReader(path, manifest),
            planner=PartPlanner(into),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as failure:
        _, cause = _first_failure(failure)
        if isinstance(cause, SafetensorError | AssertionError | OSError):
            raise damaged(path, f"its files are not what {path.name} lists ({cause})") from failure
        raise RuntimeError(f"loading checkpoint {path} failed: {cause}") from failure


def _check_match(path: Path, manifest: Manifest, into: dict[str, Part]) -> None:
    for name, part in into.items():
        entry = manifest.tensors.get(name)
        if entry is None:
            raise UserError(
                f"checkpoint {path} has no tensor {name!r}{nearest(name, manifest.tensors)}"
            )
        if entry.shape != list(part.box.whole):
            raise UserError(
                f"tensor {name!r} has shape {entry.shape} in checkpoint {path} "
                f"and {list(part.box.whole)} in this run"
            )
        if DTYPES.get(entry.dtype) != part.tensor.dtype:
            raise UserError(
                f"tensor {name!r} is {entry.dtype} in checkpoint {path} "
                f"and {str(part.tensor.dtype).removeprefix('torch.')} in this run"
            )


def _first_failure(error: BaseException) -> tuple[int, BaseException]:
    """The lowest rank that failed, and its exception; rank -1 when the ranks could not tell."""
    if isinstance(error, CheckpointException):
        rank = min(error.failures)
        return rank, error.failures[rank][0]
    return -1, error


def _versions() -> dict[str, str]:
    try:
        coterie = importlib.metadata.version("coterie")
    except importlib.metadata.PackageNotFoundError:
        coterie = "not installed: run from a checkout"
    return {"coterie": coterie, "python": platform.python_version(), "torch": torch.__version__}


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)
