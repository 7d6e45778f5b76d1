"""`biroute bench ...`: benchmarks. Each prints a table (or JSON) and may write a page and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from biroute.launcher.cli.options import AsJson, ConfigPath, Overrides
from biroute.launcher.start.library_warnings import ignore_library_warnings

bench_app = typer.Typer(no_args_is_help=True, help="Measure what BiRoute claims, on this machine.")

Out = Annotated[Path | None, typer.Option("--out", help="folder for a Markdown page and a PNG")]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variants", help="names of variants, repeatable, * allowed; left out: all usual ones"),
]


Rows = Annotated[
    Path | None, typer.Option("--rows", help="file that keeps finished rows, so that a stopped run can go on")
]


@bench_app.command()
def attention(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=512, help="tokens, repeatable; left out: 512 to 32768")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each setting; the median counts")] = 3,
    tokens_first: Annotated[
        bool, typer.Option("--tokens-first", help="tensors as a projection leaves them, not head by head")
    ] = False,
    train_step: Annotated[
        bool, typer.Option("--train-step/--no-train-step", help="whole training steps of a model as well")
    ] = True,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Time and memory of routed attention compared with dense attention, forward and backward; whole training steps.

    Example: biroute bench attention --length 2048 --length 8192 --out docs/benchmarks
    """
    from biroute.launcher.bench.attention.measure import LENGTHS, run_bench
    from biroute.launcher.bench.attention.page import print_attention, write_attention

    measure: Callable[..., list[dict[str, Any]]] | None = None
    if train_step:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks when it is imported
        ignore_library_warnings()
        from biroute.launcher.bench.attention.train_step import measure_train_steps

        measure = measure_train_steps
    layout = "tokens_first" if tokens_first else "heads_first"
    answer = run_bench(lengths or LENGTHS, repeats, layout=layout, train_steps=measure)
    _report(answer, as_json, out, print_attention, write_attention)


@bench_app.command()
def recall(
    steps: Annotated[int, typer.Option(help="optimizer steps of each variant and seed")] = 400,
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 1,
    variants: Variants = None,
    evaluation_sequences: Annotated[
        int, typer.Option(min=1, help="sequences to score on, with a question for every 8 of their 256 tokens")
    ] = 256,
    rows: Rows = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Associative recall by distance: what each kind of route finds, compared with dense and a random route.

    Example: biroute bench recall --seeds 2 --out docs/benchmarks
    """
    from biroute.launcher.bench.recall.measure import RecallSettings, run_bench
    from biroute.launcher.bench.recall.page import print_recall, write_recall

    settings = RecallSettings(steps=steps, evaluation_sequences=evaluation_sequences)
    answer = run_bench(settings, seeds, variants or [], rows)
    _report(answer, as_json, out, print_recall, write_recall)


@bench_app.command()
def quality(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of each variant and seed")] = 300,
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 2,
    variants: Variants = None,
    rows: Rows = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Held-out bits per byte of a configuration's model on its dataset under each kind of attention.

    Example: biroute bench quality configs/demo.yaml model.num_layers=2 --steps 300 --out docs/benchmarks
    """
    from biroute.configs.load import load_config

    loaded = load_config(config, overrides or [])
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks when it is imported
    ignore_library_warnings()
    from biroute.launcher.bench.quality.measure import run_bench
    from biroute.launcher.bench.quality.page import print_quality, write_quality

    answer = run_bench(loaded, steps, seeds, variants or [], rows)
    _report(answer, as_json, out, print_quality, write_quality)


@bench_app.command()
def exchange(
    config: ConfigPath,
    overrides: Overrides = None,
    compare: Annotated[
        list[Path] | None, typer.Option("--compare", help="configuration of another trained run, repeatable")
    ] = None,
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="tokens, repeatable; left out: as trained")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--ranks", min=2, help="ranks to plan for, repeatable; left out: 2 to 256")
    ] = None,
    measured: Annotated[
        list[int] | None, typer.Option("--measured", min=2, help="ranks to run, repeatable; left out: 2, 4, 8")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="start no ranks")] = False,
    sequences: Annotated[int, typer.Option(min=1, help="held-out sequences whose routes count")] = 2,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Bytes between ranks that share a sequence, over the routes of trained runs: planned, and measured.

    Example: biroute bench exchange configs/demo.yaml --compare per_region.yaml --length 4096 --out docs/benchmarks

    The newest checkpoint of each run gives the weights; overrides count for all of them.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    ignore_library_warnings()
    from biroute.launcher.bench.exchange import measure as bench
    from biroute.launcher.bench.exchange.page import print_exchange, write_exchange

    runs = [bench.open_run(path, overrides or []) for path in (config, *(compare or []))]
    answer = bench.run_bench(
        runs,
        lengths=lengths or [],
        ranks=ranks or bench.RANKS,
        sequences=sequences,
        measured_ranks=() if plan_only else measured or bench.MEASURED_RANKS,
    )
    _report(answer, as_json, out, print_exchange, write_exchange)


@bench_app.command()
def memory(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--ranks", min=1, help="region ranks, repeatable; left out: 1, 2, 4")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps of each run")] = 2,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Peak memory of training by the number of ranks that share each sequence, one run after the other.

    Example: biroute bench memory configs/long.yaml train.evaluate_sequences=1 --out docs/benchmarks
    """
    from biroute.launcher.bench.memory import RANKS, print_memory, run_bench, write_memory

    answer = run_bench(config, overrides or [], ranks or RANKS, steps)
    _report(answer, as_json, out, print_memory, write_memory)


@bench_app.command()
def pictures(
    steps: Annotated[int, typer.Option(help="optimizer steps of the small model whose routes are drawn")] = 400,
    as_json: AsJson = False,
    out: Annotated[Path, typer.Option("--out", help="folder for the PNGs")] = Path("docs/images"),
) -> None:
    """Draw what routing does: a route map, the leak of a mean query, and the cost of region sizes.

    Example: biroute bench pictures --out docs/images
    """
    from biroute.launcher.bench.routing_figures import draw_pictures

    answer = draw_pictures(out, steps)
    typer.echo(json.dumps(answer) if as_json else "\n".join(f"{name}: {value}" for name, value in answer.items()))


def _report(
    answer: Mapping[str, Any],
    as_json: bool,
    out: Path | None,
    show: Callable[[Mapping[str, Any]], None],
    write: Callable[[Mapping[str, Any], Path], list[Path]],
) -> None:
    """Print the answer, and write its page and picture if asked."""
    written = write(answer, out) if out is not None else []
    if as_json:
        typer.echo(json.dumps(answer))
        return
    show(answer)
    for path in written:
        typer.echo(f"wrote {path}")
