"""`coterie upcycle`: from a trained run to one of a mixture of experts that can be resumed."""

import json
from pathlib import Path

import numpy as np
import pytest

from coterie.data import Vocabulary, write_dataset
from coterie.launch.load_config import load_config
from coterie.launch.main import main
from coterie.parallel.checkpoint import read_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DENSE = ["model.moe=null", "model.feed_forward={hidden: 32}"]
NEW = "runs/new/checkpoints/step_00000000"


@pytest.fixture
def dense(place: Path) -> None:
    """A dense run of good.yaml, of two steps."""
    assert main(["train", "good.yaml", *DENSE, "--run-dir", "runs/dense", "--nproc", "1"]) == 0


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    assert main(["upcycle", *words]) == 2
    sentence = capfd.readouterr().err
    assert sentence.startswith("coterie: ") and sentence.count("\n") == 1
    assert not Path("runs/new").exists() and not list(Path("runs").glob(".*"))
    return sentence


def test_copies_slices_and_what_is_refused(dense: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert "runs/none: there is no such run" in refusal(
        capfd, "runs/none", "good.yaml", "--run-dir", "runs/new"
    )
    assert "model.moe.experts.hidden is 16, but the trained feed-forward of layer 0 has 32" in (
        refusal(capfd, "runs/dense", "good.yaml", "--run-dir", "runs/new")
    )
    assert "runs/dense: exists already" in refusal(
        capfd, "runs/dense", "good.yaml", "--run-dir", "runs/dense"
    )
    copy = ["runs/dense", "good.yaml", "model.moe.experts.hidden=32", "--run-dir", "runs/new"]
    vocabulary = Vocabulary()
    with write_dataset(Path("other"), vocabulary, 32, {"builder": "test"}) as writer:
        for split in ("train", "held_out"):
            writer.add(split, np.full(31, vocabulary.eod, np.uint16))
    assert "the trained run stopped in a dataset with fingerprint" in refusal(
        capfd, *copy, "data.path=other"
    )
    assert "4 data-parallel ranks" in refusal(capfd, *copy, "--nproc", "4", "evaluation.batch=6")

    capfd.readouterr()
    assert main(["upcycle", *copy, "train.steps=3"]) == 0
    said = capfd.readouterr().out
    assert "runs/new: 2 × a dense layer became 2 × 4 experts, after 16 sequences" in said
    assert "coterie resume runs/new" in said
    assert (
        load_config("runs/new/config.yaml").model.moe
        == load_config("good.yaml", ["model.moe.experts.hidden=32"]).model.moe
    )
    assert main(["resume", "runs/new"]) == 0
    lines = Path("runs/new/metrics.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, lines) if "grad_norm" in line] == [3]
    end = read_state(Path("runs/new/checkpoints/step_00000003"))
    assert end["step"] == 3 and end["sampler"]["consumed"] == 5

    cut = ["model.moe.experts.hidden=8", "model.moe.router={kind: random_fixed, k: 4}"]
    words = ["upcycle", "runs/dense", "good.yaml", *cut, "--slice", "--run-dir", "runs/cut"]
    assert main([*words, "--step", "2"]) == 0
    assert main(["resume", "runs/cut"]) == 0
