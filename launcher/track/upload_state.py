"""What the next attempt of a run must know about its tracking: `tracking_state.json` in the run folder."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from biroute.configs.files import write_atomically


@dataclass
class TrackingState:
    """How far the metrics_log is sent, and to which MLflow run. Written by one thread at a time, atomically."""

    path: Path
    target: str  # URI without password, and experiment: elsewhere the run starts from the first byte
    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)  # finds a run whose creation was unconfirmed
    run_id: str | None = None
    sent_bytes: int = 0
    attempt: int = 0  # starts of this run so far
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)  # of the first attempt
    artifacts: dict[str, str] = field(default_factory=dict)  # path from the run folder -> fingerprint sent or ""

    @classmethod
    def load(cls, path: Path, target: str, metrics_log_bytes: int, notify: Callable[[str], None]) -> TrackingState:
        """Read the state, or start a new one; a changed `target` or a shorter metrics_log means sending all again.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            state = cls(**{**json.loads(path.read_text(encoding="utf-8")), "path": path})
        except FileNotFoundError:
            return cls(path, target)
        except (ValueError, TypeError):
            notify(f"{path}: unreadable; the run starts anew in MLflow, with all its points")
            return cls(path, target)
        if state.target != target:
            state.target = target
            state.forget_run()
        if state.sent_bytes > metrics_log_bytes:  # somebody replaced the metrics_log
            state.sent_bytes = 0
        return state

    def forget_run(self) -> None:
        """Send everything again, to a run yet to be found or made."""
        self.run_id, self.sent_bytes = None, 0
        self.artifacts = dict.fromkeys(self.artifacts, "")

    def save(self) -> None:
        """Write the file.

        Raises:
            OSError: the disk refused; the file keeps its last content.
        """
        fields = {name: value for name, value in asdict(self).items() if name != "path"}
        write_atomically(self.path, json.dumps(fields, indent=1, ensure_ascii=False).encode(), durable=False)
