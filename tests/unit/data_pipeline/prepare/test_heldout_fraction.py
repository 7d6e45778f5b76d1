"""How much is held out: of little text and of much, and what is proposed where a split would have no document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.corpora import data_config

from biroute.configs.data_section import DataConfig
from biroute.configs.errors import UsageError
from biroute.data_pipeline.prepare.build import build_dataset
from biroute.data_pipeline.prepare.progress_bar import Progress
from biroute.data_pipeline.prepare.sources import with_heldout_fraction

QUIET = Progress(quiet=True)


def test_of_little_text_a_tenth_is_held_out_and_of_much_a_hundredth(tmp_path: Path, built: DataConfig) -> None:
    unset = built.model_copy(update={"dir": tmp_path / "dataset", "heldout_fraction": None})
    manifest = build_dataset(unset, QUIET).manifest
    assert manifest.settings["data.heldout_fraction"] == "0.1"
    assert build_dataset(unset, QUIET).rebuilt == (), "the same on a second look"
    assert fraction_of(9_999_999) == 0.1 and fraction_of(10_000_000) == 0.01


def fraction_of(total_bytes: int) -> float | None:
    return with_heldout_fraction(DataConfig(), total_bytes).heldout_fraction


@pytest.mark.parametrize("texts", [2, 3, 11, 40])
@pytest.mark.parametrize("fraction", [1e-12, 1.0])
def test_the_fraction_that_is_proposed_works(tmp_path: Path, texts: int, fraction: float) -> None:
    for number in range(texts):
        (tmp_path / f"{number}.txt").write_text(f"Text {number} of a few that somebody wrote. " * 40)
    sources = [{"name": "few", "paths": [f"{tmp_path}/*.txt"]}]
    changes = {"sources": sources, "tokenizer": {"vocab_size": 300}}
    with pytest.raises(UsageError, match="set it to") as error:
        build_dataset(data_config(tmp_path, heldout_fraction=fraction, **changes), QUIET)
    proposed, held = re.findall(r"set it to ([\d.]+), which holds out (\d+) of", str(error.value))[0]
    manifest = build_dataset(data_config(tmp_path, heldout_fraction=float(proposed), **changes), QUIET).manifest
    assert manifest.sources[0].splits["heldout"].documents == int(held) == max(1, texts // 10)


def test_one_document_cannot_be_divided(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("The only text there is. " * 40)
    sources = [{"name": "one", "paths": [f"{tmp_path}/one.txt"]}]
    with pytest.raises(UsageError, match="held-out split; set it to 0 to train without one"):
        build_dataset(data_config(tmp_path, heldout_fraction=1e-12, sources=sources), QUIET)
