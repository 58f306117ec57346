"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.launch.config_file import SHIPPED, shipped_names


def config_argument(shipped: Path) -> Any:
    """CONFIG, of the kind whose shipped ones are in the folder ``shipped``."""
    names = ", ".join(shipped_names(shipped))
    return typer.Argument(
        metavar="CONFIG", help=f"A YAML file, or the name of a shipped config: {names}."
    )


def overrides_argument(example: str, schema: str) -> Any:
    """KEY.SUB=VALUE; ``schema``: the command that lists all settings."""
    return typer.Argument(
        metavar="KEY.SUB=VALUE",
        help=f"Settings that replace the file's, such as {example}; the value is YAML. "
        f"All settings: {schema}",
        show_default=False,
    )


def processes_option(without: str) -> Any:
    """--nproc; ``without``: how many there are when it is not given."""
    return typer.Option(
        "--nproc",
        min=1,
        metavar="N",
        help=f"Processes to start on this machine. Without it: {without}. Not under torchrun or "
        "srun, which start them.",
        show_default=False,
    )


def checkpoint_option(unit: str) -> Any:
    """The checkpoint of a run, by what it counts: steps or rounds."""
    return typer.Option(
        f"--{unit}",
        min=0,
        metavar=unit.upper(),
        help=f"The checkpoint to use, by its {unit}. Without it: the newest.",
        show_default=False,
    )


RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]
NewRunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Where all goes that the run writes. Without it: runs/NAME, NAME being the config's.",
        show_default=False,
    ),
]
ConfigName = Annotated[str, config_argument(SHIPPED)]
Overrides = Annotated[
    list[str] | None, overrides_argument("train.steps=100", "coterie config schema")
]
Processes = Annotated[
    int | None,
    processes_option(
        "one for each GPU; on a CPU as few as `parallel` can have; when resuming, as many as before"
    ),
]
Step = Annotated[int | None, checkpoint_option("step")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
