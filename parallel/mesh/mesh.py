"""The mesh: the position of each rank on the axes pipe x data x region x tensor, and the groups of each axis."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from biroute.configs.layout import Layout
from biroute.parallel.mesh.megatron import start_process_groups
from biroute.parallel.mesh.rank_order import Coordinates, check_rank_order, coordinates_of


@dataclass(frozen=True)
class Mesh:
    """This rank's place and groups. `groups.tp`, `.cp`, `.dp`, `.dp_cp`, `.pp`: tensor, region, data, both, pipe."""

    layout: Layout
    rank: int
    at: Coordinates
    groups: ProcessGroupCollection

    def own_tokens(self, x: Tensor) -> Tensor:
        """Take this region rank's tokens of whole sequences: [B, S] -> [B, S / region ranks]."""
        return x.chunk(self.layout.region, 1)[self.at.region].contiguous()


def build_mesh(layout: Layout, timeout: timedelta = timedelta(minutes=30)) -> Mesh:
    """Find this rank's position and create all groups. Collective; torch.distributed must have the layout's size.

    `timeout` is the longest wait in one collective of a group.

    Raises:
        UsageError: Megatron-core and DeepSpeed would place the ranks differently.
    """
    assert dist.get_world_size() == layout.world_size, (dist.get_world_size(), layout)
    check_rank_order(layout)
    rank = dist.get_rank()
    mesh = Mesh(layout, rank, coordinates_of(layout, rank), start_process_groups(layout, timeout))
    groups, at = mesh.groups, mesh.at
    theirs = (groups.tp.rank(), groups.cp.rank(), groups.dp.rank(), groups.pp.rank())
    assert theirs == (at.tensor, at.region, at.data, at.pipe), (mesh.rank, theirs, at)
    assert groups.dp_cp.rank() == at.data * layout.region + at.region, mesh
    return mesh
