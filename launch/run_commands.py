"""``coterie train`` and ``resume``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.core.errors import UserError
from coterie.launch import membership
from coterie.launch.arguments import ConfigName, NewRunDir, Overrides, Processes, RunDir, Step
from coterie.launch.ranked import membership_of, new_folder, run_ranked
from coterie.launch.run_folder import saved_config

if TYPE_CHECKING:  # importing torch takes seconds: only when it is needed
    from coterie.launch.config import RunConfig
    from coterie.parallel.trainer import Outcome


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(
        epilog="Example:  coterie train quickstart train.steps=200 --nproc 2 --run-dir runs/first"
    )(train)
    app.command(epilog="Example:  coterie resume runs/quickstart")(resume)


def train(
    config: ConfigName,
    overrides: Overrides = None,
    nproc: Processes = None,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="Not from random weights, but from those of the run in the folder CONFIG. aux: "
            "train auxiliary routers, which foresee what experts choose, so that the model "
            "becomes causal.",
            show_default=False,
        ),
    ] = None,
    run_dir: NewRunDir = None,
) -> int:
    """Train a model. Ctrl-C saves a checkpoint and leaves; 'coterie resume' goes on from it."""
    ours = membership_of(nproc)
    from coterie.launch.load_config import load_config

    if stage is None:
        resolved = load_config(config, overrides or [])
    else:
        from coterie.launch.stage import stage_config

        resolved = stage_config(stage, Path(config), overrides or [])
    from coterie.launch.check import check_data  # imports torch
    from coterie.launch.stage import check_stage

    folder = new_folder(run_dir, resolved.name, ours)
    world = _world(resolved, ours, nproc or default_world(resolved))
    check_data(resolved)
    check_stage(resolved)

    def here() -> "Outcome":
        from coterie.launch.training import train

        return train(resolved, folder)

    return run_ranked(here, ours, world, folder)


def resume(
    run_dir: RunDir, overrides: Overrides = None, nproc: Processes = None, step: Step = None
) -> int:
    """Go on with a run that was interrupted or killed, exactly where a checkpoint left it."""
    ours = membership_of(nproc)
    from coterie.launch.check import check_data
    from coterie.launch.load_config import load_config
    from coterie.launch.run_checkpoints import choose_checkpoint
    from coterie.parallel.checkpoint_format import read_manifest

    resolved = load_config(saved_config(run_dir), overrides or [])
    checkpoint = choose_checkpoint(run_dir, step)
    before = read_manifest(checkpoint).world_size if checkpoint else default_world(resolved)
    world = _world(resolved, ours, nproc or before)
    check_data(resolved)

    def here() -> "Outcome":
        from coterie.launch.training import resume

        return resume(resolved, run_dir, step)

    return run_ranked(here, ours, world, run_dir)


def default_world(config: "RunConfig") -> int:
    """One process for each GPU, or as many as fit the config; on a CPU as few as can be."""
    import torch

    from coterie.launch.check import check_world
    from coterie.parallel.rules import smallest_world

    for world in range(torch.cuda.device_count(), 0, -1):
        try:
            check_world(config, world)
        except UserError:
            continue
        return world
    return torch.cuda.device_count() or smallest_world(config.parallel)


def _world(config: "RunConfig", ours: membership.Membership | None, wanted: int) -> int:
    """How many processes the run has; raises UserError when it cannot have so many."""
    import torch

    from coterie.launch.check import check_world

    world = ours.world if ours is not None else wanted
    gpus = torch.cuda.device_count()
    if ours is None and gpus and world > gpus:
        raise UserError(
            f"{world} processes were asked for, but this machine has {gpus} GPUs, one for each"
        )
    check_world(config, world)
    return world
