"""Commands mounted by name: their modules are imported when they run, not when another command or `--help` does.

So the command line may mount what stands on floors above it (`biroute.slurm`, `biroute.launcher.bench`) without
importing it, and `biroute --help` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class Mount(NamedTuple):
    """Where a command is, and the line that `biroute --help` shows for it (a test compares it with the command's)."""

    app: str  # "module:typer app"; an app with a command of the mounted name mounts that command, else itself
    help: str


MOUNTED = {
    "data": Mount("biroute.launcher.cli.data:data_app", "Build, verify and look at datasets."),
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
    """Import the mounted command `name`."""
    module, app = MOUNTED[name].app.split(":")
    group = typer.main.get_group(getattr(import_module(module), app))
    command = group.commands.get(name, group)
    command.name = name
    return command


class LazyCommand(TyperCommand):
    """Stands for a mounted command in lists; gives way to it as soon as it is to parse its arguments."""

    def __init__(self, name: str) -> None:
        super().__init__(name, help=MOUNTED[name].help)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        return load_command(self.name).make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    """The top group of `biroute`: its own commands, then those of `MOUNTED`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *MOUNTED]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return LazyCommand(cmd_name) if cmd_name in MOUNTED else super().get_command(ctx, cmd_name)
