"""Which sizes a study has, how each trains, what is refused before anything runs, and what goes on in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from helpers.corpus import small_run
from typer.testing import CliRunner

from biroute.configs.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, UsageError
from biroute.configs.schema import RunConfig
from biroute.launcher.attempts.journal import begin_attempt
from biroute.launcher.plan.hardware import load_hardware
from biroute.launcher.scale import run as scale_run
from biroute.launcher.scale.command import scale_app
from biroute.launcher.scale.measure import computed_bytes, is_finished, measure
from biroute.launcher.scale.report import study_note, study_values
from biroute.launcher.scale.run import run_study
from biroute.launcher.scale.study import Mode, Study, make_study, open_study
from biroute.launcher.track.metrics_log import MetricsLog

STEPS = 10


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_run(corpus, tmp_path / "runs" / "small", steps=8, parallel={"data": 2})))
    return path


def study(config: Path, ranks: Sequence[int], mode: Mode = "weak", *words: str) -> Study:
    return make_study(config, list(words), ranks, mode, STEPS)


def trained(size_config: RunConfig, ranks: int, seconds: float = 0.5, status: int = EXIT_OK) -> int:
    """What a run leaves behind, without training: slow first steps, then steps of `seconds`."""
    run_dir = size_config.train.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    attempt = begin_attempt(run_dir, nodes=["here"], world_size=ranks)
    log = MetricsLog(run_dir / "metrics.jsonl")
    for step in range(1, (STEPS if status == EXIT_OK else 3) + 1):
        slow = 100.0 if step <= 2 else 1.0
        log.append(
            step,
            {
                "time/step_seconds": slow * seconds, "time/forward_seconds": slow * seconds / 2,
                "time/exchange_seconds": slow * seconds / 5, "memory/peak_gib": 1.0 + 1 / step,
                "exchange/region_bytes": 2048.0 * ranks,
            },
        )  # fmt: skip
    log.close()
    (run_dir / "attempts.jsonl").open("a").write(
        json.dumps({"attempt": attempt, "event": "end", "time": 2e9, "status": status, "cause": ""}) + "\n"
    )
    return status


def test_weak_scaling_keeps_the_sequences_of_a_data_rank_and_strong_scaling_the_batch(config: Path) -> None:
    weak, strong = study(config, [4, 1, 2, 2]), study(config, [1, 2, 4], "strong")
    for found, batches in ((weak, [4, 8, 16]), (strong, [4, 4, 4])):
        assert [size.ranks for size in found.sizes] == [1, 2, 4]
        assert [size.layout.data for size in found.sizes] == [1, 2, 4]
        assert [size.config.train.global_batch_size for size in found.sizes] == batches
        assert {size.config.train.steps for size in found.sizes} == {STEPS}
        assert len({size.run_dir for size in found.sizes}) == 3
    assert {size.run_dir.parent for size in weak.sizes} == {weak.folder} and weak.folder != strong.folder


def test_the_batch_is_that_of_the_smallest_size(config: Path) -> None:
    found = study(config, [2, 6], "weak", "parallel.tensor=1", "train.global_batch_size=8")
    assert [size.config.train.global_batch_size for size in found.sizes] == [8, 24]
    halves = study(config, [2, 4], "weak", "parallel.region=2")
    assert [(size.layout.data, size.config.train.global_batch_size) for size in halves.sizes] == [(1, 4), (2, 8)]


@pytest.mark.parametrize(
    ("ranks", "mode", "words", "message"),
    [
        ([1, 3], "strong", [], "--ranks 3: train.global_batch_size=4 is not a multiple of .* 1 x 3"),
        ([1, 2], "weak", ["parallel.tensor=2"], "--ranks 1: not a multiple of parallel.tensor x region x pipeline"),
        ([0], "weak", [], "--ranks 0: not a multiple of"),
        ([3, 6], "weak", [], "global_batch_size=4 is the batch of the smallest size and is not a multiple of its 3"),
        ([8], "weak", ["parallel.tensor=8"], "--ranks 8: parallel.tensor=8 does not divide model.num_heads"),
    ],
)
def test_a_size_that_the_layout_does_not_allow_is_refused(
    config: Path, ranks: list[int], mode: Mode, words: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        study(config, ranks, mode, *words)
    assert not (config.parent / "runs").exists()


def test_a_folder_goes_on_with_the_same_study_only(config: Path) -> None:
    key = open_study(study(config, [1, 2]))
    assert open_study(study(config, [1, 2, 4], "weak", "tracking.experiment=other", "parallel.data=1")) == key
    with pytest.raises(UsageError, match=r"other settings \(model.num_layers: 2 there, 4 here\); set train.run_dir"):
        open_study(study(config, [1, 2], "weak", "model.num_layers=4"))
    with pytest.raises(UsageError, match=r"sequences of a data rank: 4 there, 2 here"):
        open_study(study(config, [2, 4]))  # another smallest size: another batch for each data rank
    (study(config, [1]).folder / "study.json").write_text("{")
    with pytest.raises(UsageError, match=r"study.json: not readable; remove"):
        open_study(study(config, [1]))


def test_an_interrupted_study_runs_only_what_is_not_finished(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    ends = iter([EXIT_OK, EXIT_STOPPED, EXIT_OK, EXIT_FAILURE, EXIT_OK])

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def train(size_config: RunConfig, ranks: int) -> int:
        assert size_config.train.threads_per_rank == 1, "as many as in every other size"
        asked.append(ranks)
        return trained(size_config, ranks, status=next(ends))

    monkeypatch.setattr(scale_run, "train_on_ranks", train)
    said: list[str] = []
    found = study(config, [1, 2, 4])
    assert run_study(found, None, tmp_path / "out", said.append) == EXIT_STOPPED
    assert asked == [1, 2]
    values = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert values["missing_ranks"] == [2, 4] and [one["ranks"] for one in values["sizes"]] == [1]
    assert run_study(found, None, None, said.append) == EXIT_FAILURE
    assert run_study(found, None, None, said.append) == EXIT_OK
    assert asked == [1, 2, 2, 4, 4]
    assert run_study(found, None, None, said.append) == EXIT_OK
    assert asked == [1, 2, 2, 4, 4]
    assert "run the same command again to continue" in " ".join(said)
    values = json.loads((found.folder / "scaling.json").read_text())
    assert values["missing_ranks"] == [] and (found.folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_one_command_at_a_time_works_on_a_study(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = study(config, [1])
    second: list[str] = []

    def train(size_config: RunConfig, ranks: int) -> int:
        with pytest.raises(UsageError, match="another `biroute scale` works on this study"):
            run_study(found, None, None, second.append)
        return trained(size_config, ranks)

    monkeypatch.setattr(scale_run, "train_on_ranks", train)
    assert run_study(found, None, None, second.append) == EXIT_OK


def test_what_is_measured_is_the_median_without_the_first_steps(config: Path) -> None:
    found = study(config, [2, 4], "weak", "parallel.region=2")
    assert not is_finished(found.sizes[0])
    trained(found.sizes[0].config, 2, seconds=0.5)
    trained(found.sizes[1].config, 4, seconds=0.8)
    assert all(map(is_finished, found.sizes))
    one, two = map(measure, found.sizes)
    assert (one.step_seconds, one.first_step, one.steps, one.peak_gib) == (0.5, 3, 8, 2.0)
    assert one.tokens_per_second == 4 * 64 / 0.5 and two.tokens_per_second == 8 * 64 / 0.8
    assert one.phases["forward"] == 0.25 and one.phases["other"] == pytest.approx(0.5 - 0.25 - 0.1)
    assert two.efficiency(one) == pytest.approx(0.5 / 0.8)
    assert (one.region_bytes, two.region_bytes) == (4096.0, 8192.0)
    values = study_values(found, [one, two], load_hardware("h100"))
    assert [size["efficiency"] for size in values["sizes"]] == [1.0, pytest.approx(0.625)]
    assert values["sizes"][0]["predicted"]["efficiency"] == 1.0
    note = study_note(values)
    assert "From 2 ranks to 4, tokens/s grow 1.25 times: 62% efficiency." in note
    assert "Predicted for NVIDIA H100" in note and "region, counted" in note
    assert "predicted" not in study_note(study_values(found, [one, two], None))


def test_the_bytes_of_each_axis_are_those_of_the_plan(config: Path) -> None:
    sizes = study(config, [1, 2], "weak").sizes
    assert not any(computed_bytes(sizes[0]).values())
    both = computed_bytes(sizes[1])
    assert both["data"] > 0 and not both["tensor"] and not both["region"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "1,x"], "--ranks 1,x: numbers of ranks with commas"),
        (["--mode", "both"], "--mode both: use one of weak, strong"),
        (["--hardware", "h99"], "--hardware h99: no such hardware profile"),
        (["parallel.tensor=2"], "--ranks 1: not a multiple of"),
    ],
)
def test_bad_words_are_one_line_before_anything_runs(config: Path, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(scale_app, [str(config), *words], catch_exceptions=False)
    assert not (config.parent / "runs").exists()
