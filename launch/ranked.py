"""A command that trains: in this process when that is a rank or the only one, else in several."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.core.errors import UserError
from coterie.launch import membership
from coterie.launch.processes import Ended, command_of_this_process, run_ranks
from coterie.launch.run_folder import check_fresh, how_to_go_on

if TYPE_CHECKING:  # importing torch takes seconds: only when it is needed
    from coterie.parallel.trainer import Outcome


def membership_of(nproc: int | None) -> membership.Membership | None:
    """This process's place; raises UserError when it has one and ``nproc`` is given as well."""
    ours = membership.join()
    if ours is not None and ours.starter != "coterie" and nproc is not None:
        raise UserError(
            f"--nproc {nproc} cannot be given under {ours.starter}, which started {ours.world} "
            "processes already; leave it out"
        )
    return ours


def new_folder(run_dir: Path | None, name: str, ours: membership.Membership | None) -> Path:
    """Where the new run ``name`` goes; raises UserError when there is one already. The first
    process looks, before others are started or begin to write."""
    folder = run_dir or Path("runs") / name
    if ours is None or (ours.rank == 0 and ours.starter != "coterie"):
        check_fresh(folder)
    return folder


def run_ranked(
    here: Callable[[], "Outcome"],
    ours: membership.Membership | None,
    world: int,
    run_dir: Path,
) -> int:
    """Run ``here`` in this process, or this command in ``world`` processes; the exit code."""
    if ours is None and world > 1:
        return _tell(run_ranks(command_of_this_process(), world), run_dir)
    outcome = here()
    if outcome.finished:
        return 0
    if ours is None:
        print(f"coterie: interrupted; {how_to_go_on(run_dir)}", file=sys.stderr)
    return 130


def _tell(ended: Ended, run_dir: Path) -> int:
    """Say how a group of ranks ended; the exit code."""
    failure = ended.failure
    if failure is None:
        if ended.interrupted:
            print(f"coterie: interrupted; {how_to_go_on(run_dir)}", file=sys.stderr)
        return 130 if ended.interrupted else 0
    if failure.code == 2 and failure.text:
        raise UserError(failure.text)
    how = failure.how()
    if "\n" in failure.text:
        print(failure.text.rstrip(), file=sys.stderr)
        how = f"rank {failure.rank} failed as shown above"
    elif failure.text:
        how = failure.text
    print(f"coterie: {how}; {how_to_go_on(run_dir)}", file=sys.stderr)
    return 2 if failure.code == 2 else 1
