"""certificates.jsonl: the hashes of a run's steps, all that were ever taken."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import IO

from coterie.core.errors import UserError
from coterie.parallel.certificate import Certificate
from coterie.parallel.monitors.base import Monitor, RunFacts

FILE = "certificates.jsonl"


class Certificates(Monitor):
    """Appends only: a step that a resumed run takes again stands there again, to be compared."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def start(self, facts: RunFacts) -> None:
        path = facts.folder / FILE
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", buffering=1)
        if cut:  # a kill may cut the last line
            self._file.write("\n")

    def certificate(self, certificate: Certificate) -> None:
        assert self._file is not None, "start() comes first"
        self._file.write(json.dumps(asdict(certificate)) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_certificates(run_dir: Path) -> list[Certificate]:
    """All certificates of the run in ``run_dir``, in the order they were written; lines that a kill
    cut are left out.

    Raises:
        UserError: there is none.
    """
    path = run_dir / FILE
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    found = []
    for line in lines:
        try:
            found.append(Certificate(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    if not found:
        raise UserError(f"{path} holds no certificate yet")
    return found
