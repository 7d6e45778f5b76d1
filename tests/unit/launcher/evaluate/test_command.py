"""What `biroute evaluate` measures on held-out sequences and on files, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.cached import cached_model

from biroute.configs.data_section import DataConfig
from biroute.configs.errors import UsageError
from biroute.configs.load import config_from_tree
from biroute.data_pipeline.dataset import open_dataset
from biroute.data_pipeline.prepare.tokenizer import load_tokenizer
from biroute.launcher.evaluate import command
from biroute.launcher.evaluate.command import Request, check, evaluate, wanted_metrics
from biroute.launcher.evaluate.forward import ForwardModel
from biroute.launcher.evaluate.report import write_report
from biroute.launcher.evaluate.results import table
from biroute.launcher.generate.model_choice import ModelChoice
from biroute.launcher.track.evaluations import evaluated

LENGTH = 32


@pytest.fixture
def trained(tmp_path: Path, built: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with random weights in the place of the one that a checkpoint holds."""
    tokenizer = load_tokenizer(built.dir / "tokenizer.model")
    model = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "sequence_length": LENGTH}
    data = {"dir": str(built.dir), "tokenizer": {"vocab_size": tokenizer.vocab_size}}
    tree = {"model": model | {"attention": {"region_size": 4, "topk": 3}}, "data": data}
    tree |= {"train": {"run_dir": str(tmp_path), "evaluate_sequences": 3}, "tracking": {"enabled": False}}
    config = config_from_tree(tree, "test")
    checkpoint = tmp_path / "checkpoints" / "step-00000006"
    one = SimpleNamespace(
        config=config, checkpoint=checkpoint, meta=SimpleNamespace(progress=SimpleNamespace(step=6)),
        tokenizer=tokenizer, model=cached_model(config),
    )  # fmt: skip
    monkeypatch.setattr(command, "open_trained", lambda *_, **__: one)
    return one


def request(*texts: object, **options: Any) -> Request:
    return Request(ModelChoice(Path("run")), [str(one) for one in texts], options.pop("tasks", ["loss"]), **options)


def test_heldout_sequences_are_those_of_training(trained: Any) -> None:
    said: list[str] = []
    found = evaluate(request(), said.append)
    ((section,), reader) = found.sections, open_dataset(trained.config).reader("heldout")
    rows = [reader.sequence(n) for n in range(3)]
    expected = np.concatenate(list(ForwardModel(trained.model.layers, trained.config).losses(rows)))
    assert section.measures["loss"].value == pytest.approx(expected.mean(), abs=1e-6)
    assert section.measures["loss"].count == 3 * LENGTH and section.name == "heldout" and not said
    assert found.settings["window"] == 8  # two regions
    assert evaluate(request(limit=1), said.append).sections[0].measures["loss"].count == LENGTH
    many = evaluate(request(limit=10_000), said.append).sections[0].measures["loss"].count
    assert many == reader.num_sequences * LENGTH and any(
        "--limit=10000, but there are only 760" in line for line in said
    )


def test_every_byte_of_a_text_counts_once(trained: Any, tmp_path: Path) -> None:
    texts = ["a text, 床前明月光 " * 30, "short", "another one\n" * 4]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = evaluate(request(path, window=4, stride=5), lambda _: None).sections[0]
    tokens = sum(len(trained.tokenizer.encode(text)) + 1 for text in texts)
    assert (found.name, found.measures["loss"].count) == ("some", tokens)
    size = sum(len(text.encode()) for text in texts)
    assert found.measures["bits_per_byte"].count == size
    bits = found.measures["loss"].value * tokens / math.log(2) / size
    assert found.measures["bits_per_byte"].value == pytest.approx(bits)
    assert "1 are longer than the model's 32" in found.about and "at least 28 tokens of context" in found.about
    one = evaluate(request(path, limit=1, name="mine"), lambda _: None).sections[0]
    assert one.name == "mine" and "1 of 3 documents" in one.about and math.isnan(one.measures["loss"].error)


def test_results_are_kept_in_the_run_folder_unless_tracking_is_off(trained: Any, tmp_path: Path) -> None:
    found = evaluate(request(tasks=["loss", "recall"], limit=2), lambda _: None)
    kept = evaluated(tmp_path)
    assert kept == {6: found.metrics()}
    assert wanted_metrics(request(tasks=["loss", "recall"])) <= kept[6].keys()  # type: ignore[operator]
    assert {"evaluate/heldout/loss", "evaluate/heldout/loss_error", "evaluate/recall/distance/00016"} <= set(kept[6])
    assert all(math.isfinite(value) for value in kept[6].values())
    (tmp_path / "evaluations.jsonl").unlink()
    evaluate(request(tracking=False), lambda _: None)
    assert not (tmp_path / "evaluations.jsonl").exists()


