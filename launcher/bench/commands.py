"""`biroute bench ...`: benchmarks. Each prints a table or JSON, and can write a page with a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biroute.configs.errors import EXIT_FAILURE
from biroute.launcher.cli.options import AsJson, ConfigPath, Overrides
from biroute.launcher.start.library_warnings import ignore_library_warnings

if TYPE_CHECKING:
    from biroute.launcher.bench.report import Page

bench_app = typer.Typer(no_args_is_help=True)

Out = Annotated[Path | None, typer.Option("--out", help="folder for a Markdown page and a PNG")]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variants", help="name of a variant, repeatable, with * as a wildcard; left out: the usual ones"),
]


Rows = Annotated[
    Path | None, typer.Option("--rows", help="file that keeps finished rows, so that a stopped benchmark can resume")
]


@bench_app.callback()
def prepare_libraries() -> None:
    """Measure what BiRoute claims, on this machine."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
    ignore_library_warnings()


@bench_app.command()
def attention(
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--length", min=512, help="measure only settings of this many tokens, repeatable; left out: all"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each setting, of which the median is reported")] = 3,
    tokens_first: Annotated[
        bool, typer.Option("--tokens-first", help="use the layout [B, S, H, D] of a projection, not [B, H, S, D]")
    ] = False,
    train_step: Annotated[
        bool, typer.Option("--train-step/--no-train-step", help="also measure whole training steps of a model")
    ] = True,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Measure time and memory of routed attention compared with dense attention, and whole training steps.

    Example: biroute bench attention --length 2048 --length 8192 --out docs/benchmarks
    """
    from biroute.launcher.bench.attention.measure import LENGTHS, TARGETS, check_lengths, run_bench
    from biroute.launcher.bench.attention.page import attention_page

    check_lengths(lengths or LENGTHS)
    measure: Callable[..., list[dict[str, Any]]] | None = None
    if train_step:
        from biroute.launcher.bench.attention.train_step import STEP_MODEL, measure_train_steps

        if lengths is None or STEP_MODEL.sequence_length in lengths:
            measure = measure_train_steps
    layout = "tokens_first" if tokens_first else "heads_first"
    targets = [setting for setting in TARGETS if lengths is None or setting.num_tokens in lengths]
    answer = run_bench(lengths or LENGTHS, repeats, targets, layout=layout, train_steps=measure)
    _report(answer, attention_page(answer), as_json, out)


@bench_app.command()
def gpu(
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", min=256, help="tokens of a sequence, repeatable; left out: 8,192 to 131,072"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each setting, of which the median is reported")] = 5,
    run: Annotated[
        Path | None, typer.Option("--run", help="trained run whose routes are measured, too; regions of 64 tokens")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="text file that the run's model reads for its routes")
    ] = None,
    train_step: Annotated[
        bool, typer.Option("--train-step/--no-train-step", help="also measure whole training steps of a model")
    ] = True,
    rows: Rows = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Measure a routed layer and training steps on a GPU beside dense attention, and what is asked of them.

    Example: biroute bench gpu --run runs/demo --text book.txt --rows gpu-rows.jsonl --out docs/benchmarks

    A few minutes; exit status 1 if a setting could not be measured.
    """
    os.environ["DS_ACCELERATOR"] = "cuda"  # over `prepare_libraries`
    from biroute.launcher.bench.gpu import measure
    from biroute.launcher.bench.gpu.llama import check_installed
    from biroute.launcher.bench.gpu.page import gpu_page
    from biroute.launcher.bench.gpu.targets import STEP_MODEL

    device, wanted = measure.the_gpu(), lengths or list(measure.LENGTHS)
    measure.check_lengths(wanted)
    if train_step:
        check_installed()
        measure.join(device)
    routes = measure.routes_of_run(run, text, max(wanted))
    model = STEP_MODEL if train_step else None
    answer = measure.run_bench(device, wanted, repeats, routes=routes, step_model=model, rows=rows)
    _report(answer, gpu_page(answer), as_json, out)
    if answer["failed"]:
        raise typer.Exit(EXIT_FAILURE)


