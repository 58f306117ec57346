"""What a run's folder holds: a run of which kind, or none yet."""

from pathlib import Path

from coterie.core.errors import UserError

CONFIG = "config.yaml"
"""The resolved config in a run's folder."""
DYNAMICS_CONFIG = "dynamics.yaml"
"""The same of a run of `coterie dynamics`."""

_COTERIE = {CONFIG: "coterie", DYNAMICS_CONFIG: "coterie dynamics"}
"""What the commands of a run of each kind begin with."""
_FOR_RUNS = {
    CONFIG: ("resume", "evaluate", "generate", "report"),
    DYNAMICS_CONFIG: ("resume", "evaluate", "adapt"),
}
"""Of these, commands that take a run."""


def check_fresh(run_dir: Path) -> None:
    """Raises UserError when ``run_dir`` cannot take a new run, of either kind."""
    for file, coterie in _COTERIE.items():
        if (run_dir / file).exists():
            raise UserError(
                f"{run_dir}: holds a run already; go on with it by '{coterie} resume {run_dir}', "
                "or give another --run-dir"
            )
    for folder in (run_dir, *run_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file, so it cannot hold a run; give another --run-dir")


def saved_config(run_dir: Path, config: str = CONFIG) -> Path:
    """The config file of the run in ``run_dir``, which must be of the kind whose file has the name
    ``config``; raises UserError when there is no such run."""
    file = run_dir / config
    if file.is_file():
        return file
    for other in _COTERIE:
        if (run_dir / other).is_file():
            raise UserError(f"{run_dir}: {of_kind(other)}")
    if not run_dir.exists():
        raise UserError(f"{run_dir}: there is no such run{_runs_near(run_dir, config)}")
    what = "is a file" if not run_dir.is_dir() else f"holds no {config}"
    raise UserError(
        f"{run_dir}: {what}, so it is no run of '{_COTERIE[config]} train'"
        f"{_runs_near(run_dir, config)}"
    )


def of_kind(config: str) -> str:
    """The end of a sentence, for a command that takes runs of the other kind than those with the
    file ``config``."""
    coterie = _COTERIE[config]
    *names, last = (f"'{coterie} {name}'" for name in _FOR_RUNS[config])
    return f"is of '{coterie} train'; what takes such runs: {', '.join(names)} and {last}"


def how_to_go_on(run_dir: Path) -> str:
    """For one whose run has ended before its time."""
    for file, coterie in _COTERIE.items():
        if (run_dir / file).exists():
            return f"go on with: {coterie} resume {run_dir}"
    return "nothing was saved yet, so start it again"


def _runs_near(run_dir: Path, config: str) -> str:
    """Where runs are, beside or below ``run_dir``."""
    found = [
        str(file.parent)
        for folder in (run_dir.parent, run_dir, Path("runs"))
        if folder.is_dir()
        for file in sorted(folder.glob(f"*/{config}"))
    ]
    return f"; there are runs in {', '.join(dict.fromkeys(found[:3]))}" if found else ""
