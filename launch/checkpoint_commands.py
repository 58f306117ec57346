"""``coterie checkpoint inspect``, ``verify``, ``diff`` and ``reshard``."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.launch.run_folder import saved_config

if TYPE_CHECKING:
    from coterie.parallel.checkpoint_diff import Difference
    from coterie.parallel.checkpoint_reader import CheckpointReader

_HELP = "A run's folder (its newest checkpoint), or a checkpoint's."
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=_HELP)]
Other = Annotated[Path, typer.Argument(metavar="OTHER", help="Another, given in the same way.")]
Step = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="STEP", help="Of a run, the checkpoint of this step.", show_default=False
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    commands = typer.Typer(no_args_is_help=True)
    commands.command(epilog="Example:  coterie checkpoint inspect runs/quickstart")(inspect)
    commands.command(epilog="Example:  coterie checkpoint verify runs/quickstart --step 200")(
        verify
    )
    commands.command(epilog="Example:  coterie checkpoint diff runs/first runs/second")(diff)
    commands.command(
        epilog="Example:  coterie checkpoint reshard runs/first runs/split --world 4 parallel.ep=4"
    )(reshard)
    app.add_typer(
        commands, name="checkpoint", help="Look at checkpoints, check, compare and convert them."
    )


def inspect(
    checkpoint: Checkpoint,
    step: Step = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint holds, and which of its tensors and experts are equal."""
    from coterie.launch.checkpoint_report import as_tree, show
    from coterie.parallel.checkpoint_checks import equal_experts, expert_weights
    from coterie.parallel.checkpoint_reader import CheckpointReader

    with CheckpointReader(find(checkpoint, step)) as reader:
        with progress("reading experts", _bytes(reader, expert_weights(reader))) as advance:
            experts = equal_experts(reader, advance)
        if as_json:
            print(json.dumps(as_tree(reader, experts), indent=1))
        else:
            show(reader)
    _warn(experts)


def verify(checkpoint: Checkpoint, step: Step = None) -> None:
    """Read a whole checkpoint and compare every checksum and every digest."""
    from coterie.parallel import checkpoint as files
    from coterie.parallel.checkpoint_checks import check_digests, equal_experts
    from coterie.parallel.checkpoint_reader import CheckpointReader

    path = find(checkpoint, step)
    files.verify(path)
    with CheckpointReader(path) as reader:
        tensors = reader.manifest.tensors
        with progress("computing digests", _bytes(reader, tensors)) as advance:
            check_digests(reader, advance)
            experts = equal_experts(reader)
        print(
            f"{path}: {len(reader.manifest.files)} files have their checksums; {len(tensors)} "
            f"tensors ({_bytes(reader, tensors):,} bytes) are complete and have their digests"
        )
    _warn(experts)


def diff(checkpoint: Checkpoint, other: Other, step: Step = None) -> int:
    """Tell where two checkpoints differ. Exit code 0: nowhere; 1: they differ."""
    from coterie.launch.checkpoint_report import unlike
    from coterie.parallel.checkpoint_diff import compare, differing
    from coterie.parallel.checkpoint_reader import CheckpointReader

    paths = find(checkpoint, step), find(other, step)
    with CheckpointReader(paths[0]) as a, CheckpointReader(paths[1]) as b:
        lines = list(unlike(a, b))
        names = differing(a, b)
        with progress("comparing tensors", _bytes(a, names)) as advance:
            for name in names:
                shape = a.manifest.tensors[name].shape
                lines.append(_sentence(name, compare(a, b, name, advance), shape))
    for line in lines:
        print(line)
    if not lines:
        print(f"{paths[0]} and {paths[1]} are equal")
    return int(bool(lines))


def reshard(
    checkpoint: Checkpoint,
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="The folder to make, of a run to go on with.")
    ],
    world: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes to split it for.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="The layout, such as parallel.ep=2; what is not given stays as it was.",
            show_default=False,
        ),
    ] = None,
    step: Step = None,
) -> None:
    """Write a checkpoint as a run of another layout would have written it."""
    from coterie.launch.resharding import make_run
    from coterie.parallel.checkpoint_reader import CheckpointReader

    source = find(checkpoint, step)
    with CheckpointReader(source) as reader:
        total = _bytes(reader, reader.manifest.tensors)
    with progress("writing", total) as advance:
        layout = make_run(source, run_dir, world, overrides or [], advance)
    print(f"{run_dir}: {source.name} for {world} process{'es' if world > 1 else ''}, {layout}")


def find(path: Path, step: int | None) -> Path:
    """The checkpoint that a CHECKPOINT argument and --step mean; UserError when there is none."""
    from coterie.core.errors import UserError
    from coterie.launch.run_checkpoints import CHECKPOINTS, choose_checkpoint
    from coterie.parallel.checkpoint_format import is_named_checkpoint, step_of

    if is_named_checkpoint(path):
        if step is not None and step != step_of(path):
            raise UserError(f"--step {step}: {path} is a checkpoint already; leave the option out")
        return path
    if not (path / CHECKPOINTS).is_dir():
        saved_config(path)  # says what is wrong with a path that is no run
    found = choose_checkpoint(path, step)
    if found is None:
        raise UserError(f"{path / CHECKPOINTS} holds no checkpoint yet")
    return found


def _sentence(name: str, found: "Difference", shape: list[int]) -> str:
    x, y = found.values
    if prod(shape) == 1:
        return f"{name}: {x} and {y}"
    experts = ""
    if found.experts:
        experts = f" of {_experts(sorted(found.experts), shape[0])}"
    return (
        f"{name}: {found.count:,} of {prod(shape):,} elements{experts} differ, by "
        f"{found.absolute:.3g} at most ({found.relative:.3g} relative); "
        f"first {list(found.first)}: {x} and {y}"
    )


def _experts(numbers: list[int], count: int) -> str:
    if len(numbers) == count:
        return f"all {count} experts"
    return f"expert{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _warn(experts: dict[str, list[list[int]]]) -> None:
    for name, groups in experts.items():
        for group in groups:
            numbers = f"{', '.join(map(str, group[:-1]))} and {group[-1]}"
            print(f"warning: experts {numbers} of {name} are equal", file=sys.stderr)


def _bytes(reader: "CheckpointReader", names: Iterable[str]) -> int:
    return sum(reader.nbytes(name) for name in names)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, told how many bytes are done since it was last told."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
