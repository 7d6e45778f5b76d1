"""Which paths a pattern such as `tree/**/*.txt` matches, where links among folders may lead in circles."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator

_ANY_DEPTH = "**"


def matching_paths(pattern: str) -> list[str]:
    """Return the sorted paths that a pattern matches: those of `glob.glob(pattern, recursive=True)`.

    But `**` enters each folder once, however many links lead to it: with two links to a folder above them, glob would
    follow all their combinations, 2 ** 40 of them.
    """
    parts = pattern.split("/")
    if _ANY_DEPTH not in parts:
        return sorted(glob.glob(pattern))
    depth = parts.index(_ANY_DEPTH)
    above, below = "".join(f"{part}/" for part in parts[:depth]), "/".join(parts[depth + 1 :] or ["*"])
    tops = glob.glob(above) if above else [""]
    return sorted({path for top in tops for folder in _folders(top) for path in _matching_below(folder, below)})


def _matching_below(folder: str, pattern: str) -> list[str]:
    return matching_paths(glob.escape(folder) + pattern)


def _folders(top: str) -> Iterator[str]:
    """Yield a folder and all below it, but hidden ones, in the order of their names; each ends with a slash."""
    seen: set[tuple[int, int]] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            stat = os.stat(folder or ".")
            names = os.listdir(folder or ".")
        except OSError:  # not readable, or removed by now: glob leaves it out as well
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        yield folder
        below = [f"{folder}{name}/" for name in sorted(names, reverse=True) if not name.startswith(".")]
        waiting += [path for path in below if os.path.isdir(path)]
