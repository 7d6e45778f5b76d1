"""The names of all files in a run folder, defined only here.

<run_dir>/
    tokenizer.model                 the dataset's, by which the run's checkpoints read and write text
    config.yaml                     the resolved configuration of the newest attempt
    attempts.jsonl                  attempt journal: how each attempt began and ended
    attempt                         fencing token: the number of the attempt that owns the folder
    .secret                         by which the ranks recognize each other
    metrics.jsonl                   metrics log: every point, whether MLflow has it or not
    evaluations.jsonl               what `biroute evaluate` found, in the form of the metrics log
    tracking_state.json             how far the uploader has got
    mlflow_run.json                 which run of MLflow this is, apart from what changes every second
    loss_curve.png
    checkpoints/step-00000200/
    logs/attempt-0001/              config.yaml that its ranks read; heartbeats, failures, logs, warnings
    logs/attempt-0001/shown/        config.yaml without passwords, for MLflow
    logs/attempt-0001/preflight/    findings by node
    logs/slurm-<job>.out, logs/evaluate-<job>.out
    submission/                     what `biroute submit` froze: configuration, profile, script, jobs
"""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.model"
JOURNAL = "attempts.jsonl"
FENCING_TOKEN = "attempt"
SECRET = ".secret"
METRICS_LOG = "metrics.jsonl"
EVALUATIONS_LOG = "evaluations.jsonl"
UPLOAD_STATE = "tracking_state.json"
MLFLOW_RUN = "mlflow_run.json"
UPLOAD_LOCK = ".tracking.lock"
SYNC_LOCK = ".sync.lock"
LOSS_PLOT = "loss_curve.png"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
PREFLIGHT = "preflight"  # in an attempt's logs
SUBMISSION = "submission"
SCRIPT = "job.sbatch"  # in the submission
CODE = "code"  # in the submission: the packages as they were
EVALUATE_SCRIPT = "evaluate.sbatch"  # in the submission, of `biroute submit --evaluate`
EVALUATIONS = "evaluations.jsonl"  # in the submission: the jobs of that script
PROFILE = "profile.yaml"  # in the submission
HARDWARE = "hardware.yaml"  # in the submission, if the profile names such a file
JOBS = "jobs.jsonl"  # in the submission
EARLIER = "earlier"  # in the submission: configuration, profile and script before each change by a resume
RESUME_LOCK = ".resume.lock"  # in the submission
CANCELLED = "cancelled"  # in the submission
LEFT_NODES = "left-nodes"  # in the submission: nodes on which not even an attempt could be recorded


def log_dir(run_dir: Path, attempt: int) -> Path:
    """Return the folder of an attempt's logs."""
    return run_dir / LOGS / f"attempt-{attempt:04d}"


def frozen_config(run_dir: Path, attempt: int) -> Path:
    """Return the file of the resolved configuration that the ranks of an attempt read."""
    return log_dir(run_dir, attempt) / CONFIG


def shown_config(run_dir: Path, attempt: int) -> Path:
    """Return the file of the configuration without passwords, which MLflow shows."""
    return log_dir(run_dir, attempt) / "shown" / CONFIG


def warnings_file(logs: Path, rank: int) -> Path:
    """Return the file for the library warnings of a rank; it exists only if there are any."""
    return logs / f"warnings-{rank:05d}.log"
