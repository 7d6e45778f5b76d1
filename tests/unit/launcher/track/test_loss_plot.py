"""The loss-curve picture: what is drawn is read back from its pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biroute.configs.errors import UsageError
from biroute.launcher.track.loss_plot import curve_of, draw_curves, smooth
from biroute.launcher.track.metrics_log import MetricsLog, read_points


def write_run(path: Path, steps: int, *, heldout: bool = True) -> None:
    metrics_log = MetricsLog(path)
    for step in range(1, steps + 1):
        loss = 2.0 + 6.0 * math.exp(-step / 100) + 0.1 * math.sin(step)
        metrics = {"train/loss": loss if step != 7 else float("nan")}
        if heldout and step % 50 == 0:
            metrics |= {"heldout/loss": loss + 0.1, "heldout/bits_per_byte": loss / 2}
        metrics_log.append(step, metrics)
    metrics_log.close()


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def share_of(image: Any, colour: str) -> float:
    """Share of the pixels that have exactly this colour."""
    from matplotlib.colors import to_rgb

    return float(np.all(np.abs(image - np.array(to_rgb(colour))) < 0.01, axis=-1).mean())


def test_picture_has_both_panels_and_the_line(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl", 300)
    plain, lined = tmp_path / "plain.png", tmp_path / "lined.png"
    draw_curves(tmp_path / "metrics.jsonl", plain, title="run")
    draw_curves(tmp_path / "metrics.jsonl", lined, title="run", bits_per_byte_lines={"bigram": 2.5})
    image = pixels(lined)
    assert image.shape[1] > 1000
    assert image.shape[1] > 2.5 * image.shape[0]
    middle = image.shape[1] // 2
    assert share_of(image[:, :middle], "#3b6fb6") > 0.001  # training loss, left
    assert share_of(image[:, :middle], "#d1603d") > 0.0005  # held-out loss, left
    assert share_of(image[:, middle:], "#d1603d") > 0.0005  # bits per byte, right
    assert share_of(image[:, middle:], "#3b6fb6") == 0.0
    assert share_of(image, "#5f6368") > 2 * share_of(pixels(plain), "#5f6368")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lined.png", "metrics.jsonl", "plain.png"]


def test_run_without_evaluation_has_one_panel(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl", 5, heldout=False)
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "new" / "one.png")
    image = pixels(tmp_path / "new" / "one.png")
    assert image.shape[1] < 1.6 * image.shape[0]
    assert share_of(image, "#3b6fb6") > 0.001
    assert share_of(image, "#d1603d") == 0.0


def test_one_point_is_a_picture_too(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl", 1)
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "one.png")
    image = pixels(tmp_path / "one.png")
    below_the_legend = image[image.shape[0] // 3 :]
    assert share_of(below_the_legend, "#3b6fb6") > 0.0


def test_curve_leaves_out_nan_and_repeated_steps(tmp_path: Path) -> None:
    metrics_log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, loss in ((1, 5.0), (3, float("nan")), (4, 3.0), (2, 4.0)):
        metrics_log.append(step, {"train/loss": loss})
    points = read_points(tmp_path / "metrics.jsonl")
    assert curve_of([*points, *points], "train/loss") == ([1, 2, 4], [5.0, 4.0, 3.0])


def test_smoothing_keeps_a_straight_line_and_removes_noise() -> None:
    line = [10.0 - 0.01 * step for step in range(500)]
    noise = [0.5 * (-1) ** step for step in range(500)]
    smoothed = smooth([a + b for a, b in zip(line, noise, strict=True)], 5.0)
    assert len(smoothed) == len(line)
    assert np.allclose(smoothed[20:-20], line[20:-20], atol=1e-3)  # no lag
    assert np.allclose(smoothed, line, atol=0.15)
    assert np.allclose(smooth([1.0, 1.0, 1.0], 50.0), 1.0)


def test_nothing_to_draw_is_the_users_fault_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.jsonl: No such file or directory; give the metrics\.jsonl"):
        draw_curves(tmp_path / "absent.jsonl", tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"metrics\.jsonl: no train/loss in it yet"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
