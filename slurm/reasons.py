"""Slurm's reasons for a job that waits, in words, and whether waiting can end it. No torch."""

from __future__ import annotations

import re
from typing import NamedTuple


class Reason(NamedTuple):
    """What a reason means; `hopeless` if the job will not begin by itself."""

    words: str
    hopeless: bool = False


# The names are those of `squeue --format=%r`, "Job Reason Codes" in its manual. The first that matches counts.
_REASONS: tuple[tuple[str, Reason], ...] = (
    ("None", Reason("Slurm has not looked at it yet")),
    ("Resources", Reason("waits for free nodes")),
    ("Priority", Reason("other jobs are before it")),
    ("BeginTime", Reason("waits for its begin time, as for two minutes after it was queued again")),
    ("Cleaning", Reason("its last start is still being cleaned up")),
    ("Dependency", Reason("waits for another job")),
    ("DependencyNeverSatisfied", Reason("waits for a job that failed", hopeless=True)),
    ("JobHeldUser", Reason("held by its user: `scontrol release JOB`", hopeless=True)),
    ("JobHeldAdmin", Reason("held by an administrator: ask them", hopeless=True)),
    (".*requeued.held", Reason("Slurm could not start it and holds it: `scontrol release JOB`", hopeless=True)),
    ("PartitionNodeLimit", Reason("asks for more nodes than its partition allows", hopeless=True)),
    ("PartitionTimeLimit", Reason("asks for more time than its partition allows", hopeless=True)),
    ("PartitionConfig|BadConstraints", Reason("no node has what it asks for", hopeless=True)),
    ("Partition(Down|Inactive)", Reason("its partition is down")),
    ("InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed", Reason("its account or QOS is wrong", True)),
    ("ReqNodeNotAvail.*", Reason("nodes that it needs are down, reserved or in maintenance")),
    ("Reservation.*", Reason("waits for its reservation")),
    ("Licenses", Reason("waits for licences")),
    ("(QOS|Assoc|Max).*PerJob.*|QOSMaxWallDurationPerJobLimit|AssocMaxWallDurationPerJobLimit", Reason(
        "asks for more than its account or QOS allows a job", hopeless=True
    )),
    ("(QOS|Assoc|Max).*", Reason("a limit of its account or QOS is used up")),
    ("NodeDown|.*DOWN.*", Reason("a node that it needs is down")),
)  # fmt: skip


def in_words(reason: str, job_id: str = "JOB") -> str:
    """Say what a reason means, with Slurm's own name of it; "" if there is none."""
    if not reason:
        return ""
    found = find(reason)
    if found is None:
        return reason
    never = "; it does not begin by itself" if found.hopeless else ""
    name = "" if reason == "None" else f" ({reason})"
    return f"{found.words.replace('JOB', job_id)}{never}{name}"


def why_it_waits(reason: str, begins: str, job_id: str) -> str:
    """Say what a job waits for and when Slurm expects it to begin, as far as it says so."""
    expected = f"expected to begin {begins}" if begins else ""
    return ", ".join(part for part in (in_words(reason, job_id), expected) if part)


def find(reason: str) -> Reason | None:
    """Return what a reason means; None for one that is not known here."""
    name = reason.strip("()").partition(",")[0]
    return next((meaning for pattern, meaning in _REASONS if re.fullmatch(pattern, name)), None)
