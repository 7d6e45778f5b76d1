"""A user's fault: one line that names field or file, value and remedy, exit status 2, before anything starts."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.ports import claim_port

from biroute.configs.load import load_config
from biroute.data_pipeline.dataset import open_dataset

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


def test_what_another_rank_found_is_one_line_and_the_rest_is_in_the_logs(
    config_file: Path, run_dir: Path, corpus: Path, tmp_path: Path, command: Command
) -> None:
    """Rank 0, which writes to the terminal, only loses its connection to rank 1, which met a damaged shard."""
    copy = tmp_path / "dataset"
    shutil.copytree(corpus / "dataset", copy)
    config = load_config(config_file, [f"data.dir={copy}"])
    shard, reader = copy / "docs" / "train-000000.tar", open_dataset(config).reader("train")
    content = shard.read_bytes()
    odd = [reader.sequence(n).astype("<u2").tobytes() for n in (1, 3, 5, 7)]  # what rank 1 of 2 reads first
    of_rank_1 = next(tokens for tokens in odd if content.count(tokens) == 1)  # and no end of a sample within it
    shard.write_bytes(content.replace(of_rank_1, b"\xff\x7f" + of_rank_1[2:]))
    answer = command("train", config_file, f"data.dir={copy}", "parallel.data=2", "tracking.enabled=false")
    assert_one_line(answer, "train-000000.tar: token 32767", "the shard is damaged", "biroute data build")
    assert "Traceback" in (run_dir / "logs" / "attempt-0001" / "rank-00000.log").read_text()


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


def test_a_line_comes_before_the_ranks_start(config_file: Path) -> None:
    """At the start of the first rank's process, whose imports take seconds, people have read what begins."""
    program = (
        "import os, sys\n"
        "def look(event, arguments):\n"
        "    if event == 'subprocess.Popen' and 'biroute.launcher.start.worker' in arguments[1]:\n"
        "        os.write(1, b'torch is imported' if 'torch' in sys.modules else b'a rank starts')\n"
        "        os._exit(0)\n"
        "sys.addaudithook(look)\n"
        "from biroute.launcher.cli.main import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", config_file, "parallel.data=2"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = config_file.parent / "runs" / "small" / "logs" / "attempt-0001"
    assert (done.stdout, done.stderr) == (f"attempt 1: starting 2 ranks, logs in {logs}\na rank starts", "")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "CONFIG", f"train.run_dir=/tmp/{'x' * 300}"], ["/tmp/xxx", "File name too long; use a shorter"]),
        (["data", "build", "CONFIG", f"data.dir={'x' * 300}"], ["xxx", "File name too long; use a shorter one"]),
        (["status", "x" * 5000], ["xxx...: File name too long; use a shorter one"]),
        (["checkpoint", "list", "x" * 5000], ["xxx...: File name too long; use a shorter one"]),
        (["plan", "CONFIG", "--hardware", "x" * 300], ["xxx...: File name too long; use a shorter one"]),
        (["data", "build", "CONFIG", "data.dir=/proc/x"], ["data.dir=/proc/x: cannot write", "folder of your own"]),
        (["plan", "CONFIG", "model.num_layers=1000000000"], ["model.num_layers=1000000000", "less than or equal"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_names_and_sizes_that_cannot_be(
    arguments: list[str], parts: list[str], config_file: Path, command: Command
) -> None:
    assert_one_line(command(*(str(config_file) if word == "CONFIG" else word for word in arguments)), *parts)


def test_no_folder_for_temporary_files(config_file: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes every candidate unusable, as a full disk does."""
    (tmp_path / "mlflow.db").touch()
    done = subprocess.run(
        [
            sys.executable, "-m", "biroute.launcher.cli.main", "ui", config_file,
            f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "--port", str(claim_port()),
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert_one_line(Answer(done.returncode, done.stdout, done.stderr), "temporary files", "set TMPDIR")


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
