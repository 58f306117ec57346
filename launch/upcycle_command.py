"""``coterie upcycle``."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.launch.arguments import ConfigName, Overrides
from coterie.launch.checkpoint_commands import Checkpoint, Step, find, progress
from coterie.launch.run_commands import default_world


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        epilog="Example:  coterie upcycle runs/dense quickstart model.moe.experts.hidden=384 "
        "--run-dir runs/sparse"
    )(upcycle)


def upcycle(
    checkpoint: Checkpoint,
    config: ConfigName,
    run_dir: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The folder to make, of the new run.", show_default=False),
    ],
    overrides: Overrides = None,
    cut: Annotated[
        bool,
        typer.Option(
            "--slice",
            help="Cut each trained feed-forward into its experts, rather than copy it into all.",
        ),
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=1,
            metavar="N",
            help="Processes that will train it. Without it: one for each GPU; on a CPU as few as "
            "`parallel` can have.",
            show_default=False,
        ),
    ] = None,
    step: Step = None,
) -> None:
    """Make a mixture of experts of a trained model; 'coterie resume DIR' then trains it.

    The trained layers are dense, or have one expert for each modality. Routers are drawn anew, the
    optimizer and its schedule begin anew, and the data goes on where the trained run stopped.
    """
    from coterie.launch.load_config import load_config
    from coterie.launch.upcycling import make_run, total_bytes

    source = find(checkpoint, step)
    resolved = load_config(config, overrides or [])
    world = nproc or default_world(resolved)
    with progress("writing", total_bytes(resolved)) as advance:
        made = make_run(source, resolved, run_dir, world, "slice" if cut else "copy", advance)
    print(f"{run_dir}: {made}; train it: coterie resume {run_dir}")
