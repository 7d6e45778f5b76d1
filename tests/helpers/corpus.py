"""A real dataset small enough for tests: docstrings of the standard library, which is on any machine."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path
from typing import Any


def standard_library_docstrings(limit: int) -> list[str]:
    """The first `limit` docstrings of over 200 characters."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    texts.append(text)
    return texts[:limit]


def data_section(folder: Path) -> dict[str, Any]:
    """The `data` section of the corpus in `folder`."""
    return {
        "dir": str(folder / "dataset"),
        "sources": [{"name": "docs", "paths": [str(folder / "docs.jsonl")]}],
        "heldout_fraction": 0.1,
        "tokens_per_sample": 4096,
        "tokenizer": {"vocab_size": 400, "training_bytes": 200_000},
    }


def build_corpus(folder: Path) -> Path:
    """Write the text and build its dataset; returns `folder`."""
    from biroute.configs.load import config_from_tree
    from biroute.data_pipeline.prepare.build import build_dataset

    with open(folder / "docs.jsonl", "w", encoding="utf-8") as file:
        for text in standard_library_docstrings(600):
            file.write(json.dumps({"text": text}) + "\n")
    build_dataset(config_from_tree({"data": data_section(folder)}, "test").data)
    return folder


def small_run(corpus: Path, run_dir: Path, *, steps: int, parallel: dict[str, Any]) -> dict[str, Any]:
    """Configuration of a run of seconds on that corpus."""
    return {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "sequence_length": 64,
            "attention": {"region_size": 8, "topk": 3},
        },
        "parallel": parallel,
        "data": data_section(corpus),
        "optim": {"learning_rate": 3e-3},
        "train": {
            "run_dir": str(run_dir),
            "steps": steps,
            "global_batch_size": 4,
            "microbatch_size": 1,
            "log_every": 1,
            "evaluate_every": 4,
            "evaluate_sequences": 4,
        },
        "checkpoint": {"every_steps": 2},
        "tracking": {"enabled": False},
    }
