"""Cancel a run (`biroute cancel`) and submit it again (`biroute resume`). No torch."""

from __future__ import annotations

from biroute.configs.errors import UsageError
from biroute.configs.files import create_once
from biroute.slurm import client
from biroute.slurm.run_folder import RunFolder
from biroute.slurm.status import status_of
from biroute.slurm.submit import explain_run_dir_errors, record_job


def cancel_run(run: RunFolder, *, now: bool) -> list[str]:
    """Mark the run as cancelled, so that it is not queued again, and end its jobs.

    Args:
        run: the run to cancel.
        now: end running jobs immediately; otherwise they save first.

    Returns:
        One line for each job, saying what was done.

    Raises:
        UsageError: the run is another user's or has no job, or Slurm refuses.
    """
    run.check_ours("cancel")
    jobs = run.jobs_in(client.queue())
    if not jobs:
        raise UsageError(f"run {run.name} has no job queued or running; it is {status_of(run, []).state}")
    with explain_run_dir_errors(run.path):
        create_once(
            run.cancelled_mark, b""
        )  # first: a job's script looks for the mark as soon as its ranks have ended
    told = []
    for job in jobs:
        if job.state == "RUNNING" and not now:
            client.ask_to_stop(job.job_id)
            told.append(f"job {job.job_id} saves and ends (`biroute cancel --now` would not wait for it)")
        else:
            client.cancel(job.job_id)
            told.append(f"job {job.job_id} cancelled")
    return told


def resume_run(run: RunFolder) -> str:
    """Submit the run's script again and return the job's id.

    Raises:
        UsageError: the run is another user's, was never submitted, has a job or is finished, or Slurm refuses.
    """
    run.check_ours("resume")
    if not run.script.exists():
        raise UsageError(f"run {run.name} was not submitted to Slurm; run its `biroute train` command again")
    config = run.config()
    if config is not None and config.train.run_dir.resolve() != run.path.resolve():
        raise UsageError(
            f"{run.path} was copied or moved from {config.train.run_dir}, where its job would run; move it back, or "
            "submit a run with a new train.run_dir, after `biroute checkpoint copy`"
        )
    jobs = run.jobs_in(client.queue())
    if jobs:
        raise UsageError(
            f"run {run.name} has job {jobs[0].job_id}, {jobs[0].state}; wait for its end or `biroute cancel` it"
        )
    if status_of(run, []).state == "finished":
        raise UsageError(f"run {run.name} is finished: nothing to resume")
    marked = run.cancelled_mark.exists()
    with explain_run_dir_errors(run.path):
        run.cancelled_mark.unlink(missing_ok=True)
    try:
        job_id = client.submit(run.script)
    except UsageError:
        if marked:
            create_once(run.cancelled_mark, b"")
        raise
    record_job(run.path, job_id, "resume")
    return job_id
