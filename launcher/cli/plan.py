"""`biroute plan`: how many nodes, which layout, how long, how much? It imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biroute.configs.errors import UsageError
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson, ConfigPath, Overrides

if TYPE_CHECKING:
    from biroute.configs.schema import RunConfig
    from biroute.launcher.plan.hardware import HardwareProfile

plan_app = typer.Typer()
DEFAULT_HARDWARE = "h100"


@plan_app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[
        list[int] | None, typer.Option("--nodes", min=1, help="nodes, repeatable; left out: as the layout needs")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help=f"hardware profile: a YAML file or a shipped name; default: {DEFAULT_HARDWARE}"),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="price of a device for an hour; left out: the profile's, or none")
    ] = None,
    exchange_fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="of the bound, what region ranks exchange; left out: as in trained runs"),
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="rank all legal layouts of the nodes")] = False,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option("--out", help="folder for plan.png and plan.json")] = None,
) -> None:
    """Predict memory, bytes between ranks, time and cost of a run before it is submitted.

    Where nothing that was asked for fits into the devices' memory, the exit status is 2.

    Example: biroute plan configs/demo.yaml parallel.data=null --nodes 1 --nodes 2 train.global_batch_size=64
    """
    from biroute.configs.load import load_config
    from biroute.launcher.plan.communication import ASSUMED_EXCHANGE
    from biroute.launcher.plan.hardware import load_hardware

    loaded = load_config(config, overrides or [])
    profile = load_hardware(hardware or DEFAULT_HARDWARE)
    if price is not None:
        if not math.isfinite(price):
            raise UsageError(f"--price {price} is no price; give a number")
        profile = profile.model_copy(update={"price_per_device_hour": price})
    assumed = [] if hardware else [f"hardware {DEFAULT_HARDWARE}; --hardware names another profile"]
    fraction = ASSUMED_EXCHANGE if exchange_fraction is None else exchange_fraction
    counts, said = _devices(loaded, profile, nodes or [])
    assumed += said
    answer = _Answer(loaded, profile, fraction, assumed)
    if search:
        answer.search(counts)
    else:
        answer.plan(counts)
    written = answer.write(out) if out is not None else []
    echo(json.dumps(answer.values) if as_json else answer.text)
    for path in written if not as_json else ():
        echo(f"wrote {path}")
    if answer.too_large:
        raise UsageError(answer.too_large)


def _devices(config: RunConfig, profile: HardwareProfile, nodes: list[int]) -> tuple[list[int], list[str]]:
    """Return the numbers of devices to plan for, and what was assumed for them."""
    from biroute.configs.layout import default_world_size

    if nodes:
        return [count * profile.devices_per_node for count in nodes], []
    count = default_world_size(config)
    said = [] if config.parallel.data else ["one data rank; --nodes, or parallel.data, asks for more"]
    return [count], said


class _Answer:
    """What was asked for, as text and as plain values."""

    def __init__(self, config: RunConfig, profile: HardwareProfile, fraction: float, assumed: list[str]) -> None:
        self.config, self.profile, self.fraction, self.assumed = config, profile, fraction, assumed
        self.text = ""
        self.too_large = ""  # why nothing that was asked for fits; "" if something does
        self.values: dict[str, Any] = {}
        self._drawn: list[Any] = []

    def plan(self, counts: list[int]) -> None:
        from biroute.configs.layout import resolve_layout
        from biroute.launcher.plan.prediction import make_plan
        from biroute.launcher.plan.report import as_values, assumptions, plan_table, too_large
        from biroute.launcher.plan.search import remedy

        plans = [
            make_plan(self.config, resolve_layout(self.config, count), self.profile, self.fraction)
            for count in counts
        ]
        self._drawn = plans
        if not any(one.fits for one in plans):
            self.too_large = too_large(plans[-1], remedy(plans[-1]))
        assumed = [*self.assumed, *assumptions(plans[0])]
        self.text = "\n".join([plan_table(plans), *(f"assumed: {one}" for one in assumed)])
        self.values = {"plans": [as_values(one) for one in plans], "assumed": self.assumed}

    def search(self, counts: list[int]) -> None:
        from biroute.launcher.plan.report import as_values, assumptions, nothing_fits, search_table
        from biroute.launcher.plan.search import search_layouts

        if self.config.parallel.data:
            self.assumed.append(f"parallel.data={self.config.parallel.data} of the configuration is left out")
        texts, values = [], []
        for count in counts:
            found = search_layouts(self.config, count, self.profile, self.fraction)
            texts.append(f"{count} devices: {search_table(found)}\n")
            values.append(
                {"devices": count, "plans": [as_values(one) for one in found.plans[:10]], "dropped": found.dropped}
            )
            self._drawn += found.plans[:1]
            if found.smallest is not None:
                self.too_large = nothing_fits(found.smallest)
        if self._drawn:
            self.too_large = ""
        if self._drawn:
            texts += [f"assumed: {one}" for one in [*self.assumed, *assumptions(self._drawn[0])]]
        self.text = "\n".join(texts)
        self.values = {"searches": values, "assumed": self.assumed}

    def write(self, folder: Path) -> list[Path]:
        """Write plan.json and, of the plans (or the best of each search), plan.png.

        Raises:
            UsageError: the folder cannot be written.
        """
        from biroute.launcher.plan.figure import draw_plan

        try:
            folder.mkdir(parents=True, exist_ok=True)
            written = [folder / "plan.json"]
            written[0].write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")
            if self._drawn:
                written.append(folder / "plan.png")
                draw_plan(self._drawn, written[1])
        except OSError as error:
            raise UsageError(f"--out {folder}: {error.strerror}; use a folder that can be written") from None
        return written
