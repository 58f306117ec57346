"""Directories that appear whole or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coterie.core.errors import UserError

_ADVICE = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "raise the quota or choose another place",
    errno.EACCES: "choose a place you may write to",
    errno.EROFS: "choose a place you may write to",
}


@contextmanager
def new_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden directory beside ``target`` to fill, which becomes ``target`` when the block ends.

    However the block is left early (an error, Ctrl-C, a full disk) the directory is removed and
    ``target`` is as it was; a process that is killed leaves only the hidden one. ``target`` may
    exist if it is an empty directory, or with ``replace``.

    Raises UserError for every OSError on the way: inside the block too, so that reading must turn
    its own into UserErrors first.
    """
    name = target.name
    tag = uuid.uuid4().hex[:8]
    work = target.with_name(f".{name}.building-{tag}")
    try:
        _refuse_existing(target, replace)
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        yield work
        _flush(work)
        _swap(work, target, target.with_name(f".{name}.old-{tag}"), replace)
        _flush(target.parent)
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        raise UserError(
            f"{target}: cannot be written: {error.strerror or error}"
            + (f"; {advice}" if advice else "")
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_existing(target: Path, replace: bool) -> None:
    if not target.exists() or replace:
        return
    if not target.is_dir():
        raise UserError(f"{target}: is a file, and a directory is to be made there")
    if any(target.iterdir()):
        raise UserError(f"{target}: exists and is not empty; choose another place, or overwrite it")


def _flush(directory: Path) -> None:
    """Make the directory's entries survive a power cut; its files are flushed by their writer."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(work: Path, target: Path, old: Path, replace: bool) -> None:
    if not (replace and target.exists()):
        work.rename(target)  # replaces an empty directory; fails on any other
        return
    target.rename(old)
    try:
        work.rename(target)
    except OSError:
        with suppress(OSError):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
