"""The console command `dist-rec`: a verb is a function with a typed signature.

The only place that parses arguments, prints errors and chooses exit codes: 0 done, 2 the user's
input is wrong, 143 stopped by SIGTERM with everything saved, anything else a fault of ours. Heavy
imports happen in the verb that needs them.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

import typer

from ..errors import Stopped, UserError
from ..launch import STOPPED, anyone_said, die_with_agent, first_to_say, has_failed_for_good, is_echo
from . import bench, checkpoint, retrieval, run, shards
from .common import WITH_OVERRIDES
from .finetune import finetune
from .plan import plan

ECHO_SECONDS = 10

app = typer.Typer(
    name="dist-rec",
    help="Distributed training of search-and-recommendation foundation models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(shards.app, name="shards")
app.command()(run.embed)
app.command(context_settings=WITH_OVERRIDES)(plan)
app.command(context_settings=WITH_OVERRIDES)(run.train)
app.command(context_settings=WITH_OVERRIDES)(finetune)
app.command(context_settings=WITH_OVERRIDES)(run.evaluate)
app.command(context_settings=WITH_OVERRIDES)(run.report)
app.command(context_settings=WITH_OVERRIDES)(retrieval.export)
app.command()(retrieval.search)
app.command()(retrieval.profile)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(bench.app, name="bench")
app.command()(run.doctor)


def main() -> None:
    """Run a verb and end with its exit code.

    A rank ends without Python's own clean-up, which could wait for ranks and threads that may be gone.
    """
    code = 0
    try:
        die_with_agent()
        if has_failed_for_good():
            raise typer.Exit(2)
        # A verb that raises typer.Exit makes this return its code.
        code = app(standalone_mode=False) or 0
    except UserError as error:
        _complain(str(error))
        code = 2
    except Stopped as stop:
        if first_to_say(str(stop)):
            print(f"dist-rec: {stop}", file=sys.stderr)
        code = STOPPED
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:
        code = 130
    except Exception as error:
        code = _end_of(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)
    sys.exit(code)


def _complain(message: str) -> None:
    """Say the user's fault on stderr, once for all ranks that meet it."""
    if first_to_say(message, is_final=True):
        # Before the ranks have met, a fault belongs to none of them.
        met = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        rank = f"rank {os.environ['RANK']}: " if met and int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"dist-rec: {rank}{message}", file=sys.stderr)


def _end_of(error: Exception) -> int:
    """Exit code of an exception that is no UserError, after saying what there is to say."""
    if hasattr(error, "exit_code") and hasattr(error, "show"):
        if first_to_say(str(error), is_final=True):
            error.show()
        return error.exit_code
    if is_echo(error):
        # If the lost rank was of this host, its agent ends this one meanwhile: the cause is told there.
        time.sleep(ECHO_SECONDS)
        if not anyone_said():
            lost = f"lost another rank: {str(error).splitlines()[0]}"
            print(f"dist-rec: rank {os.environ['RANK']}: {lost}", file=sys.stderr)
        return 1
    if first_to_say(repr(error)):
        traceback.print_exception(error)
    return 1
