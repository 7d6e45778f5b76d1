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


@pytest.mark.parametrize("text", ["? [1, 2]\n: 3\n", "{a: 1}: 3\n", "train: {steps: 5, [a]: 1}\n"])
def test_a_key_is_a_name(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError, match=r"run\.yaml: not a readable .*\(a list or section is no key, in line 1"):
        load_config(file)


@pytest.mark.parametrize("text", ["/x/exp #1", "runs/a # b", "#1", "2024 #2"])
def test_nothing_in_an_override_is_a_comment(file: Path, text: str) -> None:
    assert str(load_config(file, [f"train.run_dir={text}"]).train.run_dir) == text


def test_a_schedule_whose_parts_overlap_is_refused(file: Path) -> None:
    wsd = ["optim.schedule=wsd", "optim.warmup_steps=5"]
    with pytest.raises(UsageError, match=r"warmup_steps=5 and optim\.decay_steps=8 together exceed train\.steps=10"):
        load_config(file, [*wsd, "optim.decay_steps=8"])
    assert load_config(file, [*wsd, "optim.decay_steps=5"]).optim.decay_steps == 5


def test_a_warm_up_ends_before_the_run(file: Path) -> None:
    with pytest.raises(UsageError, match=r"optim\.warmup_steps=10 is not below train\.steps=10.*leave it out"):
        load_config(file, ["optim.warmup_steps=10", "train.steps=10"])
    assert load_config(file, ["optim.warmup_steps=9", "train.steps=10"]).optim.warmup_of(10) == 9
    for steps, warmup in ((10, 5), (1, 0), (200, 100), (5000, 100)):
        assert load_config(file, [f"train.steps={steps}"]).optim.warmup_of(steps) == warmup


def test_a_quoted_override_keeps_its_hash(file: Path) -> None:
    assert str(load_config(file, ["train.run_dir='a # b'"]).train.run_dir) == "a # b"
    assert str(load_config(file, ["train.run_dir= ' a' "]).train.run_dir) == " a"
    assert load_config(file, ["model.dense_layers=[0, 1]"]).model.dense_layers == (0, 1)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.learning_rate=.inf", ["optim.learning_rate", "finite"]),
        ("optim.epsilon=.nan", ["optim.epsilon", "finite"]),
        ("train.hang_seconds=.inf", ["train.hang_seconds", "finite"]),
        ("parallel.tensor=true", ["tensor=true is neither a number nor a text"]),
        ("train.seed=yes", ["seed=true"]),
        ("train.steps=010", ["steps=010 begins with a zero; write 10"]),
        ("slurm.ranks_per_node=04", ["ranks_per_node=04 begins with a zero; write 4"]),
        ("optim.warmup_steps=-007", ["warmup_steps=-007 begins with a zero; write -7"]),
        ("train.steps=1.5e0", ["train.steps='1.5e0': not a whole number"]),
        ("train.steps=1e999", ["train.steps='1e999': not a whole number"]),
        ("train.stepss=3", ["command line: unknown key train.stepss; did you mean steps?"]),
        ("train.steps=2024-13-45", ["is not a YAML value"]),
        (f"train.steps={'9' * 5000}", ["is not a YAML value"]),
        (f"model.dense_layers={'[' * 20_000}", ["is not a YAML value"]),
        ("train.run_dir=/x/\udcff", [r"run_dir='/x/\udcff' has a NUL or bytes that are not UTF-8"]),
        ("data.dir=/x\0y", [r"dir='/x\x00y' has a NUL"]),
        ('tracking.experiment="a\\0b"', ["experiment='a\\x00b' has a NUL"]),
        ("train.steps=10.5", ["train.steps=10.5: not a whole number"]),
        ("train.steps=ten", ["train.steps='ten': not a whole number"]),
        ("train.steps=", ["train.steps is empty; give a value, or leave the line out"]),
        ("optim={learning_rate: 1e-3}", ["optim is a section; set its fields, such as optim.FIELD=VALUE"]),
        ("model.attention={topk: 4}", ["model.attention is a section; set its fields"]),
        ("tracking.tags={biroute.sent_bytes: '7'}", ["tag 'biroute.sent_bytes' is one that BiRoute or MLflow sets"]),
        ("tracking.tags={layout: mine}", ["tag 'layout' is one that BiRoute or MLflow sets; choose another name"]),
        ("tracking.parent=no such run", ["not the id of an MLflow run, which has 32 hexadecimal digits"]),
        ("tracking.experiment=", ["tracking.experiment is empty; give a value"]),
        ("optim.learning_rate=fast", ["optim.learning_rate='fast': not a number"]),
        ("model.dense_layers=3", ["model.dense_layers=3: not a list; write [3]"]),
        ("tracking.run_name=[1]", ["tracking.run_name=[1]: not a text but a list or section"]),
        ("model.attention=3", ["model.attention=3: a section, not a value; set its fields"]),
        ("train.seed=1795650000123456789", ["train.seed=1795650000123456789", "less than"]),
        (f"tracking.run_name={'x' * 400}", ["tracking.run_name='xxx", "at most 250 characters"]),
        ("slurm.signal_seconds=10", ["slurm.signal_seconds=10", "greater than or equal to 60"]),
        ("train.seed=-1", ["train.seed=-1", "greater than or equal to 0"]),
    ],
)
def test_what_is_no_such_number_is_refused(file: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(file, [override])
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"), [("1e3", 1000), ("1E+3", 1000), ("10.0", 10), ("2.5e3", 2500), ("1_000", 1000)]
)
def test_a_whole_number_may_be_spelt_as_numbers_are(file: Path, text: str, number: int) -> None:
    """In the file and as an override, and exactly: YAML takes 1e3 for a text."""
    file.write_text(f"train:\n  steps: {text}\n")
    for config in (load_config(file), load_config(file, [f"train.steps={text}"])):
        assert config.train.steps == number and isinstance(config.train.steps, int)
    exact = load_config(file, ["train.seed=7e13", "optim.learning_rate=3e-4"])
    assert (exact.train.seed, exact.optim.learning_rate) == (70_000_000_000_000, 3e-4)