def test_a_run_folder_that_cannot_be_written_is_one_line(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(command, "record_evaluation", fail)
    said: list[str] = []
    assert evaluate(request(), said.append).sections
    assert said == [f"{tmp_path}: Permission denied; the results are not kept in the run folder"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 33}, "--window=33 is more than the 32 tokens of the model's sequences; use at most that"),
        ({"tasks": ["loss", "needle"]}, "--tasks=needle: sequences of 32 tokens are too short"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(trained: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(request(**options), lambda _: None)


def test_a_text_does_not_take_the_name_of_the_heldout_split(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "heldout.txt").write_text("a text")
    with pytest.raises(UsageError, match="named heldout, as the results of the held-out split; give --name another"):
        evaluate(request(tmp_path / "heldout.txt"), lambda _: None)
    assert not evaluated(tmp_path)


def test_a_seed_that_numpy_refuses_is_named() -> None:
    with pytest.raises(UsageError, match="--seed=-1 is out of range; use from 0"):
        request(seed=-1)


def test_a_task_of_lm_eval_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"lm_eval:x needs lm-eval.*install it with `pip install 'biroute\[eval\]'`"):
        request(tasks=["loss", "lm_eval:x"])
    assert request(tasks=["loss"]).harness_tasks == ()


def test_options_of_lm_eval_need_one_of_its_tasks() -> None:
    for options in ({"fewshot": 2}, {"include": Path("folder")}):
        with pytest.raises(UsageError, match="is for tasks of lm-eval; name one, such as lm_eval:arc_easy"):
            request(**options)
    with pytest.raises(UsageError, match="--fewshot=-1 is out of range"):
        request(tasks=["lm_eval:x"], fewshot=-1)
    wanted = wanted_metrics(request(tasks=["recall", "lm_eval:x"], name="mine"))
    assert wanted == {"evaluate/mine-recall/accuracy", "evaluate/mine-lm_eval/x/documents"}


def test_check_says_what_each_task_needs_and_measures_nothing(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForwardModel, "__init__", None)
    lines, possible = check(request(tasks=["loss", "needle", "recall"]), lambda _: None)
    assert not possible and "needle: needs a sequence five times" in lines and "32 tokens are too short" in lines
    assert lines.splitlines()[-1].endswith("nothing from the internet: it can run")
    assert check(request(tasks=["recall"]), lambda _: None)[1]


def test_a_dataset_that_is_gone_or_of_another_tokenizer(trained: Any, tmp_path: Path) -> None:
    other = SimpleNamespace(fingerprint="f" * 64)
    tokenizer, trained.tokenizer = trained.tokenizer, other
    with pytest.raises(UsageError, match=r"was built with another tokenizer than .*step-00000006 was trained with"):
        evaluate(request(), lambda _: None)
    trained.tokenizer = tokenizer
    data = trained.config.data.model_copy(update={"dir": tmp_path / "gone"})
    trained.config = trained.config.model_copy(update={"data": data})
    with pytest.raises(UsageError, match=r"gone.*; or evaluate on files with --text"):
        evaluate(request(), lambda _: None)


def test_table_and_report_show_every_number(trained: Any, tmp_path: Path) -> None:
    found = evaluate(request(tasks=["loss", "recall"], window=32, limit=2), lambda _: None)
    shown = table(found)
    assert f"loss  {found.sections[0].measures['loss'].value:.4f}".split() == shown.splitlines()[4].split()[:2]
    report = write_report(tmp_path / "new" / "out", [found, replace(found, step=7)], "biroute evaluate run")
    text = report.read_text()
    assert text.count("## Step") == 2 and text.count("| loss |") == 2 and "Chance: 0.1250." in text
    assert "| loss_on_ar_hits | – | – | 0 |" in text  # the whole length is local
    numbers = json.loads((report.parent / "evaluation.json").read_text())
    hits = numbers[0]["sections"][0]["measures"]["loss_on_ar_hits"]
    assert hits == {"value": None, "standard_error": None, "count": 0}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out=.*cannot be made"):
        write_report(tmp_path / "file", [found], "")
