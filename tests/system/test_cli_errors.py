"""A user's fault: one line that names field or file, value and remedy, exit status 2, before anything starts."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .conftest import Answer

Command = Callable[..., Answer]


def assert_one_line(answer: Answer, *parts: str) -> None:
    lines = answer.err.strip().splitlines()
    assert answer.status == 2, answer
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: "), lines[0]
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.stepz=3"], ["train.stepz", "did you mean steps?"]),
        (["model.attention.topc=3"], ["model.attention.topc", "did you mean topk?"]),
        (["train.steps=many"], ["train.steps='many'", "not a whole number"]),
        (["train.steps=0"], ["train.steps=0", "greater than 0"]),
        (["model.mask_fraction=1.5"], ["model.mask_fraction=1.5", "less than or equal to 1"]),
        (["optim.schedule=linear"], ["optim.schedule='linear'", "cosine"]),
        (["optim.schedule=wsd"], ["decay_steps"]),
        (["optim.min_learning_rate=1"], ["min_learning_rate=1", "learning_rate"]),
        (["model.num_kv_heads=3"], ["num_kv_heads=3", "num_heads=4"]),
        (["model.hidden_size=30"], ["num_heads=4", "hidden_size=30"]),
        (["model.sequence_length=60"], ["sequence_length=60", "region_size=8"]),
        (["model.attention.query_block_size=3"], ["query_block_size=3", "region_size=8"]),
        (["model.attention.topk=1"], ["topk=1", "raise topk to at least 2"]),
        (["model.attention.force_own=false"], ["force_own", "objective=mlm"]),
        (["model.dense_layers=[5]"], ["dense_layers=[5]", "0 ... 1"]),
        (["parallel.pipeline=2", "parallel.zero_stage=2"], ["pipeline=2", "zero_stage=2", "zero_stage=1"]),
        (["parallel.tensor=3"], ["parallel.tensor=3", "model.num_heads (4)", "1, 2, 4"]),
        (["parallel.tensor=4"], ["parallel.tensor=4", "model.num_kv_heads (2)", "1, 2"]),
        (["parallel.pipeline=3", "parallel.zero_stage=0"], ["parallel.pipeline=3", "model.num_layers (2)"]),
        (["parallel.region=3"], ["parallel.region=3", "regions of a sequence (8)", "1, 2, 4, 8"]),
        (["parallel.region=16"], ["parallel.region=16", "only 8 regions", "at most 8"]),
        (
            [
                "parallel.tensor=2",
                "parallel.region=3",
                "parallel.sequence_parallel=true",
                "model.sequence_length=27",
                "model.attention.region_size=9",
            ],
            ["parallel.tensor=2", "9 tokens of a region rank", "parallel.sequence_parallel=false"],
        ),
        (["parallel.tensor=2", "model.vocab_multiple=401"], ["parallel.tensor=2", "vocabulary (401)"]),
        (["train.microbatch_size=3"], ["train.global_batch_size=4", "use a multiple of 3"]),
        (["train.evaluate_sequences=3", "train.microbatch_size=2"], ["train.evaluate_sequences=3"]),
        (["train.evaluate_sequences=100000"], ["train.evaluate_sequences=100000"]),
        (["train.precision=bf16", "parallel.zero_stage=0"], ["precision=bf16", "zero_stage=0", "zero_stage=1"]),
        (["parallel.data=2", "--processes", "3"], ["2 processes", "3 were started"]),
        (["parallel.tensor=2", "--processes", "3"], ["does not divide the 3 processes"]),
        (["model"], ["'model'", "section.field=value"]),
        (["data.dir=/nowhere"], ["/nowhere", "biroute data build"]),
        (["data.tokenizer.vocab_size=500"], ["vocab_size=500", "400"]),
        (["train.hardware=h99"], ["train.hardware=h99", "h100", "YAML file"]),
        (["tracking.uri=ftp://there"], ["tracking.uri=ftp://there"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_value(overrides: list[str], parts: list[str], config_file: Path, command: Command) -> None:
    assert_one_line(command("train", config_file, *overrides), *parts)
    assert not (config_file.parent / "runs" / "small" / "logs").exists(), "no rank was started"


def test_missing_config(tmp_path: Path, command: Command) -> None:
    assert_one_line(command("train", tmp_path / "none.yaml"), "none.yaml", "no such configuration file")


def test_config_that_is_not_yaml(tmp_path: Path, command: Command) -> None:
    (tmp_path / "bad.yaml").write_text("model: [1, 2")
    assert_one_line(command("train", tmp_path / "bad.yaml"), "bad.yaml", "not a readable YAML file")


def test_damaged_shard_is_named(config_file: Path, corpus: Path, tmp_path: Path, command: Command) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(corpus / "dataset", copy)
    shard = next(copy.rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    assert_one_line(command("train", config_file, f"data.dir={copy}"), shard.name)


def test_rank_without_address(config_file: Path, command: Command) -> None:
    answer = command("train", config_file, RANK="0", WORLD_SIZE="1")
    assert_one_line(answer, "RANK is set but MASTER_ADDR is not")


def test_rendezvous_port_in_use(config_file: Path, command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = command(
            "train", config_file, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    assert_one_line(answer, f"127.0.0.1:{port}", "is in use", "use another port")


def test_ui_port_in_use(config_file: Path, tmp_path: Path, command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
        (tmp_path / "mlflow.db").touch()
        assert_one_line(command("ui", config_file, uri, "--port", port), str(port), "in use")


def test_run_folder_that_cannot_be_written(config_file: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("in the way")
    answer = command("train", config_file, f"train.run_dir={tmp_path}/file/run")
    assert_one_line(answer, "train.run_dir", "file")


def test_too_few_documents_for_a_heldout_split(tmp_path: Path, command: Command) -> None:
    (tmp_path / "one.txt").write_text("one document alone\n" * 50)
    config = {
        "data": {"dir": str(tmp_path / "d"), "sources": [{"name": "one", "paths": [str(tmp_path / "one.txt")]}]}
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    answer = command("data", "build", tmp_path / "one.yaml")
    *progress, error = answer.err.strip().splitlines(keepends=True)
    assert all(line.startswith("reading the sources") for line in progress)
    assert_one_line(Answer(answer.status, answer.out, error), "heldout_fraction")


def test_a_locale_without_unicode(config_file: Path, tmp_path: Path, command: Command) -> None:
    """A Chinese path is taken as it is, and not for bytes of Latin-1 or ASCII."""
    variables = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    answer = command("data", "verify", config_file, f"data.dir={tmp_path}/数据", **variables)
    assert_one_line(answer, f"{tmp_path}/数据", "holds no dataset")
