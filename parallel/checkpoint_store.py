"""Writing checkpoints so that a kill at any moment costs nothing that was complete.

A save works in a hidden folder, ``.step_00000100.<token>.partial``; its manifest is written last,
and one rename gives it its name. Deleting starts with a rename to a hidden name as well.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

from coterie.core.errors import UserError
from coterie.parallel.checkpoint_format import (
    FORMAT,
    MANIFEST,
    VERSION,
    FileEntry,
    Manifest,
    checksum,
    folder_name,
    list_checkpoints,
    looks_complete,
    step_of,
)

_HIDDEN = re.compile(r"\.(step_\d{8,})\.\w+\.(partial|replaced|deleted)")


def write_file(path: Path, content: bytes) -> FileEntry:
    """Write and fsync ``content``.

    Raises:
        OSError: the disk is full, …
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_manifest(partial: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint."""
    body = manifest.model_dump()
    envelope = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": checksum(body),
        "manifest": body,
    }
    write_file(partial / MANIFEST, json.dumps(envelope).encode())


def partial_path(folder: Path, step: int, token: str) -> Path:
    """Where a save works; ``token`` sets this run's apart from those of one that died."""
    return folder / f".{folder_name(step)}.{token}.partial"


def publish(partial: Path) -> Path:
    """Give a finished save its name; an older checkpoint of the same step is replaced.

    Should the process die between the two renames of a replacement, :func:`recover` restores the
    old one.
    """
    folder = partial.parent
    match = _HIDDEN.fullmatch(partial.name)
    assert match is not None
    final = folder / match[1]
    replaced = partial.with_suffix(".replaced")
    sync_folder(partial)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)  # what stays, recover() removes
    return final


def retire(folder: Path, newest: int, keep: int) -> None:
    """Delete all but the ``keep`` last complete checkpoints up to step ``newest``.

    Checkpoints of later steps are of a past that this run has left by resuming from an earlier
    one: they go too, or the next resume would return to that past. A damaged checkpoint does not
    count as one to keep.
    """
    kept = 0
    for path in reversed(list_checkpoints(folder)):
        if step_of(path) <= newest and kept < keep:
            kept += looks_complete(path)
            continue
        doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.deleted")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)  # what stays, recover() removes


def recover(folder: Path) -> None:
    """Clean up after a run that died while saving. Only for the holder of the :class:`RunLock`."""
    for path in sorted(folder.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "replaced" and not (folder / match[1]).exists():
            path.rename(folder / match[1])
        else:
            # An orphaned rank of the dead run may still be adding files: then the next start
            # finishes this. Its files cannot get into ours, whose names have another token.
            shutil.rmtree(path, ignore_errors=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunLock:
    """Held by rank 0 of the one live run that writes into a checkpoints folder.

    A POSIX record lock: the kernel drops it when the process ends, however it ends; children do
    not inherit it; it works over NFS.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            UserError: another live process holds it.
            OSError: the folder cannot be written, or its file system has no locks.
        """
        self._file = (folder / ".lock").open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"a run is still writing checkpoints to {folder} ({holder}); "
                f"wait until it ends, or end it"
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Give the lock back; harmless when done twice."""
        with contextlib.suppress(ValueError):  # closed already
            self._file.close()
