"""Every kind of router through the commands: train, evaluate, generate, plan."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from coterie.core.errors import UserError
from coterie.launch.evaluation import _check_k
from coterie.launch.load_config import load_config
from coterie.launch.main import main
from coterie.launch.schema import at, kinds
from coterie.moe.routers.config import RouterConfig
from coterie.moe.routers.top_k import TopKConfig

ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"k": 2, "score": "sigmoid", "bias_update": 0.01, "sequence_loss": 0.001},
    "mlp": {"k": 2, "hidden": 8, "skip": True, "bias_update": 0.01},
    "random_fixed": {"k": 4, "first_k": 1},
    "expert_choice": {"capacity_factor": 1.5},
    "modality": {"experts": [3, 1]},
    "hash": {"k": 2},
    "sinkhorn": {"k": 2},
}


def test_all_kinds_are_here_and_top_k_needs_no_name() -> None:
    assert kinds(at(("model", "moe", "router")) or {}) == list(ROUTERS)
    parsed = TypeAdapter(RouterConfig).validate_python({"k": 3})
    assert parsed == TopKConfig(k=3)


def test_k_fits_every_layers_experts() -> None:
    overrides = ["model.expert_counts=[2, 4, 4]", "model.moe.experts.count=8", "parallel.ep=2"]
    config = load_config("quickstart", overrides)
    _check_k(config, 2)
    with pytest.raises(UserError, match="--k 4: k 4 exceeds the 2 experts"):
        _check_k(config, 4)


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_run_of_each_kind(kind: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load(Path("good.yaml").read_text())
    tree["model"]["moe"]["router"] = {"kind": kind, **ROUTERS[kind]}
    Path("kind.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", "kind.yaml", "--run-dir", "run", "--nproc", "1"]) == 0
    assert load_config("run/config.yaml") == load_config("kind.yaml")
    assert main(["resume", "run", "train.steps=3"]) == 0
    capfd.readouterr()
    causal = kind not in ("expert_choice", "modality")
    assert main(["evaluate", "run", "--json"]) == (0 if causal else 2)
    assert main(["generate", "run", "--prompt", "ab", "--length", "3"]) == (0 if causal else 2)
    capfd.readouterr()
    assert main(["evaluate", "run", "--json", "--non-causal"]) == 0
    whole = json.loads(capfd.readouterr().out)
    assert all(name.startswith("non_causal/") != causal for name in whole)
    assert main(["plan", "kind.yaml", "--world", "2", "parallel.ep=2"]) == 0
    capfd.readouterr()

    code = main(["evaluate", "run", "--k", "1,2,4", "--json"])
    captured = capfd.readouterr()
    if not causal:
        assert code == 2 and "--k 1: this router has no k" in captured.err
        return
    losses = json.loads(captured.out)
    assert code == 0 and list(losses) == ["1", "2", "4"]
    configured = str(ROUTERS[kind]["k"])
    assert losses[configured] == pytest.approx({n: whole[n] for n in losses[configured]})
    assert len({found["loss"] for found in losses.values()}) == 3
