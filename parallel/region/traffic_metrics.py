"""The exchange of a run as metrics: bytes of the mean and the worst rank compared with what other means would
move.
"""

from __future__ import annotations

from typing import Any

from biroute.parallel.messages import gather_messages
from biroute.parallel.region.traffic_log import TrafficLog


def exchange_metrics(log: TrafficLog, steps: int) -> dict[str, float]:
    """Metrics per optimizer step over the `steps` since the last call, which then count anew. Collective, all ranks.

    `exchange/region_bytes` counts all that a rank received (payload of forward and backward, requests, descriptors,
    gathered keys), mean over ranks; `_worst` the rank that received most. `exchange/forward_bytes` is the payload of
    forward in routed layers, both ways, to compare with `causal_fetch` (keys and values of all earlier ranks), `ring`
    (of all ranks) and `bound` (the most that any route could cause).
    """
    baselines = [one for found in log.baselines.values() for one in found]
    mine = {
        "received": log.total(log.received) / steps,
        "sent": log.total(log.sent) / steps,
        "forward": sum(log.planned.values()) / steps,
        "causal_fetch": sum(one.causal_fetch for one in baselines) / steps,
        "ring": sum(one.ring for one in baselines) / steps,
        "bound": sum(one.bound for one in baselines) / steps,
        "layers": {str(layer): log.total(log.received, layer) / steps for layer in log.layers()},
    }
    log.clear()
    everyone: list[dict[str, Any]] = gather_messages(mine)

    def mean(name: str) -> float:
        return sum(one[name] for one in everyone) / len(everyone)

    received, sent = ([one[name] for one in everyone] for name in ("received", "sent"))
    metrics = {
        "exchange/region_bytes": mean("received"),
        "exchange/region_bytes_worst": max(received),
        "exchange/worst_rank": float(received.index(max(received))),
        "exchange/hottest_sender_bytes": max(sent),
        "exchange/hottest_sender": float(sent.index(max(sent))),
    }
    metrics |= {f"exchange/{name}_bytes": mean(name) for name in ("forward", "causal_fetch", "ring", "bound")}
    for layer in sorted({int(layer) for one in everyone for layer in one["layers"]}):
        holders = [one["layers"][str(layer)] for one in everyone if str(layer) in one["layers"]]
        metrics[f"exchange/layer_{layer:02d}_bytes"] = sum(holders) / len(holders)
    return metrics
