"""What these programs share: their options, their beginning and the file of their figures."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import device


def options(description: str | None) -> argparse.Namespace:
    """``--device``, ``--json`` and ``--rounds``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--rounds", type=int, help="turns of the contenders (9; on the host 1)")
    given = parser.parse_args()
    if given.rounds is None:
        given.rounds = 9 if given.device == "cuda" else 1
    return given


def begin(given: argparse.Namespace) -> torch.device:
    """The device, seeded. Where it cannot run the kernels the program ends, saying why."""
    torch.manual_seed(0)
    try:
        return device.use(given.device)
    except device.Lacking as lack:
        raise SystemExit(str(lack)) from None


class Found:
    """Figures, in a file after each: what has been measured is kept when time is over."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        print(json.dumps(record), flush=True)
        if self.path:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.records))
            partial.replace(self.path)
