"""A file of the finished rows of a long benchmark, so that a benchmark that was stopped can resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from biroute.configs.errors import UsageError
from biroute.configs.files import append_file
from biroute.configs.records import parse_json, read_small

Row = dict[str, Any]


class KeptRows:
    """The finished rows of a benchmark with certain settings, by name."""

    def __init__(self, path: Path | None, about: Any) -> None:
        """Read the rows that the file has for these settings.

        Args:
            path: the file, which need not exist; None to keep no rows.
            about: the settings that the rows depend on, as plain values.

        Raises:
            UsageError: the file is not a file of rows.
        """
        self._path, self._about = path, json.dumps(about)
        self._known: dict[str, Row] = {}
        if path is None or not path.exists():
            return
        try:
            lines = [parse_json(line) for line in read_small(path).splitlines()]
            self._known = {line["row"]["name"]: line["row"] for line in lines if line["about"] == self._about}
        except (OSError, ValueError, TypeError, KeyError):
            raise UsageError(f"--rows {path}: not a file of rows of this benchmark; name another one") from None

    def row(self, name: str, measure: Callable[[], Row]) -> Row:
        """Return the row of that name; if there is none yet, call `measure` for it and keep it."""
        if name not in self._known:
            self._known[name] = measure()
            if self._path is not None:
                with append_file(self._path) as file:
                    file.write(json.dumps({"about": self._about, "row": self._known[name]}).encode() + b"\n")
        return self._known[name]
