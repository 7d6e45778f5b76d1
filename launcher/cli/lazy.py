"""Commands mounted by name: the module of a command is imported only when that command runs.

The command line can thus mount packages of higher layers (`biroute.slurm`, `biroute.launcher.bench`) without
importing them, and `biroute --help` stays fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from biroute.configs.errors import EXIT_INTERRUPTED, UsageError
from biroute.launcher.cli.echo import echo

# Of the Click that this Typer brings or uses: a word of the command line that cannot be.
_CommandLineError: Any = typer.BadParameter.mro()[1]


class Mount(NamedTuple):
    """Where a command is defined, and its line in `biroute --help` (a test compares it with the command's own)."""

    app: str  # "module:typer app"; mounts the app's command of the mounted name if it has one, else the whole app
    help: str


MOUNTED = {
    "data": Mount("biroute.launcher.cli.data:data_app", "Build, verify and look at datasets."),
    "checkpoint": Mount(
        "biroute.launcher.cli.checkpoint:checkpoint_app", "List, verify and copy the checkpoints of a run."
    ),
    "track": Mount("biroute.launcher.cli.track:track_app", "Send to MLflow what it has not received of a run."),
    "plan": Mount(
        "biroute.launcher.cli.plan:plan_app",
        "Predict memory, bytes between ranks, time and cost of a run before it is submitted.",
    ),
    "generate": Mount(
        "biroute.launcher.cli.generate:generate_app",
        "Continue texts with a trained model, from a checkpoint of any layout, with the routes of training.",
    ),
    "scale": Mount(
        "biroute.launcher.scale.command:scale_app",
        "Train the same run with several numbers of ranks, and compare speed, memory and bytes.",
    ),
    "report": Mount(
        "biroute.launcher.report.command:report_app", "Compare runs, from what MLflow has of them, on one page."
    ),
    "routes": Mount(
        "biroute.launcher.cli.routes:routes_app",
        "Show which regions each layer reads of a text: one HTML page, complete in itself, or JSON.",
    ),
    "chat": Mount(
        "biroute.launcher.cli.chat:chat_app",
        "Talk with a trained model, line by line; /help lists what else can be typed.",
    ),
    "serve": Mount(
        "biroute.launcher.cli.serve:serve_app",
        "Serve a trained model over HTTP, as OpenAI's completions and chat completions.",
    ),
    "evaluate": Mount(
        "biroute.launcher.cli.evaluate:evaluate_app",
        "Measure a trained model: losses on held-out or given text and tasks made of it, into the run's MLflow run.",
    ),
    "doctor": Mount(
        "biroute.launcher.doctor.command:doctor_app",
        "Check this machine, or the ranks that srun or torchrun started: run it first on a new cluster.",
    ),
    "bench": Mount("biroute.launcher.bench.commands:bench_app", "Measure what BiRoute claims, on this machine."),
    "submit": Mount(
        "biroute.slurm.commands:slurm_app", "Submit a run to Slurm; it resumes automatically until its last step."
    ),
    "status": Mount(
        "biroute.slurm.commands:slurm_app",
        "Show runs: state, step, tokens per second, time left, jobs, and why each attempt ended.",
    ),
    "logs": Mount(
        "biroute.slurm.commands:slurm_app",
        "Show what a run's ranks print; if an attempt failed, first the error of the rank that failed first.",
    ),
    "cancel": Mount(
        "biroute.slurm.commands:slurm_app", "Cancel a run: its jobs save, end, and are not queued again."
    ),
    "resume": Mount(
        "biroute.slurm.commands:slurm_app",
        "Submit a cancelled, stopped or lost run again, from its newest checkpoint.",
    ),
}


def load_command(name: str) -> Any:
    """Import and return the mounted command `name`."""
    module, app = MOUNTED[name].app.split(":")
    group = typer.main.get_group(getattr(import_module(module), app))
    command = group.commands.get(name, group)
    command.name = name
    return command


class LazyCommand(TyperCommand):
    """A placeholder for a mounted command in lists; it imports the command when there are arguments to parse."""

    def __init__(self, name: str) -> None:
        super().__init__(name, help=MOUNTED[name].help)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        return load_command(self.name).make_context(info_name, args, parent=parent, **extra)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Say in one line what ends a command: a word that cannot be (Typer would draw a box), or Ctrl-C."""
    try:
        yield
    except _CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # no error: its words are the whole help
            raise
        words = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx else "biroute"
        raise UsageError(f"{words}; `{command} --help` says what there is") from None
    except KeyboardInterrupt:  # in a command that has nothing to say about what it keeps
        echo("stopped", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


class LazyGroup(TyperGroup):
    """The top group of `biroute`: its own commands, then those of `MOUNTED`. What ends one of them is one line."""

    def make_context(self, *arguments: Any, **named: Any) -> Any:
        with _in_one_line():
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: Any) -> Any:
        with _in_one_line():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *MOUNTED]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return LazyCommand(cmd_name) if cmd_name in MOUNTED else super().get_command(ctx, cmd_name)
