"""What a rank does around its training: read its environment, join the others, begin or join an attempt."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TextIO

from biroute.configs.errors import UsageError
from biroute.configs.load import load_config
from biroute.configs.schema import TrainConfig
from biroute.launcher.attempts.failures import explain_end, is_consequence, record_stop
from biroute.launcher.attempts.journal import FencingToken, end_attempt, given_attempt
from biroute.launcher.attempts.run_files import log_dir, warnings_file
from biroute.launcher.attempts.watchdog import Watchdog
from biroute.launcher.ranks.environment import RankEnvironment, find_rank_environment
from biroute.launcher.ranks.stop_signal import StopRequest
from biroute.launcher.start.kept_output import keep_output
from biroute.launcher.start.library_warnings import LibraryWarnings


class Rank:
    """One rank of one attempt."""

    def __init__(self, stop: StopRequest, library_warnings: LibraryWarnings) -> None:
        self.watchdog = Watchdog()
        self._stop = stop
        self._library_warnings = library_warnings
        self._log: TextIO | None = None  # unless the launcher writes it
        self._launched = False  # by the local launcher, which shows the cause on this rank's terminal
        self._began: FencingToken | None = None  # an attempt that this rank must end, as its launcher does not

    def train(self, config_path: str, overrides: list[str]) -> None:
        """Train as one of the ranks that the environment describes.

        Raises:
            UsageError, StoppedError, FencedError: as in `session.run`.
        """
        config = load_config(config_path, overrides)
        run_dir, environment, attempt = config.train.run_dir, find_rank_environment(), given_attempt()
        self._launched = bool(environment.file)
        if attempt is not None:
            self._watch(run_dir, attempt, environment, config.train)

        def note(signal_name: str) -> None:
            if attempt is not None:
                record_stop(log_dir(run_dir, attempt), None, signal_name)

        with self._stop.ending_at_once(note):
            from biroute.launcher.ranks.agreement import check_same, check_submission, run_facts
            from biroute.launcher.ranks.rendezvous import begin_joint_attempt, join_processes
            from biroute.launcher.ranks.secret import run_secret

            check_submission(Path(config_path), config, environment.world_size)
            # The local launcher's ranks meet in a folder that only this user can enter.
            secret = run_secret(run_dir) if environment.address else None
            place = join_processes(environment, config.train, secret)
            check_same(run_facts(config))
        if attempt is None:
            attempt = begin_joint_attempt(run_dir, environment.world_size)
            self._began = FencingToken(run_dir, attempt) if environment.rank == 0 else None
            self._watch(run_dir, attempt, environment, config.train)
        from biroute.launcher.train.session import (
            run,  # imports DeepSpeed, which looks up the chosen device on import
        )

        run(config, place, self._stop, FencingToken(run_dir, attempt), self.watchdog, log=self._log)

    def close(self, status: int) -> None:
        """Record the end of an attempt that the ranks themselves began; call it before the process ends."""
        self.watchdog.close()
        if self._began is not None:
            run_dir, attempt = self._began.run_dir, self._began.attempt
            end_attempt(run_dir, attempt, explain_end(log_dir(run_dir, attempt), status), limits=None)

    def show(self, error: Exception) -> None:
        """Print an internal error; but only to the log if another rank's end caused it, which the launcher tells."""
        if self._launched and self._log is not None and is_consequence(error):
            self._log.writelines(traceback.format_exception(error))
        else:
            traceback.print_exception(error)

    def _watch(self, run_dir: Path, attempt: int, environment: RankEnvironment, train: TrainConfig) -> None:
        logs = log_dir(run_dir, attempt)
        try:
            self._log = keep_output(logs, environment.rank)
        except OSError as error:
            raise UsageError(f"{logs}: {error.strerror}; use a folder that can be written") from None
        self._library_warnings.write_to(warnings_file(logs, environment.rank))
        self.watchdog.watch(
            logs,
            environment.rank,
            environment.world_size,
            hang_seconds=train.hang_seconds,
            startup_seconds=train.startup_seconds,
            log=self._log,
        )
