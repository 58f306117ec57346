"""The main job, whole, as `make train` runs it: some three minutes on two cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coterie.data.digits import NAMES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1200)
def test_the_main_job_learns_text_and_digits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COTERIE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "coterie.launch"]
    subprocess.run(
        [*command, "train", "quickstart", "--run-dir", str(run)], env=environment, check=True
    )
    measured = subprocess.run(
        [*command, "evaluate", str(run), "--json"], env=environment, check=True, capture_output=True
    )
    metrics = json.loads(measured.stdout)
    print(metrics)
    assert metrics["loss"] <= 1.7  # nats per token
    assert metrics["digits"] >= 7  # of ten, read by a classifier trained on real digits

    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    maps = {"load", "load/text", "load/image", "ranks"}
    expected = {*maps, *(f"generated/a digit {name}" for name in NAMES)}
    assert set(shown.Tags()["images"]) == expected
    first, last = shown.Scalars("train/loss")[0].value, shown.Scalars("train/loss")[-1].value
    assert last < first / 2
