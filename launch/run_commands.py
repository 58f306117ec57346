"""``coterie train``, ``resume``, ``evaluate`` and ``generate``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.core.errors import UserError
from coterie.launch import membership
from coterie.launch.config_file import shipped_names
from coterie.launch.processes import Ended, command_of_this_process, run_ranks

if TYPE_CHECKING:  # importing torch takes seconds: only when it is needed
    from coterie.launch.config import RunConfig
    from coterie.parallel.trainer import Outcome

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]
ConfigName = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help=f"A YAML file, or the name of a shipped config: {', '.join(shipped_names())}.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.SUB=VALUE",
        help="Settings that replace the file's, such as train.steps=100; the value is YAML. "
        "All settings: coterie config schema",
        show_default=False,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        metavar="N",
        help="Processes to start on this machine. Without it: one for each GPU; on a CPU as few "
        "as `parallel` can have; when resuming, as many as before. Not under torchrun or srun, "
        "which start them.",
        show_default=False,
    ),
]
Step = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="STEP",
        help="The checkpoint to use, by its step. Without it: the newest.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(
        epilog="Example:  coterie train quickstart train.steps=200 --nproc 2 --run-dir runs/first"
    )(train)
    app.command(epilog="Example:  coterie resume runs/quickstart")(resume)
    app.command(epilog="Example:  coterie evaluate runs/quickstart --step 200")(evaluate)
    app.command(
        epilog='Example:  coterie generate runs/quickstart --prompt "a digit seven" --count 4'
    )(generate)


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
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where checkpoints, metrics and images go. Without it: runs/NAME, NAME being "
            "the config's.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Train a model. Ctrl-C saves a checkpoint and leaves; 'coterie resume' goes on from it."""
    ours = membership_of(nproc)
    from coterie.launch.load_config import load_config

    if stage is None:
        resolved = load_config(config, overrides or [])
    else:
        from coterie.launch.stage import stage_config

        resolved = stage_config(stage, Path(config), overrides or [])
    from coterie.launch.check import check_data, check_fresh  # imports torch
    from coterie.launch.stage import check_stage

    folder = run_dir or Path("runs") / resolved.name
    if ours is None or (ours.rank == 0 and ours.starter != "coterie"):
        check_fresh(folder)
    world = _world(resolved, ours, nproc or default_world(resolved))
    check_data(resolved)
    check_stage(resolved)

    def here() -> "Outcome":
        from coterie.launch.training import train

        return train(resolved, folder)

    return run_ranked(here, ours, world, lambda: _how_to_go_on(folder))


def resume(
    run_dir: RunDir, overrides: Overrides = None, nproc: Processes = None, step: Step = None
) -> int:
    """Go on with a run that was interrupted or killed, exactly where a checkpoint left it."""
    ours = membership_of(nproc)
    from coterie.launch.check import check_data, saved_config
    from coterie.launch.load_config import load_config
    from coterie.launch.training import choose_checkpoint, resume
    from coterie.parallel.checkpoint import read_manifest

    resolved = load_config(saved_config(run_dir), overrides or [])
    checkpoint = choose_checkpoint(run_dir, step)
    before = read_manifest(checkpoint).world_size if checkpoint else default_world(resolved)
    world = _world(resolved, ours, nproc or before)
    check_data(resolved)
    return run_ranked(
        lambda: resume(resolved, run_dir, step), ours, world, lambda: _how_to_go_on(run_dir)
    )


