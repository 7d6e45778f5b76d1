"""`biroute bench recall`: multi-query associative recall by variant and distance, a test of what routes find.

Every variant starts from the same weights and is trained on the same sequences. It is scored twice on other
sequences: as trained, and with the same weights under a random route, which a working router must beat.

Legend: S tokens, Q questions of a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from biroute.configs.errors import UsageError
from biroute.launcher.bench.recall.model import ModelSize, RecallModel, Variant
from biroute.launcher.bench.recall.task import RecallTask
from biroute.launcher.bench.report import environment_info, mean, say, select
from biroute.launcher.bench.rows import KeptRows
from biroute.model.attention.rule import Router

# Sequences grow during training: short ones teach the association in a fraction of the time, and long ones then teach
# to find distant pairs.
CURRICULUM = ((8, 0.3), (4, 0.3), (1, 0.4))  # (divisor of S, fraction of the steps)
DISTANCE_UNIT = 8  # tokens; distances are reported in regions of this size for every variant
FIRST_EVALUATION_SEED = 1 << 40  # distinct from the seeds of all training sequences


@dataclass(frozen=True)
class RecallSettings:
    """The settings of a run of the benchmark, except variants and seeds."""

    steps: int = 400
    sequence_length: int = 256
    tokens_per_step: int = 2048
    learning_rate: float = 1e-2
    warmup_steps: int = 20
    evaluation_sequences: int = 256
    size: ModelSize = field(default_factory=ModelSize)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps}: train for at least 1 step")

    @property
    def task(self) -> RecallTask:
        """The task at full length."""
        return RecallTask(self.sequence_length, self.sequence_length // 8)

    def tasks(self) -> Iterator[RecallTask]:
        """Yield the task of each step."""
        left = self.steps
        for number, (divisor, share) in enumerate(CURRICULUM):
            last = number == len(CURRICULUM) - 1
            steps = left if last else min(left, round(share * self.steps))
            left -= steps
            length = self.sequence_length // divisor
            yield from [RecallTask(length, length // 8)] * steps

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0: warm-up, constant, linear decay over the last 40%."""
        warm, cool = (step + 1) / self.warmup_steps, (self.steps - step) / (0.4 * self.steps)
        return self.learning_rate * min(1.0, warm, cool)


def _bi_level(name: str, sizes: str, **more: Any) -> Variant:
    region_size, topk = map(int, sizes.split("x"))
    return Variant(name, region_size=region_size, topk=topk, **more)


# Names: region size x topk. 8x4, 4x8 and 2x16 see 1/8 of 256 tokens; 4x4 and 2x8 see 1/16.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("dense", kind="dense"),
        Variant("local-8x4", kind="sliding_window", region_size=8, topk=4),
        _bi_level("token-8x4", "8x4"),
        _bi_level("token-8x4-parts4", "8x4", descriptors_per_region=4),
        _bi_level("token-8x4-parts8", "8x4", descriptors_per_region=8),
        _bi_level("token-4x8", "4x8"),
        _bi_level("token-4x8-parts2", "4x8", descriptors_per_region=2),
        _bi_level("token-4x8-parts4", "4x8", descriptors_per_region=4),
        _bi_level("token-2x16", "2x16"),
        _bi_level("token-4x4", "4x4"),
        _bi_level("token-4x4-parts4", "4x4", descriptors_per_region=4),
        _bi_level("token-2x8", "2x8"),
        _bi_level("token-4x8-post-rope", "4x8", descriptor="post_rope"),
        _bi_level("token-4x8-parts2-post-rope", "4x8", descriptors_per_region=2, descriptor="post_rope"),
        _bi_level("token-4x8-parts4-post-rope", "4x8", descriptors_per_region=4, descriptor="post_rope"),
        _bi_level("token-4x8-parts4-no-previous", "4x8", descriptors_per_region=4, force_previous=False),
        _bi_level("block4-4x8-parts4", "4x8", descriptors_per_region=4, query_block_size=4),
        _bi_level("region-8x4-parts8", "8x4", descriptors_per_region=8, query_block_size=8),
        _bi_level("region-8x4-dense0", "8x4", query_block_size=8, dense_layers=(0,)),
        Variant("dense-no-smear", kind="dense", key_smear=False),
        _bi_level("token-4x8-parts4-no-smear", "4x8", descriptors_per_region=4, key_smear=False),
        # The variants below are only measured when they are named.
        _bi_level("token-8x4-parts2", "8x4", descriptors_per_region=2),
        _bi_level("token-2x8-parts2", "2x8", descriptors_per_region=2),
        _bi_level("block4-4x8-dense0", "4x8", query_block_size=4, dense_layers=(0,)),
        _bi_level("token-2x8-no-previous", "2x8", force_previous=False),
        _bi_level("region-8x4", "8x4", query_block_size=8),
        _bi_level("region-8x4-dense1", "8x4", query_block_size=8, dense_layers=(1,)),
        _bi_level("token-8x4-dense0", "8x4", dense_layers=(0,)),
    )
}
DEFAULT_VARIANTS = tuple(VARIANTS)[: list(VARIANTS).index("token-8x4-parts2")]


@dataclass(frozen=True)
class RecallScore:
    """Fractions of right answers, overall and in each bin of distance (None if it has no question)."""

    accuracy: float
    by_distance: list[float | None]


