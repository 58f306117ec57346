"""``coterie certify``: the hashes of a run's steps, and whether what was done twice agrees."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from coterie.launch.arguments import RunDir


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example:  coterie certify runs/quickstart --against runs/resumed")(certify)


def certify(
    run_dir: RunDir,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Another run of the same config, to compare step by step.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Show each certified step's hashes: of sample ids, random numbers, weights and optimizer.

    A step that was taken again after a resume must have seen the same samples and random numbers;
    with the same layouts up to there it must have made the same weights, to the last bit; and each
    checkpoint must hold what its step made. Exit code 1 when something does not agree.
    """
    from coterie.launch.certify import contradictions, disagreements
    from coterie.parallel.monitors.certificates import read_certificates

    found = read_certificates(run_dir)
    problems = contradictions(found, run_dir)
    if against is not None:
        problems += disagreements(found, read_certificates(against), str(against))
    if as_json:
        text = {"certificates": [asdict(one) for one in found], "problems": problems}
        print(json.dumps(text, indent=1))
    else:
        _show(asdict(one) for one in found)
        steps = len({one.step for one in found})
        again = len(found) - steps
        other = f", compared with {against}" if against else ""
        print(f"{steps} steps certified, {again} of them taken again{other}")
        for problem in problems:
            print(f"does not agree: {problem}")
        if not problems:
            print("everything agrees")
    return 1 if problems else 0


def _show(rows: Iterable[dict[str, object]]) -> None:
    columns = ("step", "samples", "rng", "weights", "optimizer", "history")
    print(f"{'step':>8}  {'samples':16}  {'rng':16}  {'weights':16}  {'optimizer':16}  layouts")
    for row in rows:
        step, *hashes, history = (row[column] for column in columns)
        print(f"{step:>8}  {'  '.join(map(str, hashes))}  {history}")
