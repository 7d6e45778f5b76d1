"""A report of runs: tables and pictures as Markdown and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from biroute.configs.errors import UsageError
from biroute.configs.files import write_atomically
from biroute.configs.messages import printable
from biroute.launcher.bench.report import Table
from biroute.launcher.plan.report import duration
from biroute.launcher.report.compare import (
    BITS,
    HELDOUT,
    LOSS,
    PEAK,
    RANK_RATE,
    RANK_TFLOPS,
    RATE,
    STEP_SECONDS,
    ComparedRun,
    differing,
)
from biroute.launcher.report.figures import draw_losses, draw_throughput
from biroute.launcher.track.mlflow_history import RunHistory
from biroute.launcher.track.progress_line import with_prefix

TITLE = "Runs compared"
_CELL_CHARACTERS = 80
_ABSENT = "-"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#202124}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #e4e6ea;padding:.3em .7em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}"
)


def write_report(histories: Sequence[RunHistory], folder: Path) -> list[Path]:
    """Write report.html, report.md and the pictures of the latter; returns their paths.

    Raises:
        UsageError: the folder cannot be written.
    """
    runs = [ComparedRun(history) for history in histories]
    names = _names(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = [
            ("Loss against tokens, time and model operations", folder / "report-loss.png"),
            ("Throughput", folder / "report-throughput.png"),
        ]
        draw_losses(runs, names, pictures[0][1])
        draw_throughput(runs, names, pictures[1][1])
        tables = list(_tables(runs, names))
        page, text = folder / "report.html", folder / "report.md"
        write_atomically(page, _html(tables, pictures).encode())
        write_atomically(text, _markdown(tables, pictures).encode())
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; use a folder that can be written") from None
    return [page, text, *(path for _, path in pictures)]


def _names(runs: Sequence[ComparedRun]) -> list[str]:
    """Return a name for each run; those of the same name get the beginning of their ids."""
    names = [run.name for run in runs]
    return [
        f"{name} ({run.history.run_id[:6]})" if names.count(name) > 1 else name
        for name, run in zip(names, runs, strict=True)
    ]


def _tables(runs: Sequence[ComparedRun], names: Sequence[str]) -> Iterator[Table]:
    def rows(cells: Callable[[ComparedRun], list[str]], of: Sequence[ComparedRun] = runs) -> list[list[str]]:
        return [[name, *cells(run)] for name, run in zip(names, runs, strict=True) if run in of]

    header = ["run", "layout", "status", "steps", "tokens", "loss", "held-out loss", "bits per byte"]
    yield Table("Training", header, rows(_training))
    header = ["run", "tokens/s", "tokens/s of a rank", "TFLOP/s of a rank", "step", "time of training",
              "from first to last point", "model FLOPs", "peak of a rank"]  # fmt: skip
    yield Table("Speed", header, rows(_speed))
    if planned := [run for run in runs if run.predicted("step_seconds") is not None]:
        header = ["run", "predicted for", "step: predicted", "measured", "ratio", "peak: predicted", "measured"]
        yield Table("Predicted and measured", header, rows(_beside_plan, planned))
    if exchanging := [run for run in runs if run.middle("exchange/region_bytes")]:
        header = ["run", "a rank receives in a step", "worst rank", "forward", "of the bound", "of a causal fetch"]
        yield Table("Bytes between region ranks", header, rows(_exchange, exchanging))
    if different := differing(runs):
        yield Table("Settings that differ", ["setting", *names], [[name, *values] for name, values in different])


def _training(run: ComparedRun) -> list[str]:
    steps = list(run.progress)
    return [
        run.history.tags.get("layout", _ABSENT),
        run.history.status,
        f"{steps[-1]:,}" if steps else _ABSENT,
        with_prefix(run.progress[steps[-1]][0]) if steps else _ABSENT,
        *(_number(run.last(metric), ".4f") for metric in (LOSS, HELDOUT, BITS)),
    ]


def _speed(run: ComparedRun) -> list[str]:
    last = list(run.progress.values())[-1] if run.progress else None
    return [
        _number(run.middle(RATE), ",.0f"),
        _number(run.middle(RANK_RATE), ",.0f"),
        _number(run.middle(RANK_TFLOPS), ".3g"),
        _number(run.middle(STEP_SECONDS), ".3g", " s"),
        duration(last[1]) if last else _ABSENT,
        duration((run.history.last_ms - run.history.first_ms) / 1000),
        _number(run.flops_per_token * last[0] if last else None, ".3g"),
        _number(run.most(PEAK), ".2f", " GiB"),
    ]


def _beside_plan(run: ComparedRun) -> list[str]:
    wanted, measured = run.predicted("step_seconds"), run.middle(STEP_SECONDS)
    return [
        run.history.tags.get("plan.device", _ABSENT),
        _number(wanted, ".3g", " s"),
        _number(measured, ".3g", " s"),
        _number(measured / wanted if measured and wanted else None, ".2f"),
        _number(run.predicted("peak_gib"), ".3g", " GiB"),
        _number(run.most(PEAK), ".3g", " GiB"),
    ]


def _exchange(run: ComparedRun) -> list[str]:
    received, worst, forward, bound, causal = (
        run.middle(f"exchange/{name}")
        for name in ("region_bytes", "region_bytes_worst", "forward_bytes", "bound_bytes", "causal_fetch_bytes")
    )
    mebibytes = [
        _number(None if size is None else size / (1 << 20), ".3g", " MiB") for size in (received, worst, forward)
    ]
    shares = [_number(forward / whole if forward and whole else None, ".0%") for whole in (bound, causal)]
    return [*mebibytes, *shares]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _ABSENT if value is None else f"{value:{form}}{unit}"


def _cell(text: str) -> str:
    """Return a text from MLflow in one line: it may hold anything."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= _CELL_CHARACTERS else f"{text[: _CELL_CHARACTERS - 3]}..."


def _markdown(tables: Sequence[Table], pictures: Sequence[tuple[str, Path]]) -> str:
    def quoted(cell: str) -> str:
        return _cell(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    parts = [f"# {TITLE}", "Made by `biroute report` from what MLflow has of these runs."]
    parts += [f"![{caption}]({path.name})" for caption, path in pictures]
    parts += [
        Table(one.title, [*map(quoted, one.header)], [[*map(quoted, row)] for row in one.rows]).markdown()
        for one in tables
    ]
    return "\n\n".join(parts) + "\n"


def _html(tables: Sequence[Table], pictures: Sequence[tuple[str, Path]]) -> str:
    parts = [f"<h1>{TITLE}</h1>", "<p>Made by <code>biroute report</code> from what MLflow has of these runs.</p>"]
    for caption, path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<p><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></p>')
    for one in tables:
        head = "".join(f"<th>{html.escape(_cell(cell))}</th>" for cell in one.header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in one.rows
        )
        parts.append(f"<h2>{html.escape(one.title)}</h2><table><tr>{head}</tr>{body}</table>")
    head = f'<meta charset="utf-8"><title>{TITLE}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