def distance_bins(sequence_length: int) -> list[tuple[int, int]]:
    """Return first and last distance of each bin, in regions of DISTANCE_UNIT tokens: 0-1, 2-3, 4-7, 8-15, ..."""
    bins, first = [(0, 1)], 2
    while first * DISTANCE_UNIT < sequence_length:
        bins.append((first, 2 * first - 1))
        first *= 2
    return bins


def train_variant(variant: Variant, seed: int, settings: RecallSettings) -> RecallModel:
    """Train a model on the task; a pure function of its arguments."""
    torch.manual_seed(seed)
    model = RecallModel(settings.task.vocab_size, settings.size, variant)
    adam = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    for step, task in enumerate(settings.tasks()):
        batch = task.batch(max(1, settings.tokens_per_step // task.sequence_length), seed * 1_000_003 + step)
        logits_BQV = model.logits(batch.tokens, batch.position)
        loss = F.cross_entropy(logits_BQV.flatten(0, 1), batch.answer.flatten())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = settings.rate(step)
        adam.step()
    return model


@torch.no_grad()
def score(model: RecallModel, settings: RecallSettings, router: Router) -> RecallScore:
    """Score a model with `router` on sequences that were not trained on, which are the same for every model."""
    model.set_router(router)
    right, distance = [], []
    size = 16
    for start in range(0, settings.evaluation_sequences, size):
        batch = settings.task.batch(min(size, settings.evaluation_sequences - start), FIRST_EVALUATION_SEED + start)
        answer_BQ = model.logits(batch.tokens, batch.position).argmax(-1)
        right.append((answer_BQ == batch.answer).flatten())
        distance.append(batch.distance.flatten() // DISTANCE_UNIT)
    model.set_router("affinity")
    all_right, regions = torch.cat(right).float(), torch.cat(distance)
    by_distance = []
    for first, last in distance_bins(settings.sequence_length):
        inside = (regions >= first) & (regions <= last)
        by_distance.append(float(all_right[inside].mean()) if inside.any() else None)
    return RecallScore(float(all_right.mean()), by_distance)


@torch.no_grad()
def path_difference(model: RecallModel, settings: RecallSettings) -> float:
    """Return the largest difference between the logits with the benchmark's mask and with `bi_level_attention`."""
    batch = settings.task.batch(2, FIRST_EVALUATION_SEED)
    masked_BQV = model.logits(batch.tokens, batch.position)
    model.set_path(through_mask=False)
    product_BQV = model.logits(batch.tokens, batch.position)
    model.set_path(through_mask=True)
    return float((masked_BQV - product_BQV).abs().max())


def run_bench(
    settings: RecallSettings, seeds: int = 1, patterns: Sequence[str] = (), rows_path: Path | None = None
) -> dict[str, Any]:
    """Train and score the chosen variants, and return the results as plain values.

    Args:
        settings: the settings of the run.
        seeds: number of seeds.
        patterns: names of variants, with `*` as a wildcard; empty for the usual ones.
        rows_path: file that keeps each row when it is finished. Rows of the same settings and seeds are read from it
            instead of measured again. None to keep no rows.

    Raises:
        UsageError: there is no such variant or no seed, or the file is not a file of rows.
    """
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: use at least 1")
    names = select(list(VARIANTS), patterns, DEFAULT_VARIANTS)
    kept = KeptRows(rows_path, [asdict(settings), seeds])
    about_run = environment_info()  # recorded first, since the code may change during the run
    rows = []
    for name in names:
        row = kept.row(name, partial(run_variant, VARIANTS[name], range(seeds), settings))
        rows.append(row)
        say(f"{name}: {mean(row['accuracy']):.3f} (random route {mean(row['random_route']):.3f}), "
            f"{row['seconds']:.0f} s")  # fmt: skip
    return {
        "benchmark": "recall",
        "environment_info": about_run,
        "settings": asdict(settings),
        "num_values": settings.task.num_values,
        "seeds": list(range(seeds)),
        "distance_unit_tokens": DISTANCE_UNIT,
        "distance_bins": [list(edges) for edges in distance_bins(settings.sequence_length)],
        "rows": rows,
    }


def run_variant(variant: Variant, seeds: Sequence[int], settings: RecallSettings) -> dict[str, Any]:
    """Measure one row: the variant with every seed, as trained and under a random route."""
    started = time.perf_counter()
    scores: dict[Router, list[RecallScore]] = {"affinity": [], "random": []}
    difference = 0.0
    for seed in seeds:
        model = train_variant(variant, seed, settings)
        for router, found in scores.items():
            found.append(score(model, settings, router))
        difference = max(difference, path_difference(model, settings))
    return {
        **asdict(variant),
        "share_of_tokens": variant.share_of_tokens(settings.sequence_length),
        "accuracy": [found.accuracy for found in scores["affinity"]],
        "random_route": [found.accuracy for found in scores["random"]],
        "by_distance": _mean_by_distance(scores["affinity"]),
        "by_distance_random_route": _mean_by_distance(scores["random"]),
        "largest_difference_to_bi_level_attention": difference,
        "seconds": time.perf_counter() - started,
    }


def _mean_by_distance(scores: Sequence[RecallScore]) -> list[float | None]:
    # All models get the same questions, so a bin is empty for all seeds or for none.
    columns = zip(*(one.by_distance for one in scores), strict=True)
    return [None if None in column else mean([x for x in column if x is not None]) for column in columns]
