"""Small real corpora and configurations for the tests of the data pipeline."""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networkx
import numpy as np

from biroute.configs.schema import DataConfig, RunConfig
from biroute.data_pipeline.dataset import Dataset
from biroute.data_pipeline.examples.demo_corpora import docstrings
from biroute.data_pipeline.read.manifest import Split
from biroute.data_pipeline.read.token_stream import TokenStream

POEM = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n"


@functools.cache
def english_texts(count: int) -> tuple[str, ...]:
    """Docstrings of an installed package, each once."""
    folder = Path(networkx.__file__).parent / "algorithms"
    found = dict.fromkeys(docstrings(sorted(folder.rglob("*.py"))[:200]))
    assert len(found) >= count
    return tuple(list(found)[:count])


def chinese_texts(count: int) -> list[str]:
    """Lines of a poem in varied order, with numbers that make each text its own."""
    lines = POEM.splitlines()
    draw = random.Random(0)
    return ["\n".join(draw.choices(lines, k=1 + n % 5)) + f"\n第{n}首，{math.isqrt(n)}。" for n in range(count)]


def write_jsonl(path: Path, texts: Iterable[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def data_config(folder: Path, **changes: Any) -> DataConfig:
    """Two sources, English and Chinese, written to `folder` if they are not there; a dataset in `folder`/dataset."""
    if not (folder / "english.jsonl").exists():
        write_jsonl(folder / "english.jsonl", english_texts(220))
        write_jsonl(folder / "chinese.jsonl", chinese_texts(400))
    settings: dict[str, Any] = {
        "dir": folder / "dataset",
        "sources": [
            {"name": "english", "paths": [str(folder / "english.jsonl")]},
            {"name": "chinese", "paths": [str(folder / "chinese.jsonl")]},
        ],
        "tokenizer": {"vocab_size": 512, "training_bytes": 200_000},
        "heldout_fraction": 0.1,
        "tokens_per_sample": 1000,
        "samples_per_shard": 16,
        "workers": 1,
    }
    return DataConfig.model_validate(settings | changes)


def run_config(data: DataConfig, sequence_length: int = 64, **sections: Any) -> RunConfig:
    """A run on `data`."""
    model = {"sequence_length": sequence_length} | sections.pop("model", {})
    train = {"global_batch_size": 12, "microbatch_size": 1, "evaluate_sequences": 8} | sections.pop("train", {})
    return RunConfig.model_validate({"data": data.model_dump(), "model": model, "train": train, **sections})


def tokens_of(dataset: Dataset, source: int, split: Split) -> np.ndarray:
    """All tokens of a source's split, in the order of the documents."""
    tokens = TokenStream(dataset.config.data.dir, dataset.manifest, dataset.manifest.sources[source], split)
    return tokens.read(0, tokens.num_tokens)


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its name, the lock left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def copy_of(data: DataConfig, folder: Path, **changes: Any) -> DataConfig:
    """The dataset at another place, with the same sources."""
    shutil.copytree(data.dir, folder)
    return data.model_copy(update={"dir": folder, **changes})
