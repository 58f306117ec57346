"""``coterie plan``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.core.errors import UserError, nearest
from coterie.launch.arguments import ConfigName, Overrides
from coterie.launch.config_file import SHIPPED

if TYPE_CHECKING:  # importing torch takes seconds: only when it is needed
    from coterie.launch.config import RunConfig
    from coterie.parallel.layout import LayoutConfig
    from coterie.parallel.planner.machine import Machine

MACHINES = SHIPPED / "machines"


def machine_names() -> list[str]:
    """The machines that come with coterie."""
    return sorted(file.stem for file in MACHINES.glob("*.yaml"))


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        epilog="Example:  coterie plan deepseek_v3_like --world 1024 --machine h100 parallel.pp=16"
    )(plan)


def plan(
    config: ConfigName,
    overrides: Overrides = None,
    world: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes of the run.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="M",
            help="Nodes that they are spread over evenly, in order. Without it: as many as the "
            "machine's ranks_per_node makes.",
            show_default=False,
        ),
    ] = None,
    machine: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help=f"What a process runs on: a YAML file, or one of {', '.join(machine_names())}.",
        ),
    ] = "h100",
    skew: Annotated[
        float,
        typer.Option(
            min=1.0,
            metavar="X",
            help="Rows that the busiest rank's experts get, over the even share.",
        ),
    ] = 1.0,
    search: Annotated[
        bool, typer.Option("--search", help="Try all layouts, and rank those that fit by time.")
    ] = False,
    ranks: Annotated[bool, typer.Option("--ranks", help="List every rank.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything, for all ranks, as JSON.")
    ] = False,
) -> None:
    """Groups, memory, traffic and step time of a layout, for all ranks, without starting any."""
    from coterie.launch.load_config import load_config

    resolved = load_config(config, overrides or [])
    chosen = read_machine(machine)
    if nodes is not None and world % nodes:
        raise UserError(f"--nodes {nodes}: {world} processes cannot be spread over them evenly")
    if resolved.train.precision not in ("auto", *chosen.peak):
        raise UserError(
            f"train.precision is {resolved.train.precision}, but machine '{machine}' has a peak "
            f"for {', '.join(chosen.peak)} only"
        )
    if search:
        _search(resolved, world, chosen, nodes, skew, as_json)
        return
    from coterie.launch import plan_tables
    from coterie.launch.check import check_world
    from coterie.parallel.planner.plan import Plan
    from coterie.parallel.planner.workload import workload_of

    node = resolved.parallel.node or -(-world // (nodes or chosen.nodes(world)))
    parallel = resolved.parallel.model_copy(update={"node": node})
    check_world(resolved.model_copy(update={"parallel": parallel}), world)
    work = workload_of(
        resolved.model,
        parallel,
        resolved.train,
        resolved.data.sequence,
        world,
        chosen.device,
        skew,
        resolved.optimizer.kind,
    )
    made = Plan(work, chosen, nodes)
    if as_json:
        print(json.dumps(plan_tables.as_json(made)))
        return
    plan_tables.show(made, resolved.name, ranks)


def read_machine(name: str) -> "Machine":
    """The machine in the file ``name``, or shipped under that name. Raises UserError."""
    import yaml
    from pydantic import ValidationError

    from coterie.launch.config_file import read_text
    from coterie.parallel.planner.machine import Machine

    file = MACHINES / f"{name}.yaml" if name in machine_names() else Path(name)
    if not file.is_file():
        known = machine_names()
        raise UserError(
            f"--machine {name}: there is no such file, and shipped ones are "
            f"{', '.join(known)}{nearest(name, known)}"
        )
    try:
        tree = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: is no YAML: {' '.join(str(error).split())}") from error
    try:
        return Machine.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: {key}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error


def _search(
    config: "RunConfig",
    world: int,
    machine: "Machine",
    nodes: int | None,
    skew: float,
    as_json: bool,
) -> None:
    from coterie.launch import plan_tables
    from coterie.launch.check import check_world
    from coterie.parallel.planner.search import search

    def allowed(parallel: "LayoutConfig") -> bool:
        try:
            check_world(config.model_copy(update={"parallel": parallel}), world)
        except UserError:
            return False
        return True

    found = search(
        config.model,
        config.train,
        config.data.sequence,
        world,
        machine,
        nodes,
        skew,
        allowed,
        optimizer=config.optimizer.kind,
    )
    if not found.best:
        raise UserError(
            f"none of the {found.possible} layouts of {world} processes that the rules allow fits "
            f"{machine.memory:g} GB on each: use more processes, a smaller model or micro-batch"
        )
    if as_json:
        best: list[dict[str, Any]] = [plan_tables.candidate_json(c) for c in found.best]
        print(json.dumps({"possible": found.possible, "fitting": found.fitting, "best": best}))
        return
    plan_tables.show_search(found, config.name, machine)
