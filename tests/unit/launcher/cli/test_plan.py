"""`biroute plan` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from biroute.configs.errors import UsageError
from biroute.launcher.cli.plan import plan_app

CONFIG = str(Path(__file__).resolve().parents[4] / "configs" / "demo.yaml")
FREE = (CONFIG, "parallel.data=null", "train.global_batch_size=64")


def plan(*words: str) -> str:
    done = CliRunner().invoke(plan_app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_two_numbers_of_nodes_side_by_side() -> None:
    text = plan(*FREE, "--nodes", "1", "--nodes", "2", "--hardware", "a100", "--price", "1.5")
    assert "8 (1)" in text
    assert "16 (2)" in text
    assert "NVIDIA A100 SXM4 80 GB" in text
    assert "cost" in text
    assert "assumed: hardware" not in text


@pytest.mark.parametrize("price", ["inf", "1e400"])
def test_a_price_that_json_could_not_hold_is_refused(price: str) -> None:
    with pytest.raises(UsageError, match="--price inf is no price; give a number"):
        plan(*FREE, "--price", price)


def test_what_is_not_given_is_said() -> None:
    text = plan(*FREE)
    assert "assumed: hardware h100; --hardware names another profile" in text
    assert "assumed: one data rank; --nodes, or parallel.data, asks for more" in text
    assert "cost" not in text


def test_json_and_the_files(tmp_path: Path) -> None:
    out = tmp_path / "new"
    answer = json.loads(plan(*FREE, "--nodes", "1", "--json", "--out", str(out)))
    assert answer["plans"][0]["devices"] == 8
    assert json.loads((out / "plan.json").read_text()) == answer
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_fraction_of_the_exchange_is_the_users() -> None:
    words = (*FREE, "parallel.region=8", "--nodes", "1", "--json", "--exchange-fraction")
    half, whole = (json.loads(plan(*words, given))["plans"][0]["region_exchange_bytes"] for given in ("0.5", "1"))
    assert whole["expected"] == whole["bound"] == 2 * half["expected"]


def test_a_search_ranks_and_counts() -> None:
    answer = json.loads(plan(CONFIG, "--nodes", "1", "--search", "--json"))
    (found,) = answer["searches"]
    assert found["devices"] == 8
    assert found["plans"]
    assert found["dropped"]
    assert "parallel.data=2 of the configuration is left out" in answer["assumed"]
    text = plan(CONFIG, "--nodes", "1", "--search")
    assert "layouts tried" in text
    assert "fell out:" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((CONFIG, "--nodes", "1"), "needs 2 processes, but 8 were started"),
        ((CONFIG, "--hardware", "nothing"), "--hardware nothing: no such hardware profile"),
        ((CONFIG, "parallel.data=null", "parallel.tensor=4"), "does not divide model.num_heads"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(plan_app, list(words), catch_exceptions=False)


@pytest.mark.parametrize(("search", "remedy"), [((), "use a smaller model"), (("--search",), "plan more --nodes")])
def test_what_does_not_fit_is_shown_and_refused(tmp_path: Path, search: tuple[str, ...], remedy: str) -> None:
    huge = (*FREE, "model.hidden_size=65536", "model.num_heads=512", "model.num_layers=64", "--nodes", "1", *search)
    with pytest.raises(UsageError, match=rf"the run does not fit: a rank needs .* too few; {remedy}"):
        CliRunner().invoke(plan_app, [*huge, "--out", str(tmp_path)], catch_exceptions=False)
    assert (tmp_path / "plan.json").exists()


def test_one_of_several_that_fits_is_enough() -> None:
    size = ("model.hidden_size=8192", "model.num_heads=64", "model.num_layers=64", "parallel.zero_stage=3")
    text = plan(*FREE, *size, "train.activation_checkpointing=true", "--nodes", "1", "--nodes", "2")
    assert "too much" in text


def test_planning_imports_no_torch() -> None:
    program = (
        "import sys; from biroute.launcher.cli.main import app\n"
        f"try: app(['plan', {CONFIG!r}])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'megatron', 'mlflow', 'matplotlib', 'numpy'} & {*sys.modules}\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
