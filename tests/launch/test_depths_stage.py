"""Blocks that some tokens pass, through the commands: what looks at later tokens says so, a second
stage makes it causal, and so does a predictor trained beside."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coterie.launch.load_config import load_config
from coterie.launch.main import main
from tests.launch.test_stage import FORESIGHT, LOSSES, NON_CAUSAL, digests


def train(name: str, depths: dict[str, Any], router: dict[str, Any]) -> None:
    tree = yaml.safe_load(Path("good.yaml").read_text())
    tree["model"] |= {"mixture_of_depths": depths}
    tree["model"]["moe"]["router"] = router
    Path(f"{name}.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", f"{name}.yaml", "--run-dir", name, "--nproc", "1"]) == 0


def held_out(run: str, capfd: pytest.CaptureFixture[str]) -> dict[str, float]:
    capfd.readouterr()
    assert main(["evaluate", run, "--json"]) == 0
    found: dict[str, float] = json.loads(capfd.readouterr().out)
    return found


def test_a_second_stage_for_depths_and_experts(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train("first", {"capacity": 0.5}, {"kind": "expert_choice"})
    told = capfd.readouterr().err
    assert "router expert_choice and mixture_of_depths look at later tokens, so losses" in told
    assert main(["evaluate", "first"]) == 2
    told = capfd.readouterr().err
    assert "mixture_of_depths look at later tokens" in told and "--stage aux" in told
    assert main(["train", "first", "--stage", "aux", "--run-dir", "second", "--nproc", "1"]) == 0
    model = load_config("second/config.yaml").model
    assert model.mixture_of_depths is not None and model.mixture_of_depths.auxiliary
    kept, weights = digests("first"), digests("second")
    new = {name for name in weights if name.startswith("model.") and name not in kept}
    assert {"model.blocks.0.depths.predictor.w_in", "model.blocks.0.depths.predictor.w_out"} <= new
    assert all("predictor" in name or "auxiliary" in name for name in new)
    assert not {n for n in kept if n.startswith("model.") and weights[n] != kept[n]}
    assert held_out("second", capfd).keys() == LOSSES | NON_CAUSAL | FORESIGHT
    assert main(["generate", "second", "--prompt", "ab", "--length", "3"]) == 0


def test_depths_alone(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train("plain", {"capacity": 0.5}, {"k": 1})
    assert "note: mixture_of_depths looks at later tokens" in capfd.readouterr().err
    assert main(["generate", "plain", "--prompt", "ab"]) == 2
    assert main(["train", "plain", "--stage", "aux", "--run-dir", "second", "--nproc", "1"]) == 0
    metrics = held_out("second", capfd)
    assert metrics.keys() == LOSSES | NON_CAUSAL | FORESIGHT
    assert 0 < metrics["auxiliary/agreement"] <= 1

    train("joint", {"capacity": 0.5, "predictor": True}, {"k": 1})
    assert "look at later tokens" not in capfd.readouterr().err
    assert held_out("joint", capfd).keys() == LOSSES | NON_CAUSAL | FORESIGHT
    assert main(["generate", "joint", "--prompt", "ab", "--length", "3"]) == 0
    capfd.readouterr()
    assert main(["train", "joint", "--stage", "aux"]) == 2
    assert "causal as it is" in capfd.readouterr().err
