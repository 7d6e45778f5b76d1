"""Load of the machines that train, under the names that MLflow shows on a run's page of system metrics."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Sequence

import psutil
import torch
import torch.distributed as dist

_OF_NODE = (
    "cpu_utilization_percentage",
    "system_memory_usage_percentage",
    "network_receive_megabytes_per_second",
    "network_transmit_megabytes_per_second",
)
_OF_GPU = ("gpu_utilization_percentage", "gpu_memory_usage_percentage")
_NODES_SHOWN = 16  # one by one; of more nodes the mean, the least and the most


class SystemMetrics:
    """Samples each node on one of its ranks, and each GPU on its own."""

    def __init__(self, hosts: Sequence[str], rank: int, device: torch.device) -> None:
        """`hosts` are the host names of all ranks, by rank."""
        nodes = list(dict.fromkeys(hosts))
        self._nodes, self._node = len(nodes), nodes.index(hosts[rank])
        self._samples_node = hosts.index(hosts[rank]) == rank
        self._ranks_here = Counter(hosts)[hosts[rank]]
        self._device = device
        self._names = (*_OF_NODE, *_OF_GPU) if device.type == "cuda" else _OF_NODE
        self._traffic = self._read_traffic()
        psutil.cpu_percent()  # its next call counts from here

    def gather(self) -> dict[str, float]:
        """Return the load of all nodes since the last call. Collective."""
        table = torch.zeros(self._nodes, len(self._names), dtype=torch.float64)
        if self._samples_node:
            table[self._node, : len(_OF_NODE)] = torch.tensor(self._sample_node(), dtype=torch.float64)
        if self._device.type == "cuda":  # the mean of the node's GPUs
            gpu = torch.tensor(_sample_gpu(self._device), dtype=torch.float64) / self._ranks_here
            table[self._node, len(_OF_NODE) :] = gpu
        table = table.to(self._device)
        dist.all_reduce(table)
        return name_loads(self._names, table.tolist())

    def _sample_node(self) -> list[float]:
        before, self._traffic = self._traffic, self._read_traffic()
        seconds = max(1e-3, self._traffic[0] - before[0])
        rates = [(now - then) / 1e6 / seconds for now, then in zip(self._traffic[1:], before[1:], strict=True)]
        return [psutil.cpu_percent(), psutil.virtual_memory().percent, *rates]

    @staticmethod
    def _read_traffic() -> tuple[float, float, float]:
        counts = psutil.net_io_counters()  # None in a container without interfaces
        return time.monotonic(), float(counts.bytes_recv if counts else 0), float(counts.bytes_sent if counts else 0)


def name_loads(names: Sequence[str], loads: Sequence[Sequence[float]]) -> dict[str, float]:
    """Name the loads of nodes, [nodes][names]: one by one, or of many nodes their mean, least and most."""
    if len(loads) == 1:
        return {f"system/{name}": value for name, value in zip(names, loads[0], strict=True)}
    if len(loads) <= _NODES_SHOWN:
        return {
            f"system/node_{number}/{name}": value
            for number, node in enumerate(loads)
            for name, value in zip(names, node, strict=True)
        }
    named = {}
    for name, values in zip(names, zip(*loads, strict=True), strict=True):
        named[f"system/mean/{name}"] = sum(values) / len(values)
        named[f"system/min/{name}"], named[f"system/max/{name}"] = min(values), max(values)
    return named


def _sample_gpu(device: torch.device) -> list[float]:
    free, total = torch.cuda.mem_get_info(device)
    # torch asks NVIDIA's library for the utilization, through a package that may be missing.
    busy = float(torch.cuda.utilization(device)) if importlib.util.find_spec("pynvml") else 0.0
    return [busy, 100.0 * (1 - free / total)]
