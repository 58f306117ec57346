"""Every router trains with the same numbers in every layout; so do frozen parameters and schedules
of k, also after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.comm.objects import gather_objects
from coterie.core.digest import digest
from coterie.launch.config import RunConfig
from coterie.launch.placement import boxes_of_rank
from coterie.parallel.checkpoint import read_manifest
from coterie.parallel.evaluate import evaluate
from coterie.parallel.rules import layout_of
from coterie.parallel.trainer import Trainer
from tests.distributed import run_ranks
from tests.parallel.tiny import ALONE, Recorder, checkpointer_of, trainer_of
from tests.parallel.whole_runs import Found, check_close, on_ranks, router_config, run

STEPS, HALF = 3, 1
ROUTERS: dict[str, dict[str, Any]] = {
    "random": {"kind": "random_fixed", "first_k": 1, "k": 4},
    "bias": {
        "kind": "top_k",
        "k": 2,
        "score": "sigmoid",
        "bias_update": 0.05,
        "sequence_loss": 0.3,
        "jitter": 0.1,
    },
    "modality": {"kind": "modality", "experts": [6, 2]},
    "expert_choice": {"kind": "expert_choice", "capacity_factor": 1.5},
    "sinkhorn": {"kind": "sinkhorn", "k": 2},
    "hash": {"kind": "hash", "k": 2},
    "mlp": {"kind": "mlp", "hidden": 8, "skip": True, "bias_update": 0.05, "jitter": 0.1},
}
FROZEN = ("random", "bias", "mlp")
LAYOUTS: dict[str, dict[str, Any]] = {
    "shards": {"ep": 2, "dp_shard": 2},
    "pipeline of shards": {"pp": 2, "dp_shard": 2},
    "tensor and expert parallel": {"tp": 2, "ep": 2},
    "context parallel": {"cp": 2, "ep": 4},
}


def config_of(data: Path, router: str, parallel: dict[str, Any] | None = None) -> RunConfig:
    return router_config(data, ROUTERS[router], STEPS, HALF, parallel)


def frozen_hashes(trainer: Trainer) -> dict[str, int]:
    """Of each frozen parameter of the model, over all ranks."""
    model, own = trainer.model, {}
    for name, parameter in model.named():
        if not parameter.requires_grad:
            part = model.part(name, parameter)
            own[name] = digest(part.tensor, part.box) if part.owner else 0
            assert parameter.grad is None and name not in trainer.optimizer.parameters
    sums: dict[str, int] = {}
    for hashes in gather_objects(own, trainer.ranks.control):
        for name, value in hashes.items():
            sums[name] = (sums.get(name, 0) + value) % 2**64
    return sums


Observed = tuple[dict[str, float], dict[str, int], dict[str, int]]


def observe(config: RunConfig, trainer: Trainer, folder: Path) -> Observed:
    """Held-out losses (with one expert where it can be said), and frozen parameters before and
    after."""
    before = frozen_hashes(trainer)
    assert trainer.run(folder).finished
    moe = config.model.moe
    one = 1 if moe is not None and hasattr(moe.router, "k") else None
    losses = evaluate(trainer.model, trainer.held_out, "fp64", 8, k=one)
    return losses, before, frozen_hashes(trainer)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Found]]:
    """Runs in one process, and their folder."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {
        name: run(config_of(data, name), ALONE, folder / name, observe) for name in ROUTERS
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_one_process(
    layout: str, alone: tuple[Path, dict[str, Found]], data: Path, tmp_path: Path
) -> None:
    folder, truths = alone
    configs = {router: config_of(data, router, LAYOUTS[layout]) for router in truths}
    results = run_ranks(4, on_ranks, configs, observe, tmp_path, folder, FROZEN, timeout=180)
    for found in results:
        for router, (truth, (losses, before, after)) in truths.items():
            whole, *resumed = found[router]
            check_close(whole[0], truth)
            for second_half in resumed:
                check_close(second_half[0], truth[HALF:])
            for _, ours in (whole, *resumed):
                assert ours[0] == pytest.approx(losses, rel=1e-9)
                assert ours[2] == after
            assert whole[1][1] == before and len(before) == (2 if router in FROZEN else 0)
    for router, config in configs.items():
        # what the checkpoint holds is what the ranks were said to hold
        held = read_manifest(tmp_path / router / "whole/checkpoints" / f"step_{STEPS:08d}").tensors
        said: set[str] = set()
        for rank in range(4):
            said |= set(boxes_of_rank(config, layout_of(config.parallel, 4, config.model), rank))
        assert said == set(held)
        frozen = truths[router][1][1]
        assert not [
            name for name in held for other in frozen if name.startswith(f"optimizer.{other}")
        ]


def test_the_random_router_stays_and_k_grows(alone: tuple[Path, dict[str, Found]]) -> None:
    reports, (_, before, after) = alone[1]["random"]
    assert before == after
    rows = [sum(report["load"][1]) / report["tokens"] for report in reports]
    assert rows == [1, 2, 3]


def test_biases_follow_the_loads(data: Path, tmp_path: Path) -> None:
    config = config_of(data, "bias")
    recorder = Recorder()
    with checkpointer_of(config, tmp_path, ALONE) as checkpointer:
        trainer = trainer_of(config, ALONE, checkpointer, [recorder])
        trainer.run(tmp_path)
    for layer in (1, 2):
        expected = torch.zeros(8, dtype=torch.float64)
        for report in recorder.reports:
            load = report["load"][layer]
            for expert, rows in enumerate(load):
                mean = sum(load) / 8
                expected[expert] += 0.05 * ((rows < mean) - (rows > mean))
        (decoder,) = trainer.model.decoders
        bias = decoder.get_parameter(f"blocks.{layer}.moe.router.bias")
        assert bool(expected.any())
        torch.testing.assert_close(bias.detach(), expected)
