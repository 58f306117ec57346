"""The ``coterie`` command: its sub-commands, and where every error becomes an exit code.

2: a mistake of the user, told in one sentence. 130: interrupted. 1: anything else.
"""

import os
import sys

import typer

from coterie.core.errors import UserError
from coterie.launch import (
    certify_command,
    checkpoint_commands,
    child,
    config_commands,
    data_commands,
    doctor,
    dynamics_commands,
    inference_commands,
    membership,
    plan_command,
    report_command,
    run_commands,
    upcycle_command,
)

app = typer.Typer(
    help="Train mixture-of-experts models: every command explains itself with --help.",
    epilog="Start here:  coterie train quickstart   (settings: coterie config schema)",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
run_commands.add_to(app)
inference_commands.add_to(app)
upcycle_command.add_to(app)
certify_command.add_to(app)
checkpoint_commands.add_to(app)
plan_command.add_to(app)
report_command.add_to(app)
data_commands.add_to(app)
dynamics_commands.add_to(app)
config_commands.add_to(app)
doctor.add_to(app)


def main(args: list[str] | None = None) -> int:
    """Run ``args`` (default: the process's own) and return the exit code."""
    child.attach()
    try:
        code = app(args=args, prog_name="coterie", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(_as_user_error(error))


def _as_user_error(error: Exception) -> Exception:
    """Typer's usage errors, known by their method (their classes have moved between versions)."""
    if not hasattr(error, "format_message"):
        return error
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "coterie"
    message = error.format_message().rstrip(".")
    if not message:  # a group without its sub-command: its help was shown
        message = "a sub-command is missing"
    place = f"{' '.join(command.split()[1:])}: ".lstrip(": ")
    see = " See" if message.endswith("?") else "; see"
    return UserError(f"{place}{message}{see} '{command} --help'")


def _fail(error: Exception) -> int:
    """Show ``error``, unless the parent of this rank will, and return the exit code."""
    code, text = child.explain(error)
    if child.report(error):
        return code
    ours = membership.join_quietly()
    show(code, text, f"rank {ours.rank}: " if ours is not None else "")
    return code


def show(code: int, text: str, prefix: str = "") -> None:
    """Print an error of :func:`coterie.launch.child.explain` to stderr."""
    sys.stdout.flush()
    if "\n" not in text:
        print(f"coterie: {prefix}{text}", file=sys.stderr)
        return
    print(text.rstrip(), file=sys.stderr)
    print(f"coterie: {prefix}this should not happen: please report it", file=sys.stderr)
