"""``coterie evaluate`` and ``generate``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coterie.core.errors import UserError
from coterie.launch.arguments import AsJson, RunDir, Step
from coterie.launch.run_folder import saved_config


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog="Example:  coterie evaluate runs/quickstart --step 200")(evaluate)
    app.command(
        epilog='Example:  coterie generate runs/quickstart --prompt "a digit seven" --count 4'
    )(generate)


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
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint on the held-out data: losses in nats per token."""
    if plot is not None and k is None:
        raise UserError("--plot draws losses by the number of experts: it needs --k, as in 1,2,4")
    if plot is not None:
        from coterie.launch.loss_figure import check_plot

        check_plot(plot)
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