@bench_app.command()
def recall(
    steps: Annotated[int, typer.Option(help="optimizer steps of each variant and seed")] = 400,
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 1,
    variants: Variants = None,
    evaluation_sequences: Annotated[
        int, typer.Option(min=1, help="sequences to score on; each has 256 tokens and 32 questions")
    ] = 256,
    rows: Rows = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Measure associative recall by distance for several kinds of routes, compared with dense and with random routes.

    Example: biroute bench recall --seeds 2 --out docs/benchmarks
    """
    from biroute.launcher.bench.recall.measure import RecallSettings, run_bench
    from biroute.launcher.bench.recall.page import recall_page

    settings = RecallSettings(steps=steps, evaluation_sequences=evaluation_sequences)
    answer = run_bench(settings, seeds, variants or [], rows)
    _report(answer, recall_page(answer), as_json, out)


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
    """Measure held-out bits per byte of a configuration's model on its dataset with each kind of attention.

    Example: biroute bench quality configs/demo.yaml model.num_layers=2 --steps 300 --out docs/benchmarks
    """
    from biroute.configs.load import load_config

    loaded = load_config(config, overrides or [])
    from biroute.launcher.bench.quality.measure import run_bench
    from biroute.launcher.bench.quality.page import quality_page

    answer = run_bench(loaded, steps, seeds, variants or [], rows)
    _report(answer, quality_page(answer), as_json, out)


@bench_app.command()
def exchange(
    config: ConfigPath,
    overrides: Overrides = None,
    compare: Annotated[
        list[Path] | None, typer.Option("--compare", help="configuration of another trained run, repeatable")
    ] = None,
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="tokens, repeatable; left out: the trained length")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--ranks", min=2, help="ranks to plan for, repeatable; left out: 2 to 256")
    ] = None,
    measured: Annotated[
        list[int] | None, typer.Option("--measured", min=2, help="ranks to start, repeatable; left out: 2, 4, 8")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="only plan, without starting ranks")] = False,
    sequences: Annotated[int, typer.Option(min=1, help="number of held-out sequences to take routes from")] = 2,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Plan and measure the bytes between ranks that share a sequence, with the routes of trained runs.

    Example: biroute bench exchange configs/demo.yaml --compare configs/debug.yaml --plan-only --out docs/benchmarks

    The weights are those of each run's newest checkpoint; overrides apply to all configurations.
    """
    from biroute.launcher.bench.exchange import measure as bench
    from biroute.launcher.bench.exchange.page import exchange_page

    runs = [bench.open_run(path, overrides or []) for path in (config, *(compare or []))]
    answer = bench.run_bench(
        runs,
        lengths=lengths or [],
        ranks=ranks or bench.RANKS,
        sequences=sequences,
        measured_ranks=() if plan_only else measured or bench.MEASURED_RANKS,
    )
    _report(answer, exchange_page(answer), as_json, out)


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
    """Measure the peak memory of training for several numbers of ranks that share each sequence.

    Example: biroute bench memory configs/long.yaml train.evaluate_sequences=1 --out docs/benchmarks
    """
    from biroute.launcher.bench.memory import RANKS, memory_page, run_bench

    answer = run_bench(config, overrides or [], ranks or RANKS, steps)
    _report(answer, memory_page(answer), as_json, out)


@bench_app.command()
def hardware(
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes, as many as will train; left out: one for each core")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, max=3600, help="time of each measurement")] = 1.0,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option("--out", help="folder for this-machine.yaml")] = None,
) -> None:
    """Measure a hardware profile of this machine, with real processes on its CPUs, for biroute plan.

    Example: biroute bench hardware --ranks 2 --out profiles
    """
    from biroute.launcher.bench import hardware as bench

    count = ranks or bench.default_ranks()
    measured = bench.measure_hardware(count, seconds)
    profile = bench.profile_of(measured, count)
    text = bench.profile_text(profile, measured)
    written = None if out is None else bench.write_profile(text, out)
    typer.echo(json.dumps(profile.model_dump()) if as_json else text.rstrip("\n"))
    if written is not None and not as_json:
        typer.echo(f"wrote {written}; biroute plan CONFIG --hardware {written}")


@bench_app.command()
def plan(
    cases: Annotated[
        list[str] | None, typer.Option("--case", help="name of a layout, repeatable; left out: all")
    ] = None,
    part: Annotated[
        str, typer.Option("--part", help="bytes: of messages and memory; times: with hardware profiles; all: both")
    ] = "all",
    seconds: Annotated[float, typer.Option(min=0.03, max=3600, help="time of the steps of each layout")] = 1.2,
    again: Annotated[
        bool,
        typer.Option("--again", help="keep the profiles in the file of --out, and the faster steps of both runs"),
    ] = False,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option("--out", help="folder that keeps plan-measured.json")] = None,
) -> None:
    """Measure bytes, memory and step times of many layouts beside what biroute plan predicts for this machine.

    Example: biroute bench plan --case dense --part bytes
    """
    from biroute.configs.errors import UsageError
    from biroute.launcher.bench.hardware import default_ranks
    from biroute.launcher.bench.plan import page
    from biroute.launcher.bench.plan.run import FILE, run_bench
    from biroute.launcher.bench.report import Table

    if part not in ("all", "bytes", "times"):
        raise UsageError(f"--part {part}: no such part; use all, bytes or times")
    answer = run_bench(cases or [], part, seconds, out, default_ranks(), again=again)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(answer))
        return
    for title, (header, rows) in {
        "Bytes that a rank sends in a step": page.bytes_table(answer),
        "Peak memory, MiB": page.memory_table(answer),
        "Step, seconds": page.time_table(answer),
    }.items():
        if rows:
            Table(title, header, rows).show()
    if out is not None:
        typer.echo(f"wrote {out / FILE}")