@pytest.mark.parametrize(
    "text",
    [
        "2024",
        "010",
        "1.10",
        "2024-11-25",
        "2024-11-25 10:00:00",
        "no",
        "1e3",
        "0x10",
        "1_000",
        " a",
        "a ",
        " 10 ",
        "a #b ",
    ],
)
def test_a_text_or_path_is_what_was_written(file: Path, text: str) -> None:
    """Whatever YAML takes it for."""
    config = load_config(file, [f"tracking.run_name={text}", f"train.run_dir={text}", f"slurm.profile={text}"])
    assert (config.tracking.run_name, str(config.train.run_dir), config.slurm.profile) == (text, text, text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run_name: 2024", "tracking.run_name=2024: not a text; put it in quotes: '2024'"),
        ("experiment: 2024-11-25", "not a text; put it in quotes: '2024-11-25'"),
        ("run_name: no", "run_name=false is neither a number nor a text"),
        ("run_name: [a]", "tracking.run_name=['a']: not a text but a list or section"),
    ],
)
def test_a_text_in_a_file_must_be_one(file: Path, line: str, message: str) -> None:
    """Here what was written is gone: 1.10 and 010 would be another text."""
    file.write_text(f"tracking:\n  {line}\n")
    with pytest.raises(UsageError) as caught:
        load_config(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dense_layers=[true]", "command line: model: dense_layers=true is neither a number nor a text"),
        ("model.dense_layers=[010]", "command line: model: dense_layers=010 begins with a zero; write 10"),
        ("train.steps=010", "command line: train: steps=010 begins with a zero; write 10"),
        ("trian.steps=3", "command line: unknown key trian; did you mean train?"),
        ("model.num_heads=3", "command line: model: num_kv_heads=2 does not divide num_heads=3"),
        ("train.run_dir=s3://bucket/x", "command line: train: run_dir=s3://bucket/x is not on this machine"),
        ("data.dir=~nobody-of-this-name/x", "no such user"),
    ],
)
def test_the_same_in_lists_and_between_fields(file: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(file, [override])
    assert message in str(caught.value)
    file.write_text("train:\n  stepz: 10\n")
    with pytest.raises(UsageError, match=r"run\.yaml: .*unknown key train\.stepz"):
        load_config(file, ["train.seed=1"])


def test_the_home_folder_in_a_path(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `data.dir=~/x` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(file, ["data.dir=~/x", "train.run_dir=a~/b", "data.tokenizer.model_path=~/t.model"])
    assert config.data.dir == tmp_path / "x" and config.train.run_dir == Path("a~/b")
    assert config.data.tokenizer.model_path == tmp_path / "t.model"
