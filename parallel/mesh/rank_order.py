"""Where each rank of a layout sits: by our counting, by Megatron-core's and by DeepSpeed's: the same place.

Were they not, gradients of different weights would be summed, and the loss might still fall.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from deepspeed.runtime.pipe.topology import ProcessTopology
from megatron.core.parallel_state import RankGenerator

from biroute.configs.errors import UsageError
from biroute.configs.layout import Layout
from biroute.parallel.mesh.megatron import MEGATRON_ORDER

# Slowest axis first; its data axis is data x region.
DEEPSPEED_AXES = ("pipe", "data", "model")


@dataclass(frozen=True)
class Coordinates:
    """Position of a rank on each axis."""

    tensor: int
    region: int
    data: int
    pipe: int


def coordinates_of(layout: Layout, rank: int) -> Coordinates:
    """Position of `rank`: tensor counts fastest, then region, data, pipe."""
    rest, tensor = divmod(rank, layout.tensor)
    rest, region = divmod(rest, layout.region)
    pipe, data = divmod(rest, layout.data)
    return Coordinates(tensor=tensor, region=region, data=data, pipe=pipe)


def check_rank_order(
    layout: Layout, megatron_order: str = MEGATRON_ORDER, deepspeed_axes: tuple[str, ...] = DEEPSPEED_AXES
) -> None:
    """Compare the three for every rank; no process is asked.

    Raises:
        UsageError: the installed versions order some rank's place differently.
    """
    megatron = _megatron_coordinates(layout, megatron_order)
    sizes = {"pipe": layout.pipe, "data": layout.data * layout.region, "model": layout.tensor}
    deepspeed = ProcessTopology(axes=list(deepspeed_axes), dims=[sizes[axis] for axis in deepspeed_axes])
    for rank in range(layout.world_size):
        ours, there = coordinates_of(layout, rank), deepspeed.get_coord(rank)
        data, region = divmod(there.data, layout.region)
        found = {
            "megatron-core": megatron[rank],
            "deepspeed": Coordinates(tensor=there.model, region=region, data=data, pipe=there.pipe),
        }
        for library, theirs in found.items():
            if theirs != ours:
                raise UsageError(
                    f"layout {layout}: {library} {version(library)} puts rank {rank} at {_text(theirs)}, BiRoute at "
                    f"{_text(ours)}; install the versions that pyproject.toml names"
                )


def _megatron_coordinates(layout: Layout, order: str) -> list[Coordinates]:
    """Return the coordinates of all ranks: on each axis, a rank's position in its group along that axis."""
    generator = RankGenerator(tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipe, cp=layout.region, order=order)
    place = {
        axis: {rank: number for group in generator.get_ranks(axis) for number, rank in enumerate(group)}
        for axis in ("tp", "cp", "dp", "pp")
    }
    return [
        Coordinates(tensor=place["tp"][r], region=place["cp"][r], data=place["dp"][r], pipe=place["pp"][r])
        for r in range(layout.world_size)
    ]


def _text(at: Coordinates) -> str:
    return f"tensor {at.tensor} region {at.region} data {at.data} pipe {at.pipe}"
