"""The format of a checkpoint: its names, its manifest, and the checks that a reader makes.

``<run>/checkpoints/step_00000100/`` holds one safetensors file per rank that had something to
write, ``state.json``, and ``manifest.json``, which lists the others with their checksums and says
where every chunk of every tensor is. What carries a checkpoint's name was once complete
(:mod:`coterie.parallel.checkpoint_store` sees to that), so one that is not complete now was damaged
later: an error to report, never one to skip. Reading executes nothing: it is JSON and raw bytes.
"""

import hashlib
import json
import re
import stat
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coterie.core.box import Box
from coterie.core.errors import UserError
from coterie.parallel.checkpoint_plan import covers

FORMAT = "coterie checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
STATE = "state.json"

_COMPLETE = re.compile(r"step_(\d{8,})")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Strict):
    """A file of the checkpoint: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


class ChunkEntry(_Strict):
    """A box of a tensor, and the file that holds it under the tensor's name."""

    file: str
    offset: list[int]
    shape: list[int]


class TensorEntry(_Strict):
    """A whole tensor, made of chunks that cover it: however it was sharded, any layout can read."""

    dtype: str
    shape: list[int]
    digest: str = Field(pattern=r"^[0-9a-f]{16}$")
    """Of the content (:mod:`coterie.core.digest`), in hexadecimal: the same in every layout."""
    chunks: list[ChunkEntry]

    def box(self, chunk: ChunkEntry) -> Box:
        """Where ``chunk`` lies in the tensor."""
        return Box(tuple(self.shape), tuple(chunk.offset), tuple(chunk.shape))


class Manifest(_Strict):
    """What a checkpoint consists of."""

    step: int
    world_size: int
    versions: dict[str, str]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


class _Envelope(_Strict):
    """The manifest file: the format's version stands outside what a later version may change."""

    format: Literal["coterie checkpoint"]
    version: int
    checksum: str
    manifest: dict[str, Any]


def folder_name(step: int) -> str:
    """``step_00000100`` for 100: names sort as their steps do."""
    return f"step_{step:08d}"


def is_named_checkpoint(path: Path) -> bool:
    """Whether ``path`` is called as a checkpoint is; there may be none."""
    return _COMPLETE.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    match = _COMPLETE.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path} is not a checkpoint: those are folders named like step_00000100")
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest step first; none when the folder does not exist.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        named = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name)]
        return sorted((path for path in named if path.is_dir()), key=step_of)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot list the checkpoints in {folder}: {error.strerror}") from error


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, or None. Whether it is undamaged, reading will tell."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


class _Damage(Exception):
    """Why a checkpoint cannot be used, as the middle of a sentence."""


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``, checked against its own checksum.

    Raises:
        UserError: ``path`` is no checkpoint, is damaged, or is of another format version.
    """
    try:
        return _manifest(path)
    except _Damage as damage:
        raise damaged(path, str(damage)) from damage


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of the checkpoint at ``path``: step, sampler, config, …

    Raises:
        UserError: as :func:`read_manifest`.
    """
    try:
        manifest = _manifest(path)
        _check_file(path, STATE, manifest.files[STATE])
        state = _parse_json(path / STATE)
    except _Damage as damage:
        raise damaged(path, str(damage)) from damage
    return state


def verify(path: Path) -> None:
    """Compare the size and checksum of every file with the manifest.

    Raises:
        UserError: as :func:`read_manifest`; names the first bad file.
    """
    if reason := find_damage(path):
        raise damaged(path, reason)


