"""The model on its mesh, ready to train: DeepSpeed with or without a pipeline, behind one class.

`build_engine` is the whole order of application: plan the layers, build this rank's, hand them to DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from biroute.configs.schema import RunConfig
from biroute.model.language_model import LayerPlan, LayerSequence, Loss, loss_function, plan_layers
from biroute.parallel.engine.deepspeed_setup import (
    partitioned_construction,
    pipeline_specs,
    quietly,
    start,
    start_engine,
)
from biroute.parallel.engine.spike_guard import SpikeGuard
from biroute.parallel.engine.zero_state import OptimizerState, decay_groups
from biroute.parallel.mesh.mesh import Mesh
from biroute.parallel.phase_clock import PhaseClock
from biroute.parallel.region.costs import RegionLayout
from biroute.parallel.region.shard import RegionShard
from biroute.parallel.region.traffic_log import TrafficLog
from biroute.parallel.region.transport import Transport


@dataclass(frozen=True)
class Microbatch:
    """Input of one forward pass on this data rank."""

    inputs: Tensor  # [B, S / region ranks] int64: this rank's tokens
    labels: Tensor  # the same shape
    loss_mask: Tensor | None = None  # the same shape, bool: the labels that the loss counts; None = all of them

    @property
    def targets(self) -> tuple[Tensor, ...]:
        """The arguments of the loss after the logits."""
        return (self.labels,) if self.loss_mask is None else (self.labels, self.loss_mask)

    @classmethod
    def of(
        cls,
        inputs: np.ndarray,
        labels: np.ndarray,
        loss_mask: np.ndarray | None,
        *,
        mesh: Mesh,
        device: torch.device,
    ) -> Microbatch:
        """Take this rank's tokens of a microbatch [B, S] of its data rank, and move them to its device."""
        arrays = (inputs, labels) if loss_mask is None else (inputs, labels, loss_mask)
        own = [mesh.own_tokens(torch.from_numpy(x)) for x in arrays]
        if device.type == "cuda":  # from pinned memory the GPU copies by itself, while the host goes on
            own = [x.pin_memory() for x in own]
        return cls(*(x.to(device, non_blocking=True) for x in own))


@dataclass(frozen=True)
class StepReport:
    """Result of one optimizer step, equal on all ranks."""

    loss: float  # nats per target token, mean over the whole step
    gradient_norm: float  # of the whole gradient, before clipping; NaN if it is not finite
    skipped: bool = False  # the gradient is not finite or a spike, so no weight and no moment was changed
    spike: bool = False  # skipped by the spike guard


def build_engine(config: RunConfig, mesh: Mesh, device: torch.device, *, draw_weights: bool = True) -> Engine:
    """Build the model of `config` on `mesh`, with weights drawn from the seed. Collective.

    Without `draw_weights` they are NaN until a checkpoint is loaded.
    """
    start()
    clock = PhaseClock(torch.cuda.synchronize if device.type == "cuda" else None)
    shard = region_shard(config, mesh, clock)
    plans = plan_layers(config, mesh.groups, shard, draw_weights=draw_weights)
    loss = loss_function(config.model, mesh.layout.region)
    kind = PipelineEngine if mesh.layout.pipe > 1 else DataParallelEngine
    with quietly():
        engine = kind(config, mesh, device, plans, loss, clock)
    engine.traffic = None if shard is None else shard.transport.log
    return engine


def region_shard(config: RunConfig, mesh: Mesh, clock: PhaseClock) -> RegionShard | None:
    """Create this rank's shard of the sequences; None where every rank has whole sequences."""
    if mesh.layout.region == 1:
        return None
    layout = RegionLayout(config.model.num_regions, config.model.attention.region_size, mesh.layout.region)
    return RegionShard(layout, Transport(mesh.groups.cp, clock), config.parallel.region_exchange)


