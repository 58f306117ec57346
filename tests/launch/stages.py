"""Runs of two stages through the command, and what they leave behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coterie.launch.main import main
from coterie.parallel.checkpoint import latest, read_manifest

LOSSES = {"loss", "loss/text"}
NON_CAUSAL = {f"non_causal/{name}" for name in LOSSES}
FORESIGHT = {f"auxiliary/{name}" for name in ("cross_entropy", "agreement", "always_no")}


def write_config(
    name: str, router: dict[str, Any], depths: dict[str, Any] | None = None, **sections: Any
) -> None:
    """NAME.yaml: good.yaml with this router, and blocks that some tokens pass."""
    tree = yaml.safe_load(Path("good.yaml").read_text())
    tree["model"]["moe"]["router"] = router
    tree["model"]["mixture_of_depths"] = depths
    Path(f"{name}.yaml").write_text(yaml.safe_dump({**tree, **sections}))


def coterie_train(*arguments: str) -> int:
    """In one process."""
    return main(["train", *arguments, "--nproc", "1"])


def evaluated(run: str, capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, float]:
    """What `coterie evaluate` measures."""
    capfd.readouterr()
    assert main(["evaluate", run, "--json", *options]) == 0
    found: dict[str, float] = json.loads(capfd.readouterr().out)
    return found


def digests(run: str) -> dict[str, Any]:
    """What the newest checkpoint holds, by name."""
    checkpoint = latest(Path(run, "checkpoints"))
    assert checkpoint is not None
    return {name: entry.digest for name, entry in read_manifest(checkpoint).tensors.items()}