def evaluate(
    run_dir: RunDir,
    step: Step = None,
    k: Annotated[
        str | None,
        typer.Option(
            help="Experts for each token: the loss at each of these, as in 1,2,4.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --k: draw the losses too, as PNG, SVG or PDF.",
            show_default=False,
        ),
    ] = None,
    non_causal: Annotated[
        bool,
        typer.Option(
            "--non-causal",
            help="Also where routers look at later tokens; such losses are marked non_causal.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a checkpoint on the held-out data: losses in nats per token."""
    if plot is not None and k is None:
        raise UserError("--plot draws losses by the number of experts: it needs --k, as in 1,2,4")
    if plot is not None:
        from coterie.launch.loss_figure import check_plot

        check_plot(plot)
    from coterie.launch.check import saved_config
    from coterie.launch.evaluation import evaluate, losses_by_k
    from coterie.launch.load_config import load_config

    config = load_config(saved_config(run_dir))
    if k is not None:
        _evaluate_by_k(losses_by_k(config, run_dir, step, k, non_causal), plot, as_json)
        return
    metrics = evaluate(config, run_dir, step, non_causal)
    if as_json:
        print(json.dumps(metrics, indent=1))
        return
    width = max(12, *map(len, metrics))
    for name, value in metrics.items():
        shown = f"{value:.0f} of 10 read" if name == "digits" else f"{value:.4f}"
        print(f"{name:<{width}} {shown}")


def _evaluate_by_k(losses: dict[int, dict[str, float]], plot: Path | None, as_json: bool) -> None:
    from coterie.launch.loss_figure import draw_losses, loss_lines

    print(json.dumps(losses, indent=1) if as_json else "\n".join(loss_lines(losses)))
    if plot is not None:
        draw_losses(losses, plot)


def generate(
    run_dir: RunDir,
    prompt: Annotated[str, typer.Option(help="The text to continue.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="How many continuations.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="New tokens of each, at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")
    ] = 0.7,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Choose among this many likeliest tokens only.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds draw equal samples.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where images go, as PNG. Without it: RUN_DIR/generated.",
            show_default=False,
        ),
    ] = None,
    step: Step = None,
) -> None:
    """Continue a prompt: text to the terminal, images to PNG files."""
    from coterie.launch.check import saved_config
    from coterie.launch.generation import generate
    from coterie.launch.load_config import load_config

    for sample in generate(
        load_config(saved_config(run_dir)),
        run_dir,
        prompt,
        count=count,
        length=length,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        out=out or run_dir / "generated",
        step=step,
    ):
        print(sample.text)
        for image in sample.images:
            print(f"  image: {image}")


def membership_of(nproc: int | None) -> membership.Membership | None:
    """This process's place; raises UserError when it has one and ``nproc`` is given as well."""
    ours = membership.join()
    if ours is not None and ours.starter != "coterie" and nproc is not None:
        raise UserError(
            f"--nproc {nproc} cannot be given under {ours.starter}, which started {ours.world} "
            "processes already; leave it out"
        )
    return ours


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


def run_ranked(
    here: Callable[[], "Outcome"],
    ours: membership.Membership | None,
    world: int,
    how_to_go_on: Callable[[], str],
) -> int:
    """In this process when it is a rank or the only one; else in ``world`` processes."""
    if ours is None and world > 1:
        return _tell(run_ranks(command_of_this_process(), world), how_to_go_on)
    outcome = here()
    if outcome.finished:
        return 0
    if ours is None:
        print(f"coterie: interrupted; {how_to_go_on()}", file=sys.stderr)
    return 130


def _tell(ended: Ended, how_to_go_on: Callable[[], str]) -> int:
    """Say how a group of ranks ended; the exit code."""
    failure = ended.failure
    if failure is None:
        if ended.interrupted:
            print(f"coterie: interrupted; {how_to_go_on()}", file=sys.stderr)
        return 130 if ended.interrupted else 0
    if failure.code == 2 and failure.text:
        raise UserError(failure.text)
    how = failure.how()
    if "\n" in failure.text:
        print(failure.text.rstrip(), file=sys.stderr)
        how = f"rank {failure.rank} failed as shown above"
    elif failure.text:
        how = failure.text
    print(f"coterie: {how}; {how_to_go_on()}", file=sys.stderr)
    return 2 if failure.code == 2 else 1


def _how_to_go_on(run_dir: Path) -> str:
    from coterie.launch.check import CONFIG

    if not (run_dir / CONFIG).exists():
        return "nothing was saved yet, so start it again"
    return f"go on with: coterie resume {run_dir}"
