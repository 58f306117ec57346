"""Blocks that some tokens pass, through the commands: what looks at later tokens says so, a second
stage makes it causal, and so does a predictor trained beside."""

from pathlib import Path
from typing import Any

import pytest

from coterie.launch.load_config import load_config
from coterie.launch.main import main
from tests.launch.stages import (
    FORESIGHT,
    LOSSES,
    NON_CAUSAL,
    coterie_train,
    digests,
    evaluated,
    write_config,
)


@pytest.mark.parametrize(
    "router", [{"kind": "expert_choice"}, {"kind": "modality", "experts": [3, 1]}], ids=str
)
def test_a_second_stage_for_depths_and_experts(
    router: dict[str, Any], place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_config("first", router, {"capacity": 0.5})
    assert coterie_train("first.yaml", "--run-dir", "first") == 0
    both = f"router {router['kind']} and mixture_of_depths look at later tokens"
    assert f"{both}, so losses" in capfd.readouterr().err
    assert main(["evaluate", "first"]) == 2
    told = capfd.readouterr().err
    assert both in told and "--stage aux" in told
    assert coterie_train("first", "--stage", "aux", "--run-dir", "second") == 0
    model = load_config("second/config.yaml").model
    assert model.mixture_of_depths is not None and model.mixture_of_depths.auxiliary
    kept, weights = digests("first"), digests("second")
    new = {name for name in weights if name.startswith("model.") and name not in kept}
    assert {"model.blocks.0.depths.predictor.w_in", "model.blocks.0.depths.predictor.w_out"} <= new
    kinds = {("router.auxiliary" in name, "depths.predictor" in name) for name in new}
    assert kinds == {(True, False), (False, True)}
    assert not {n for n in kept if n.startswith("model.") and weights[n] != kept[n]}
    found = evaluated("second", capfd)
    assert found.keys() == LOSSES | NON_CAUSAL | FORESIGHT
    before = evaluated("first", capfd, "--non-causal")
    assert before.keys() == NON_CAUSAL
    assert before == pytest.approx({name: found[name] for name in before})
    assert main(["generate", "second", "--prompt", "ab", "--length", "3"]) == 0


def test_depths_alone(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_config("plain", {"k": 1}, {"capacity": 0.5})
    assert coterie_train("plain.yaml", "--run-dir", "plain") == 0
    assert "note: mixture_of_depths looks at later tokens" in capfd.readouterr().err
    assert main(["evaluate", "plain"]) == 2
    told = capfd.readouterr().err.strip()
    assert told.endswith(
        "plain: mixture_of_depths looks at later tokens, so its held-out loss is not that of a "
        "causal model; train auxiliary routers, by 'coterie train plain --stage aux', or ask for "
        "that figure with --non-causal"
    )
    assert main(["generate", "plain", "--prompt", "ab"]) == 2
    assert coterie_train("plain", "--stage", "aux", "--run-dir", "second") == 0
    metrics = evaluated("second", capfd)
    assert metrics.keys() == LOSSES | NON_CAUSAL | FORESIGHT
    assert 0 < metrics["auxiliary/agreement"] <= 1

    write_config("joint", {"k": 1}, {"capacity": 0.5, "predictor": True})
    assert coterie_train("joint.yaml", "--run-dir", "joint") == 0
    assert "look at later tokens" not in capfd.readouterr().err
    assert evaluated("joint", capfd).keys() == LOSSES | NON_CAUSAL | FORESIGHT
    assert main(["generate", "joint", "--prompt", "ab", "--length", "3"]) == 0
    capfd.readouterr()
    assert coterie_train("joint", "--stage", "aux") == 2
    assert "causal as it is" in capfd.readouterr().err
