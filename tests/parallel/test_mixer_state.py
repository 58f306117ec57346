"""A mixture's run, saved and restored: bit for bit on the same layout, equal on any other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.parallel.checkpoint import CheckpointConfig, Checkpointer, load_tensors, read_state
from coterie.parallel.environments import ExpertGrid, expert_grid, gather_rows
from coterie.parallel.mixer import MixerConfig, MixerTrainer
from coterie.parallel.mixer_state import mixer_parts, progress, restore_progress
from tests.distributed import run_ranks
from tests.moe.tiny import error
from tests.parallel.tiny_environments import dynamics, linear

CONFIG = MixerConfig(rounds=6, context_steps=3, model_steps=2, gate_every=4, batch=3, lr=0.05)
GATES = ["kmeans", "gradient"]


def _trainer(gate: str, grid: ExpertGrid) -> MixerTrainer:
    router = {"kind": gate, **({"start": "spread"} if gate == "kmeans" else {})}
    return MixerTrainer(dynamics(4, 4, ep=grid.ep, router=router), linear(2, 3), CONFIG, grid)


def _facts(trainer: MixerTrainer, losses: list[float]) -> dict[str, Any]:
    ep, env = trainer.grid.ep, trainer.environments
    facts = {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "contexts": env.context_E,
        "experts": env.expert_E,
        "trajectories": env.trajectories(),
        "gate": trainer.model.router.weight.detach(),
    }
    for name, parameter in trainer.model.experts.named_parameters():
        stacked = parameter.detach().unsqueeze(0)
        facts[name] = gather_rows(stacked, torch.arange(ep.size), ep).flatten(0, 1)
    return facts


def _run(folder: str, gate: str, grid: ExpertGrid) -> dict[str, Any]:
    """Six rounds, with a checkpoint after the third, when contexts have left the experts that the
    gate would give them now: it does so at the next update only."""
    trainer = _trainer(gate, grid)
    losses = [trainer.train_round() for _ in range(3)]
    trainer.environments.expert_E = (trainer.environments.expert_E + 1) % 4
    trainer.environments.migrate()
    with Checkpointer(Path(folder), CheckpointConfig(), grid.world.group) as checkpointer:
        checkpointer.save(3, mixer_parts(trainer), progress(trainer))
    losses += [trainer.train_round() for _ in range(3)]
    return _facts(trainer, losses[3:])


def _resume(folder: str, gate: str, grid: ExpertGrid) -> dict[str, Any]:
    checkpoint = Path(folder) / "step_00000003"
    trainer = _trainer(gate, grid)
    load_tensors(checkpoint, mixer_parts(trainer), grid.world.group)
    restore_progress(trainer, read_state(checkpoint))
    losses = [trainer.train_round() for _ in range(3)]
    return _facts(trainer, losses)


def _on_rank(rank: int, ep: int, folders: dict[str, str], fresh: bool) -> list[dict[str, Any]]:
    grid = expert_grid(ep)
    run = _run if fresh else _resume
    return [run(folder, gate, grid) for gate, folder in folders.items()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Checkpoints of runs on two ranks that share the experts; and how these runs ended."""
    folders = {gate: str(tmp_path_factory.mktemp(gate)) for gate in GATES}
    return folders, run_ranks(2, _on_rank, 2, folders, True, timeout=120)[0]


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (2, 1), (4, 2)])
def test_a_restored_run_goes_on_as_if_never_stopped(
    saved: tuple[dict[str, str], list[dict[str, Any]]], world: int, ep: int
) -> None:
    folders, ends = saved
    for results in run_ranks(world, _on_rank, ep, folders, False, timeout=120):
        for truth, ours in zip(ends, results, strict=True):
            _compare(ours, truth, exact=(world, ep) == (2, 2))


@pytest.mark.parametrize("gate", GATES)
def test_one_process_goes_on_with_what_two_saved(
    saved: tuple[dict[str, str], list[dict[str, Any]]], gate: str
) -> None:
    folders, ends = saved
    ours = _resume(folders[gate], gate, ExpertGrid())
    _compare(ours, ends[GATES.index(gate)], exact=False)
    assert torch.equal(ours["trajectories"], linear(2, 3).y_ENTD)


def _compare(ours: dict[str, Any], truth: dict[str, Any], exact: bool) -> None:
    for name, value in truth.items():
        if exact or value.dtype == torch.int64:
            assert torch.equal(ours[name], value), name
        else:
            assert error(ours[name], value) <= 1e-9, name
