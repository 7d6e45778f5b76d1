"""The layouts and models that `biroute bench plan` trains for some steps: none of them is what a rate is measured at.

No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from biroute.configs.layout import resolve_layout
from biroute.configs.load import config_from_tree
from biroute.configs.schema import RunConfig
from biroute.launcher.plan.workload import Execution, Workload

Sections = dict[str, dict[str, Any]]
VOCABULARY = 2048
DENSE = {"kind": "dense"}
PER_TOKEN = {"region_size": 16, "query_block_size": 1, "topk": 8, "descriptors_per_region": 1}
PER_REGION = {"region_size": 64, "query_block_size": 64, "topk": 8, "descriptors_per_region": 1}
WINDOW = {"kind": "sliding_window", "region_size": 64, "topk": 4}


@dataclass(frozen=True)
class Case:
    """A model on a layout.

    Attributes:
        name: of the row.
        ranks: processes.
        model, attention, parallel, train: fields of the configuration that differ from those of `config`.
    """

    name: str
    ranks: int
    model: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=lambda: dict(DENSE))
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def config(self) -> RunConfig:
        """Return the configuration."""
        tree: Sections = {
            "model": {
                "hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "sequence_length": 1024,
                **self.model, "attention": self.attention,
            },
            "data": {"tokenizer": {"vocab_size": VOCABULARY}},
            "parallel": self.parallel,
            "train": {
                "global_batch_size": 4, "microbatch_size": 2, "evaluate_sequences": 4, "steps": 8, **self.train
            },
        }  # fmt: skip
        return config_from_tree(tree, self.name)

    def work(self) -> Workload:
        """Return what each rank has to do."""
        config = self.config()
        return Workload(config, resolve_layout(config, self.ranks), Execution.of(config, cpu=True))


CASES = (
    Case("dense", 1),
    Case("dense, recomputed", 1, {"hidden_size": 384, "num_layers": 3}, train={"activation_checkpointing": True}),
    Case("dense, long", 1, {"sequence_length": 4096, "num_layers": 2}, train={
        "global_batch_size": 1, "microbatch_size": 1, "evaluate_sequences": 1}),
    Case("routed for each token", 1, attention=PER_TOKEN),
    Case("routed for each region, long", 1, {"sequence_length": 4096, "num_layers": 2}, PER_REGION, train={
        "global_batch_size": 1, "microbatch_size": 1, "evaluate_sequences": 1}),
    Case("routed for each token, short", 1, {"sequence_length": 512, "qk_norm": True}, PER_TOKEN),
    Case("sliding window", 1, {"sequence_length": 2048, "hidden_size": 192, "num_heads": 6}, WINDOW, train={
        "global_batch_size": 2, "microbatch_size": 1, "evaluate_sequences": 2}),
    Case("tensor", 2, {"hidden_size": 512, "num_heads": 8}, parallel={"tensor": 2}),
    Case("tensor, sequence parallel, routed", 2, {"hidden_size": 384, "num_heads": 12}, PER_REGION,
         {"tensor": 2, "sequence_parallel": True}),
    Case("pipeline", 2, {"hidden_size": 320, "num_heads": 10}, parallel={"pipeline": 2}, train={
        "global_batch_size": 8, "evaluate_sequences": 8}),
    Case("pipeline, routed", 2, {"num_layers": 6}, PER_TOKEN, {"pipeline": 2}, {
        "global_batch_size": 8, "evaluate_sequences": 8}),
    Case("data, no ZeRO", 2, {"hidden_size": 384}, parallel={"zero_stage": 0}),
    Case("data, ZeRO 1, dense and routed layers", 2, {"dense_layers": [0], "sliding_window_layers": [3]},
         PER_TOKEN, {"zero_stage": 1}),
    Case("data, ZeRO 2, recomputed", 2, {"hidden_size": 512}, parallel={"zero_stage": 2},
         train={"activation_checkpointing": True}),
    Case("data, ZeRO 3", 2, {"hidden_size": 512}, parallel={"zero_stage": 3}),
    Case("region, dense", 2, {"sequence_length": 2048}, parallel={"region": 2}, train={
        "global_batch_size": 2, "microbatch_size": 1, "evaluate_sequences": 2}),
    Case("region, sliding window", 2, {"sequence_length": 4096, "num_layers": 2}, WINDOW, {"region": 2}, {
        "global_batch_size": 1, "microbatch_size": 1, "evaluate_sequences": 1}),
    Case("region, routed", 2, {"sequence_length": 4096}, PER_REGION, {"region": 2}, {
        "global_batch_size": 1, "microbatch_size": 1, "evaluate_sequences": 1}),
    Case("tensor x pipeline, sequence parallel", 4, parallel={"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    Case("tensor x data, ZeRO 1", 4, attention=PER_TOKEN, parallel={"tensor": 2, "data": 2, "zero_stage": 1}),
    Case("region x data, ZeRO 2", 4, {"sequence_length": 2048}, WINDOW, {"region": 2, "data": 2, "zero_stage": 2}),
)  # fmt: skip
