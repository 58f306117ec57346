"""``coterie config show`` and ``schema``."""

import json
from typing import Annotated

import typer

from coterie.launch.arguments import ConfigName, Overrides

Under = Annotated[
    str | None,
    typer.Argument(metavar="[KEY]", help="Only this key and those below it.", show_default=False),
]
AsJsonSchema = Annotated[
    bool,
    typer.Option("--json", help="Print a JSON Schema, which editors use to complete YAML."),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    commands = typer.Typer(no_args_is_help=True)
    commands.command(epilog="Example:  coterie config show mixtral_8x7b --nproc 64")(show)
    commands.command(epilog="Example:  coterie config schema model.moe")(schema)
    app.add_typer(commands, name="config", help="Look at a config, or at what one may hold.")


def show(
    config: ConfigName,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Check the rules for this many processes too.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check a config and print it with every default filled in; needs neither data nor GPUs."""
    from coterie.launch.load_config import dump_config, load_config

    resolved = load_config(config, overrides or [])
    if nproc is not None:
        from coterie.launch.check import check_world  # imports torch

        check_world(resolved, nproc)
    print(dump_config(resolved), end="")


def schema(under: Under = None, as_json: AsJsonSchema = False) -> None:
    """Every setting of a config: its dotted name, what it accepts, its default, what it does."""
    show_schema(under, as_json)


def show_schema(under: str | None, as_json: bool) -> None:
    """Print the settings of the config that :mod:`coterie.launch.schema` describes."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from coterie.core.errors import UserError, nearest
    from coterie.launch.schema import all_keys, run_schema

    if as_json:
        print(json.dumps(run_schema(), indent=1, ensure_ascii=False))
        return
    everything = list(all_keys())
    chosen = [k for k in everything if under is None or f"{k.name}.".startswith(f"{under}.")]
    if not chosen:
        raise UserError(
            f"there is no key '{under}'{nearest(str(under), [k.name for k in everything])}"
        )
    console = Console()
    for key in chosen:
        line = Text(key.name, style="bold")
        line.append(f"  {key.accepts}", style="cyan not bold")
        if key.default is None:
            line.append("  required", style="yellow not bold")
        elif key.default:
            line.append(f"  default {key.default}", style="not bold dim")
        console.print(line, soft_wrap=True)
        console.print(Padding(Text(key.description), (0, 0, 0, 4)))