class Engine:
    """What the two engines share: optimizer, state by parameter name, reports."""

    traffic: TrafficLog | None = None  # bytes between region ranks, where they share sequences
    microbatches_per_evaluation = 1  # enough for one call of `evaluate` to keep all ranks busy

    def __init__(
        self, config: RunConfig, mesh: Mesh, device: torch.device, module: nn.Module, clock: PhaseClock
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.device = device
        self.clock = clock
        self._adam = _adam(config, module, device)
        self._gradient_norm, self._skipped = 0.0, False
        self.spike_guard = SpikeGuard(config.optim.spike_deviations, config.optim.spike_window)
        self._spike: bool | None = None  # whether this step is one; None until its norm is known
        if config.parallel.zero_stage == 0:
            self._adam.register_step_pre_hook(lambda *_: self._clip_gradients())
        if self.spike_guard.active:
            self._adam.register_step_pre_hook(lambda adam, *_: self._skip_spike(adam))
        self.deepspeed = start_engine(config, mesh, module, self._adam)
        self.state = OptimizerState(self.deepspeed, self._adam, config.parallel.zero_stage)

    def train_step(self, microbatches: Sequence[Microbatch], learning_rate: float) -> StepReport:
        """Take one optimizer step over this data rank's microbatches. Collective.

        In every layout a step whose gradient is not finite or a spike changes nothing, and does not count for AdamW.
        """
        self._spike = None
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._forward_backward_step(microbatches)
        if self.config.parallel.zero_stage > 0:
            self._skipped = not self.deepspeed.was_step_applied()
            self._gradient_norm = math.nan if self._skipped else float(self.deepspeed.get_global_grad_norm())
        spike = bool(self._spike)
        return StepReport(float(loss), self._gradient_norm, skipped=self._skipped or spike, spike=spike)

    def evaluate(self, microbatches: Sequence[Microbatch]) -> float:
        """Return the mean loss in nats per target token over all data ranks' microbatches. Collective."""
        with nullcontext() if self.traffic is None else self.traffic.paused():
            return self._evaluate(microbatches)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters by name, like `block.3.layer.mlp.linear_fc1.weight`, equal in every layout."""
        raise NotImplementedError

    def _forward_backward_step(self, microbatches: Sequence[Microbatch]) -> Tensor:
        raise NotImplementedError

    def _evaluate(self, microbatches: Sequence[Microbatch]) -> float:
        raise NotImplementedError

    def _skip_spike(self, adam: torch.optim.Optimizer) -> None:
        """Take the gradients away if this step is a spike. DeepSpeed may call AdamW several times for one step."""
        if self._spike is None:
            own = self.config.parallel.zero_stage == 0
            norm = self._gradient_norm if own else float(self.deepspeed.optimizer._global_grad_norm)
            self._spike = math.isfinite(norm) and self.spike_guard.is_spike(norm)
        if self._spike:
            for group in adam.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # AdamW passes over what has no gradient

    def _clip_gradients(self) -> None:
        """ZeRO 0: norm over all ranks, each parameter counted once, then clipping; no step if it is not finite.

        DeepSpeed's own clipping without ZeRO counts tied weights of a pipeline twice and drops the norms' weights
        of its later stages.
        """
        mine = torch.zeros((), device=self.device)
        gradients = [p.grad for _, p in self.named_parameters() if p.grad is not None]
        for _, parameter in self.named_parameters():
            replica = getattr(parameter, "ds_pipe_replicated", False)
            split = getattr(parameter, "tensor_model_parallel", False)
            if parameter.grad is not None and not replica and (split or self.mesh.at.tensor == 0):
                mine += parameter.grad.float().square().sum()
        dist.all_reduce(mine, group=self.mesh.groups.tp)
        dist.all_reduce(mine, group=self.mesh.groups.pp)
        norm = mine.sqrt()
        self._gradient_norm = float(norm)
        self._skipped = not math.isfinite(self._gradient_norm)
        if self._skipped:
            self._gradient_norm = math.nan
            for _, parameter in self.named_parameters():
                parameter.grad = None  # AdamW passes over what has no gradient
            return
        limit = self.config.optim.gradient_clip
        if limit > 0:
            torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


class DataParallelEngine(Engine):
    """No pipeline: each rank holds (its shards of) every layer."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        device: torch.device,
        plans: list[LayerPlan],
        loss: Loss,
        clock: PhaseClock,
    ) -> None:
        with partitioned_construction(config, mesh):
            # ZeRO-3 partitions a layer as it is built, and moves it as well.
            module = LayerSequence(plans, device if config.parallel.zero_stage < 3 else None)
        super().__init__(config, mesh, device, module, clock)
        self._loss = loss
        self._module = module
        # Gradients are reduced over data (and region) ranks inside backward. ZeRO 2 reduces buckets as they fill,
        # ZeRO 3 beside the computation, as ZeRO 2 may: of that, this is only what is left at the end.
        _time_method(self.deepspeed, "allreduce_gradients", self.clock, "comm_data")
        if config.parallel.zero_stage == 2 and not config.parallel.overlap_grad_reduce:
            _time_method(self.deepspeed.optimizer, "average_tensor", self.clock, "comm_data")

    def _forward_backward_step(self, microbatches: Sequence[Microbatch]) -> Tensor:
        self.deepspeed.train()
        total = torch.zeros((), device=self.device)
        for microbatch in microbatches:
            with self.clock.phase("forward"):
                loss = self._loss(self.deepspeed(microbatch.inputs), *microbatch.targets)
            with self.clock.phase("backward"):
                self.deepspeed.backward(loss)
            with self.clock.phase("optimizer"):
                self.deepspeed.step()
            total += loss.detach()
        return self._mean(total / len(microbatches))

    def _evaluate(self, microbatches: Sequence[Microbatch]) -> float:
        self.deepspeed.eval()
        total = torch.zeros((), device=self.device)
        with torch.no_grad():
            for microbatch in microbatches:
                total += self._loss(self.deepspeed(microbatch.inputs), *microbatch.targets)
        self.deepspeed.train()
        return float(self._mean(total / len(microbatches)))

    def _mean(self, value: Tensor) -> Tensor:
        group = self.mesh.groups.dp_cp
        dist.all_reduce(value, group=group)
        return value / group.size()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._module.named_weights()


