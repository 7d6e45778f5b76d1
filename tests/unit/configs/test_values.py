"""Values that YAML or Python would quietly take for something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from biroute.configs.errors import UsageError
from biroute.configs.load import load_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 10\n")
    return path


def test_a_section_given_twice_is_an_error_with_both_lines(file: Path) -> None:
    file.write_text("train:\n  steps: 10\nmodel:\n  num_layers: 2\ntrain:\n  seed: 3\n")
    with pytest.raises(UsageError, match=r"'train' is given twice, in lines 1 and 5"):
        load_config(file)
    file.write_text("train:\n  steps: 10\n  seed: 1\n  steps: 20\n")
    with pytest.raises(UsageError, match=r"'steps' is given twice, in lines 2 and 4"):
        load_config(file)


@pytest.mark.parametrize("text", ["/x/exp #1", "runs/a # b", "#1", "2024 #2"])
def test_nothing_in_an_override_is_a_comment(file: Path, text: str) -> None:
    assert str(load_config(file, [f"train.run_dir={text}"]).train.run_dir) == text


def test_a_schedule_whose_parts_overlap_is_refused(file: Path) -> None:
    wsd = ["optim.schedule=wsd", "optim.warmup_steps=5"]
    with pytest.raises(UsageError, match=r"warmup_steps=5 and optim\.decay_steps=8 together exceed train\.steps=10"):
        load_config(file, [*wsd, "optim.decay_steps=8"])
    assert load_config(file, [*wsd, "optim.decay_steps=5"]).optim.decay_steps == 5


def test_a_quoted_override_keeps_its_hash(file: Path) -> None:
    assert str(load_config(file, ["train.run_dir='a # b'"]).train.run_dir) == "a # b"
    assert load_config(file, ["model.dense_layers=[0, 1]"]).model.dense_layers == (0, 1)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.learning_rate=.inf", ["optim.learning_rate", "finite"]),
        ("optim.epsilon=.nan", ["optim.epsilon", "finite"]),
        ("train.hang_seconds=.inf", ["train.hang_seconds", "finite"]),
        ("parallel.tensor=true", ["tensor=true is neither a number nor a text"]),
        ("train.seed=yes", ["seed=true"]),
        ("tracking.run_name=no", ["run_name=false"]),
        ("train.seed=1795650000123456789", ["train.seed=1795650000123456789", "less than"]),
        ("train.seed=-1", ["train.seed=-1", "greater than or equal to 0"]),
    ],
)
def test_what_is_no_such_number_is_refused(file: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(file, [override])
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)