def find_damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None; of its files, checks every ``shares``-th one."""
    try:
        manifest = _manifest(path)
        for name in sorted(manifest.files)[share::shares]:
            _check_file(path, name, manifest.files[name])
    except _Damage as damage:
        return str(damage)
    return None


def damaged(path: Path, reason: str) -> UserError:
    """The error for a damaged checkpoint, with the way to resume from the newest good one."""
    folder = path.parent
    for other in reversed(list_checkpoints(folder)):
        if other != path and _is_good(other):
            way_out = (
                f"the newest undamaged one is of step {step_of(other)}, "
                f"resume from it with: coterie resume {folder.parent} --step {step_of(other)}"
            )
            break
    else:
        way_out = f"there is no other undamaged one in {folder}"
    return UserError(f"checkpoint {path} is damaged: {reason}; {way_out}")


def _is_good(path: Path) -> bool:
    try:
        return find_damage(path) is None
    except UserError:  # of another format version, or not readable
        return False


def looks_complete(path: Path) -> bool:
    """Whether manifest and file sizes are right: quick, reads no tensor."""
    try:
        manifest = _manifest(path)
        for name, entry in manifest.files.items():
            _check_size(path, name, entry)
    except (_Damage, UserError):
        return False
    return True


def _manifest(path: Path) -> Manifest:
    step = step_of(path)
    _check_exists(path)
    raw = _parse_json(path / MANIFEST)
    if raw.get("format") == FORMAT and isinstance(raw.get("version"), int):
        version = raw["version"]
        if version > VERSION:
            raise UserError(
                f"checkpoint {path} has format version {version}, written by a newer coterie; "
                f"this one reads version {VERSION}"
            )
        if version < 1:
            raise _Damage(f"{MANIFEST} has format version {version}, which never existed")
        if version < VERSION:
            raise UserError(
                f"checkpoint {path} has format version {version}, written by an older coterie; "
                f"this one reads version {VERSION}"
            )
    try:
        envelope = _Envelope.model_validate(raw)
        if envelope.checksum != checksum(envelope.manifest):
            raise _Damage(f"{MANIFEST} does not match its own checksum")
        manifest = Manifest.model_validate(envelope.manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _Damage(f"{MANIFEST} is not a manifest ({where}: {first['msg']})") from error
    if manifest.step != step:
        raise _Damage(f"{MANIFEST} is of step {manifest.step}, not {step}")
    _check_consistent(manifest)
    return manifest


def _check_exists(path: Path) -> None:
    try:
        if path.is_dir():
            return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    steps = [str(step_of(other)) for other in list_checkpoints(path.parent)]
    there_are = f"there are those of steps {', '.join(steps)}" if steps else "there is none"
    raise UserError(f"there is no checkpoint {path.name} in {path.parent}; {there_are}")


def _check_consistent(manifest: Manifest) -> None:
    """Names stay inside the folder, and the chunks of each tensor cover it."""
    for name in (STATE, *manifest.files):
        if name not in manifest.files or "/" in name or name.startswith("."):
            raise _Damage(f"{MANIFEST} lists its files wrongly: {name!r}")
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            inside = len(chunk.offset) == len(chunk.shape) == len(tensor.shape) and all(
                min(start, length) >= 0 and start + length <= size
                for start, length, size in zip(chunk.offset, chunk.shape, tensor.shape, strict=True)
            )
            if not inside or chunk.file not in manifest.files:
                raise _Damage(f"{MANIFEST} places a chunk of tensor {name!r} wrongly")
        boxes = [tensor.box(chunk) for chunk in tensor.chunks]
        if not boxes or not covers(tensor.shape, boxes):
            raise _Damage(f"the chunks of tensor {name!r} in {MANIFEST} do not cover it")


def _parse_json(path: Path) -> dict[str, Any]:
    try:
        _check_regular(path)
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _Damage(f"{path.name} is missing") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _Damage(f"{path.name} is not JSON") from error
    if not isinstance(value, dict):
        raise _Damage(f"{path.name} is not a JSON object")
    return value


def _check_regular(path: Path) -> None:
    """No links or pipes: a checkpoint from a stranger names files of its own folder only."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise _Damage(f"{path.name} is not a regular file")


def _check_size(path: Path, name: str, entry: FileEntry) -> None:
    try:
        _check_regular(path / name)
        size = (path / name).stat().st_size
    except FileNotFoundError as error:
        raise _Damage(f"{name} is missing") from error
    except OSError as error:
        raise UserError(f"cannot read {path / name}: {error.strerror}") from error
    if size != entry.size:
        raise _Damage(f"{name} has {size} bytes and should have {entry.size}")


def _check_file(path: Path, name: str, entry: FileEntry) -> None:
    _check_size(path, name, entry)
    try:
        with (path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path / name}: {error.strerror}") from error
    if digest != entry.sha256:
        raise _Damage(f"the content of {name} does not match its checksum")


def checksum(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
