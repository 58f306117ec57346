"""Losses by the number of experts, as lines and as a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coterie.core.errors import UserError
from coterie.launch.loss_figure import draw_losses, loss_lines
from coterie.launch.main import main

LOSSES = {1: {"loss": 3.0, "loss/text": 3.5}, 2: {"loss": 2.0, "loss/text": 2.5}}


def test_bars_grow_with_the_loss() -> None:
    lines = loss_lines({**LOSSES, 4: {"loss": 2.5, "loss/text": 3.0}})
    assert [line.count("█") for line in lines] == [30, 0, 15]
    assert lines[1] == "k 2    loss 2.0000  loss/text 2.5000"
    assert [line.count("█") for line in loss_lines({4: {"loss": 2.5}})] == [0]


def test_the_command_draws_what_it_prints(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "good.yaml", "--run-dir", "run", "--nproc", "1"]) == 0
    capfd.readouterr()
    drawn = []
    monkeypatch.setattr(
        "coterie.launch.loss_figure.draw_losses",
        lambda losses, path: (drawn.append(losses), draw_losses(losses, path)),
    )
    assert main(["evaluate", "run", "--k", "1,4", "--plot", "by_k.png", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert [{str(k): found for k, found in losses.items()} for losses in drawn] == [printed]
    pixels_HWC = np.asarray(Image.open("by_k.png").convert("RGB"))
    for colour in ((31, 119, 180), (255, 127, 14)):  # a line for the loss, one for text
        assert (pixels_HWC == colour).all(-1).any()


@pytest.mark.parametrize("path", ["missing/by_k.png", "by_k.odd"])
def test_a_file_that_cannot_be_drawn_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="by_k"):
        draw_losses(LOSSES, tmp_path / path)
