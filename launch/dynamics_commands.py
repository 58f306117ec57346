"""``coterie dynamics``: train mixtures of vector fields on environments, and adapt to others."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from coterie.launch import membership
from coterie.launch.arguments import (
    AsJson,
    NewRunDir,
    RunDir,
    checkpoint_option,
    config_argument,
    overrides_argument,
    processes_option,
)
from coterie.launch.config_commands import AsJsonSchema, Under, show_schema
from coterie.launch.config_file import DYNAMICS
from coterie.launch.ranked import membership_of, new_folder, run_ranked
from coterie.launch.run_folder import DYNAMICS_CONFIG, saved_config

if TYPE_CHECKING:  # importing torch takes seconds: only when it is needed
    from coterie.launch.dynamics_config import DynamicsRunConfig
    from coterie.parallel.trainer import Outcome

ConfigName = Annotated[str, config_argument(DYNAMICS)]
Overrides = Annotated[
    list[str] | None, overrides_argument("train.rounds=50", "coterie dynamics schema")
]
Processes = Annotated[int | None, processes_option("parallel.ep, of which N is a multiple")]
Round = Annotated[int | None, checkpoint_option("round")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    commands = typer.Typer(no_args_is_help=True)
    examples: dict[Callable[..., int | None], str] = {
        train: "train odebench_2 train.rounds=50 --run-dir runs/two",
        resume: "resume runs/two",
        evaluate: "evaluate runs/two",
        adapt: "adapt runs/two --steps 200",
        schema: "schema model.router",
    }
    for command, example in examples.items():
        commands.command(epilog=f"Example:  coterie dynamics {example}")(command)
    app.add_typer(
        commands,
        name="dynamics",
        help="Learn families of dynamical systems, and adapt to more.",
    )


def train(
    config: ConfigName,
    overrides: Overrides = None,
    nproc: Processes = None,
    run_dir: NewRunDir = None,
) -> int:
    """Train contexts and experts in turn. Ctrl-C saves a checkpoint after the round under way."""
    ours = membership_of(nproc)
    from coterie.launch.dynamics_config import load_dynamics_config

    resolved = load_dynamics_config(config, overrides or [])
    folder = new_folder(run_dir, resolved.name, ours)

    def here() -> "Outcome":
        from coterie.launch.dynamics_training import train

        return train(resolved, folder)

    world = _world(resolved, ours, nproc)
    return run_ranked(here, ours, world, folder)


def resume(
    run_dir: RunDir, overrides: Overrides = None, nproc: Processes = None, round_: Round = None
) -> int:
    """Go on with a run that was interrupted or killed, exactly where a checkpoint left it."""
    ours = membership_of(nproc)
    resolved = _config_of(run_dir, overrides or [])

    def here() -> "Outcome":
        from coterie.launch.dynamics_training import resume

        return resume(resolved, run_dir, round_)

    world = _world(resolved, ours, nproc)
    return run_ranked(here, ours, world, run_dir)


def evaluate(run_dir: RunDir, round_: Round = None, as_json: AsJson = False) -> None:
    """Relative MSE of each environment on held-out trajectories, and where the gate sends it."""
    from coterie.launch.dynamics_evaluation import evaluate

    _show(evaluate(_config_of(run_dir), run_dir, round_), as_json)


def adapt(
    run_dir: RunDir,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the contexts.")] = 200,
    start: Annotated[
        Literal["zero", "centroid"] | None,
        typer.Option(help="First contexts. Without it: the config's train.adaptation_start."),
    ] = None,
    round_: Round = None,
    as_json: AsJson = False,
) -> None:
    """Find contexts for environments that were not trained on; experts and gate stay as they are.

    Shows each one's relative MSE on trajectories that its context was not fitted to.
    """
    from coterie.launch.dynamics_evaluation import adapt

    config = _config_of(run_dir)
    if start is not None:
        train = config.train.model_copy(update={"adaptation_start": start})
        config = config.model_copy(update={"train": train})
    _show(adapt(config, run_dir, round_, steps), as_json)


def schema(under: Under = None, as_json: AsJsonSchema = False) -> None:
    """Every setting of a config of these commands."""
    from coterie.launch.dynamics_config import DynamicsRunConfig
    from coterie.launch.schema import describing

    with describing(DynamicsRunConfig):
        show_schema(under, as_json)


def _config_of(run_dir: Path, overrides: Sequence[str] = ()) -> "DynamicsRunConfig":
    from coterie.launch.dynamics_config import load_dynamics_config

    return load_dynamics_config(saved_config(run_dir, DYNAMICS_CONFIG), list(overrides))


def _show(result: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    from coterie.launch.dynamics_evaluation import table

    print(table(result), end="")


def _world(
    config: "DynamicsRunConfig", ours: membership.Membership | None, nproc: int | None
) -> int:
    from coterie.launch.dynamics_config import check_dynamics_world

    world = ours.world if ours is not None else nproc or config.parallel.ep
    check_dynamics_world(config, world)
    return world
