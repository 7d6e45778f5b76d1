"""fp32 weights and AdamW moments by parameter, whatever ZeRO stage holds them in whatever fragments.

Reading is collective over the data-parallel group. DeepSpeed creates moments at the first step; a fresh engine
gets them at once here, so that state can be loaded before that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """The state of one DeepSpeed engine; `adam` is the torch optimizer that DeepSpeed wrapped."""

    def __init__(self, deepspeed_engine: Any, adam: torch.optim.Optimizer, zero_stage: int) -> None:
        self._wrapper = deepspeed_engine.optimizer
        self._adam = adam
        self._zero_stage = zero_stage
        self._create_moments()

    def read(self, parameter: nn.Parameter, keep: bool = True) -> dict[str, Tensor]:
        """Read `weight`, `exp_avg`, `exp_avg_sq` of this tensor rank's part, fp32, on the CPU. Collective.

        Without `keep` this rank only takes part, and gets nothing: a copy from the GPU for each rank would be slow.
        """
        if self._zero_stage == 0:
            state = self._adam.state[parameter]
            found = {"weight": parameter.detach(), **{name: state[name] for name in MOMENTS}}
        else:
            found = {"weight": safe_get_full_fp32_param(parameter)}
            found |= {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        if not keep:
            return {}
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in found.items()}

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return this tensor rank's part of the reduced gradient, after backward and before the step. Collective."""
        return safe_get_full_grad(parameter).detach().to("cpu", torch.float32, copy=True)

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Write what `read` returns. Call `finish_writing` after the last parameter."""
        if self._zero_stage == 3:
            self._write_partition(parameter, state)
            return
        parameter.copy_(state["weight"])
        if self._zero_stage == 0:
            for name in MOMENTS:
                self._adam.state[parameter][name].copy_(state[name])
            return
        # These copy the piece that this rank has of them, if any: the rest is not read from the file.
        parameter.set_full_hp_param(state["weight"])  # type: ignore[attr-defined]
        for name in MOMENTS:
            parameter.set_full_hp_param(state[name], name)  # type: ignore[attr-defined]

    def finish_writing(self, step: int) -> None:
        """Set the step count of the bias correction and refresh what DeepSpeed keeps gathered."""
        for state in self._adam.state.values():
            state["step"].fill_(step)
        persistent = getattr(self._wrapper, "persistent_parameters", None)
        if persistent:
            persistent[0].partition(persistent, has_been_updated=False)
            persistent[0].all_gather(persistent)

    def _create_moments(self) -> None:
        if self._zero_stage == 3:  # DeepSpeed lends these to AdamW one after the other during the step
            optimized = list(self._wrapper.fp32_partitioned_groups_flat)
        else:
            optimized = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        for parameter in optimized:
            # A fused AdamW wants its step count where the weights are, the plain one on the CPU.
            device = parameter.device if self._adam.defaults["fused"] else "cpu"
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            self._adam.state[parameter] = {"step": torch.zeros((), device=device), **moments}
        if self._zero_stage in (1, 2):
            self._wrapper._lazy_init_hp_params_optimizer_state()

    def _write_partition(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """ZeRO-3: this rank's slice. DeepSpeed's own setter of whole values fails on sizes that do not divide."""
        shard = parameter.ds_tensor  # type: ignore[attr-defined]
        optimizer = parameter._z3_optimizer  # type: ignore[attr-defined]
        size = shard.numel()
        start = size * optimizer._get_param_partition_rank(parameter)
        for name in ("weight", *MOMENTS):
            piece = state[name].flatten()[start : start + size]
            piece = nn.functional.pad(piece, (0, size - piece.numel())).to(shard.device)
            optimizer.set_local_hp_param(piece, parameter, None if name == "weight" else name)
            if name == "weight":
                shard.data.copy_(piece)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, vectors (norm weights) do not."""
    found = list(parameters)
    return [
        {"params": [p for p in found if _dimensions(p) > 1], "weight_decay": weight_decay},
        {"params": [p for p in found if _dimensions(p) <= 1], "weight_decay": 0.0},
    ]


def _dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions, also of a ZeRO-3 parameter whose data is elsewhere."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
