"""Commands mounted by name: their modules are imported when they are run or listed, never when another one runs.

So the command line may mount what stands on floors above it (`biroute.slurm`, `biroute.launcher.bench`) without
importing it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

# Command -> "module:typer app". A module whose app has one command of that name mounts that command, else the group.
MOUNTED = {
    "data": "biroute.launcher.cli.data:data_app",
    "bench": "biroute.launcher.bench.commands:bench_app",
    "submit": "biroute.slurm.commands:slurm_app",
    "status": "biroute.slurm.commands:slurm_app",
    "logs": "biroute.slurm.commands:slurm_app",
    "cancel": "biroute.slurm.commands:slurm_app",
    "resume": "biroute.slurm.commands:slurm_app",
}


class LazyGroup(TyperGroup):
    """The top group of `biroute`: its own commands, then those of `MOUNTED`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *MOUNTED]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in MOUNTED:
            return super().get_command(ctx, cmd_name)
        module, name = MOUNTED[cmd_name].split(":")
        group = typer.main.get_group(getattr(import_module(module), name))
        command = group.get_command(ctx, cmd_name) or group
        command.name = cmd_name
        return command
