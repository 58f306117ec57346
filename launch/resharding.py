"""A run in a layout of its own, out of a checkpoint of another."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any

from coterie.core.errors import UserError
from coterie.launch.check import check_world
from coterie.launch.config import RunConfig
from coterie.launch.load_config import changed_config, dump_config
from coterie.launch.placement import boxes_of_rank
from coterie.launch.run_checkpoints import CHECKPOINTS
from coterie.launch.run_folder import CONFIG, DYNAMICS_CONFIG, of_kind
from coterie.parallel.checkpoint import read_state
from coterie.parallel.checkpoint_format import STATE
from coterie.parallel.checkpoint_store import sync_folder
from coterie.parallel.reshard import reshard
from coterie.parallel.rules import layout_of


def make_run(
    source: Path, run_dir: Path, world: int, overrides: list[str], advance: Callable[[int], None]
) -> str:
    """Make the folder of a run that goes on from the checkpoint ``source`` with ``world`` ranks in
    the layout that ``overrides`` change; returns that layout in words.

    The folder gets its name when all is in it.

    Raises:
        UserError: the layout is impossible; ``run_dir`` exists; the checkpoint is damaged or has
            no config; the disk is full, …
    """
    check_new(run_dir)
    for override in overrides:
        if not override.strip().startswith("parallel."):
            raise UserError(
                f"override '{override}': only the layout can be changed: parallel.ep=2, …"
            )
    state, config = saved_run(source, overrides)
    check_world(config, world)
    layout = layout_of(config.parallel, world, config.model)
    state |= {
        "config": config.model_dump(mode="json"),
        "layout": {"world": world, **asdict(layout)},
    }
    with new_run(run_dir, config) as hidden:
        reshard(
            source,
            hidden / CHECKPOINTS / source.name,
            lambda rank: boxes_of_rank(config, layout, rank),
            world,
            state=state,
            advance=advance,
        )
    return layout.describe()


def saved_run(source: Path, overrides: list[str]) -> tuple[dict[str, Any], RunConfig]:
    """What the checkpoint ``source`` says of its run, and that run's config with ``overrides``."""
    state = read_state(source)
    if not isinstance(state.get("config"), dict):
        raise UserError(f"{source / STATE}: names no config, so the boxes of ranks are unknown")
    if "round" in state:
        raise UserError(f"{source}: {of_kind(DYNAMICS_CONFIG)}")
    return state, changed_config(source / STATE, state["config"], overrides)


@contextmanager
def new_run(run_dir: Path, config: RunConfig) -> Iterator[Path]:
    """A folder to write a run's checkpoint into; it becomes ``run_dir`` when all is in it.

    Raises:
        UserError: ``run_dir`` exists; the disk is full, …
    """
    check_new(run_dir)
    hidden = run_dir.with_name(f".{run_dir.name}.{token_hex(4)}.partial")
    try:
        yield hidden
        (hidden / CONFIG).write_text(dump_config(config))
        sync_folder(hidden)
        hidden.rename(run_dir)
        sync_folder(run_dir.parent)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise UserError(f"cannot write {run_dir}: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def check_new(run_dir: Path) -> None:
    """Raises UserError when there is something at ``run_dir``."""
    if run_dir.exists():
        raise UserError(f"{run_dir}: exists already; give a folder to make")
