"""``coterie report``: what a run recorded, as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.launch.arguments import RunDir
from coterie.launch.run_folder import saved_config


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example:  coterie report runs/quickstart")(report)


def report(
    run_dir: RunDir,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the page goes. Without it: RUN_DIR/report.html.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a page of a run, finished or not: losses, throughput, and the load of every expert over
    time. One HTML file that needs no network."""
    from coterie.launch.load_config import load_config
    from coterie.launch.report.page import write_report

    config = load_config(saved_config(run_dir))
    print(write_report(run_dir, config, out or run_dir / "report.html"))