class PipelineEngine(Engine):
    """A pipeline: each rank holds some consecutive layers, DeepSpeed moves activations and gradients."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        device: torch.device,
        plans: list[LayerPlan],
        loss: Loss,
        clock: PhaseClock,
    ) -> None:
        self._plans = plans
        self.microbatches_per_evaluation = 2 * mesh.layout.pipe
        self._pipeline = PipelineModule(
            layers=pipeline_specs(plans, device),
            topology=PipeModelDataParallelTopology(
                num_pp=mesh.layout.pipe,
                num_dp=mesh.layout.data * mesh.layout.region,
                num_mp=mesh.layout.tensor,
            ),
            loss_fn=lambda logits, targets: loss(logits, *targets),
            partition_method="type:Block",
        )
        super().__init__(config, mesh, device, self._pipeline, clock)
        self._time_instructions()

    def _forward_backward_step(self, microbatches: Sequence[Microbatch]) -> Tensor:
        loss: Tensor = self.deepspeed.train_batch(iter([(mb.inputs, mb.targets) for mb in microbatches]))
        with self.clock.phase("comm_pipeline"), torch.no_grad():
            # Two stages hold a tied embedding. They sum the same gradients, but in another order: without this, the
            # copies drift apart. The first stage's is the one that counts, and is saved.
            self._pipeline._synchronize_tied_weights()
        return loss

    def _evaluate(self, microbatches: Sequence[Microbatch]) -> float:
        batches = iter([(mb.inputs, mb.targets) for mb in microbatches])
        loss = self.deepspeed.eval_batch(batches, num_micro_batches=len(microbatches))
        self._pipeline.train()
        return float(loss)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        seen = set()
        for position in range(self._pipeline._local_start, self._pipeline._local_stop):
            name = self._plans[position].name
            if name in seen:
                continue
            seen.add(name)
            tied = self._pipeline.tied_modules
            module = tied[name] if name in tied else getattr(self._pipeline, str(position))
            yield from module.named_parameters(prefix=name)

    def _time_instructions(self) -> None:
        phases = {
            schedule.LoadMicroBatch: "data",
            schedule.ForwardPass: "forward",
            schedule.BackwardPass: "backward",
            schedule.OptimizerStep: "optimizer",
            schedule.ReduceGrads: "comm_data",
        }
        table = type(self.deepspeed)._INSTRUCTION_MAP
        self.deepspeed._INSTRUCTION_MAP = {
            instruction: _timed(method, self.clock, phases.get(instruction, "comm_pipeline"))
            for instruction, method in table.items()
        }


def _adam(config: RunConfig, module: nn.Module, device: torch.device) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        decay_groups(module.parameters(), config.optim.weight_decay),
        lr=0.0,  # set at every step
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.epsilon,
        fused=device.type == "cuda",
    )


def _timed(method: Callable[..., Any], clock: PhaseClock, phase: str) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(phase):
            return method(*args, **kwargs)

    return call


def _time_method(target: Any, name: str, clock: PhaseClock, phase: str) -> None:
    method = getattr(type(target), name)
    setattr(target, name, MethodType(_timed(method, clock, phase), target))