@bench_app.command()
def logging(
    config: ConfigPath,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="steps of each kind, taken in turn")] = 10,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Measure what logging and routing health add to a training step, with and without in one run.

    Example: biroute bench logging configs/demo.yaml --rounds 20 --out docs/benchmarks
    """
    from biroute.configs.load import load_config

    loaded = load_config(config, overrides or [])
    from biroute.launcher.bench.logging import logging_page, run_bench

    answer = run_bench(loaded, rounds)
    _report(answer, logging_page(answer), as_json, out)


@bench_app.command()
def decode(
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", min=64, max=1 << 22, help="tokens before, repeatable; left out: 512 to 65,536"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="tokens to measure, of which the fastest is reported")] = 32,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Measure the time of one more token by the length before it: routed, dense, and transformers' Llama.

    Example: biroute bench decode --length 512 --length 4096 --out docs/benchmarks
    """
    from biroute.launcher.bench.decode.measure import LENGTHS, run_bench
    from biroute.launcher.bench.decode.page import decode_page

    answer = run_bench(lengths or LENGTHS, steps)
    _report(answer, decode_page(answer), as_json, out)


@bench_app.command()
def pictures(
    steps: Annotated[int, typer.Option(help="optimizer steps of the small model whose routes are drawn")] = 400,
    as_json: AsJson = False,
    out: Annotated[Path, typer.Option("--out", help="folder for the PNGs")] = Path("docs/images"),
) -> None:
    """Draw figures on routing: a map of routes, the leak of mean queries, and the cost of region sizes.

    Example: biroute bench pictures --out docs/images
    """
    from biroute.launcher.bench.routing_figures import draw_pictures

    answer = draw_pictures(out, steps)
    typer.echo(json.dumps(answer) if as_json else "\n".join(f"{name}: {value}" for name, value in answer.items()))


def _report(answer: Mapping[str, Any], page: Page, as_json: bool, out: Path | None) -> None:
    """Print the answer, and write its page and picture if a folder is given."""
    written = page.write(out) if out is not None else []
    if as_json:
        typer.echo(json.dumps(answer))
        return
    page.show()
    for path in written:
        typer.echo(f"wrote {path}")
