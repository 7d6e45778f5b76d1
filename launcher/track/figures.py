"""Figures of one look: the curve of a run, and what benchmarks draw."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from biroute.configs.files import atomic_draft


def new_figure(columns: int, *, width: float = 5.2, height: float = 3.8) -> tuple[Any, list[Any]]:
    """Create a figure with `columns` axes side by side; width and height of each are in inches."""
    # The object interface rather than pyplot: it has no global state, so any thread may draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for one in axes:
        one.grid(True, color="#e4e6ea", linewidth=0.7)
        one.set_axisbelow(True)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        one.tick_params(labelsize=8.5)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG atomically; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_draft(path, durable=False) as draft, warnings.catch_warnings():
        # A name in a script that the font does not have is drawn as boxes; tables beside the picture have it.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure.savefig(draft, format="png")
