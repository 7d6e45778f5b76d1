"""The batch script: what a request becomes, and that no value can get out of its quotes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import jinja2
import pytest
from helpers.job_request import request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biroute.configs.cluster_profile import ClusterProfile, dump_profile, load_profile
from biroute.configs.errors import UsageError
from biroute.slurm import script as job_script
from biroute.slurm.client import seconds_of
from biroute.slurm.script import render_job, sbatch_options

# Anything that a shell could take for more than text; the shell itself holds no NUL.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
ATTACKS = st.sampled_from(
    ["$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "\ntouch pwned\n", "a && touch x",
     "\\", "'", '"', "\n#SBATCH --partition=other", "$HOME", "*", "~", "-n", "${IFS}", "a\r\nb", "\t", "#", "x' \\\n"]
)  # fmt: skip
HOSTILE = st.one_of(TEXT, ATTACKS, st.builds(lambda a, b: a + b, TEXT, ATTACKS))


def directives(script: str) -> list[str]:
    """What sbatch reads: the comments before the first command."""
    head = script.partition("\n\n")[0]
    return [line.removeprefix("#SBATCH ") for line in head.split("\n") if line.startswith("#SBATCH")]


def bash(script: str, folder: Path) -> list[str]:
    """The NUL-separated words that a script prints in a real bash, which may write nothing into `folder`."""
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, cwd=folder, timeout=60, check=False, env={"HOME": "/"}
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert list(folder.iterdir()) == []
    return done.stdout.decode().split("\0")[:-1]


def test_what_a_request_asks_for() -> None:
    profile = ClusterProfile(
        account="physics", partition="gpu", qos="long", constraint="a100&ib", reservation="r1", gpus_per_node=4,
        gpu_type="a100", cpus_per_rank=8, memory_per_node="500G", exclusive=True, sbatch_options=("--nice=5",),
        srun_options=("--cpu-bind=none",), setup=("module load cuda",), venv=Path("/shared/venv"),
        environment={"NCCL_DEBUG": "WARN"}, network_interface="ib0",
    )  # fmt: skip
    script = render_job(request(profile=profile))
    assert directives(script) == [
        "--job-name=one", "--account=physics", "--partition=gpu", "--qos=long", "--constraint=a100&ib",
        "--reservation=r1", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gpus-per-node=a100:4",
        "--mem=500G", "--time=24:00:00", "--signal=B:USR1@120", "--chdir=/home/someone",
        "--output=/dev/null", "--requeue", "--exclusive", "--nice=5",
    ]  # fmt: skip
    for line in (
        "module load cuda",
        "source /shared/venv/bin/activate || exit 2",
        "export NCCL_DEBUG=WARN",
        "export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0",
        "export OMP_NUM_THREADS=8",
    ):
        assert f"\n{line}\n" in script
    assert "--cpu-bind=none" in script
    first_command = next(n for n, line in enumerate(script.splitlines()) if line and not line.startswith("#"))
    last_directive = max(n for n, line in enumerate(script.splitlines()) if line.startswith("#SBATCH"))
    assert last_directive < first_command, "sbatch reads directives only before the first command"


def test_what_is_left_out_is_not_asked_for() -> None:
    script = render_job(request(time_limit=None, requeue=False))
    assert not re.search("account|partition|gpus|--mem|--time=|exclusive|SOCKET_IFNAME|activate", script)
    assert "--no-requeue" in directives(script)
    assert "scontrol requeue" not in script


def test_an_empty_partition_is_the_default_one() -> None:
    values = {"job-name": "a", "nodes": 0}
    assert list(sbatch_options(ClusterProfile(partition=""), values)) == ["--job-name=a", "--nodes=0"]


def test_rendering_is_a_pure_function() -> None:
    assert render_job(request()) == render_job(request())
    assert str(Path.home()) not in render_job(request())
    assert subprocess.run(["bash", "-n"], input=render_job(request()), text=True, check=True).returncode == 0


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    run_dir=HOSTILE, word=HOSTILE, value=HOSTILE, option=HOSTILE, interface=HOSTILE, venv=HOSTILE, container=HOSTILE
)
def test_no_value_gets_out_of_its_quotes(
    run_dir: str, word: str, value: str, option: str, interface: str, venv: str, container: str, tmp_path: Path
) -> None:
    profile = ClusterProfile(
        account=value, partition=word, environment={"VALUE": value}, network_interface=interface,
        srun_options=(f"--x={option}",), sbatch_options=(f"--comment={option}",), venv=Path("/v") / venv,
    )  # fmt: skip
    hostile = request(profile=profile, run_dir=Path("/r") / run_dir, python=(container, word))
    plain = request(profile=replace_texts(profile), python=("a", "b"))
    script = render_job(hostile)

    lines = directives(script)
    assert len(lines) == len(directives(render_job(plain))), "no value makes a directive of its own"
    head, _, rest = script.partition("\n\n")
    assert all(line.startswith("#") for line in re.split("[\n\r\x0b\x0c]", head)), "nothing but comments at the top"

    # Everything up to the first call of Python, then the command that starts the ranks; the programs are printers.
    settings_part = rest[: rest.index("journal() {")]
    command = re.search(r"    run_step srun \S+ --kill-on-bad-exit=0(.*?)\n    # 138", rest, re.DOTALL)
    assert command is not None
    program = (
        "source() { printf '%s\\0' \"$@\"; }; run_step() { printf '%s\\0' \"$@\"; }; logs=/logs\n"
        f"{settings_part}\n{command.group().rsplit(chr(10), 1)[0]}\n"
        'printf "%s\\0" "$run_dir" "$VALUE" "$GLOO_SOCKET_IFNAME" "$NCCL_SOCKET_IFNAME"'
    )
    words = bash(program, tmp_path)
    assert words[0] == f"{Path('/v') / venv}/bin/activate"
    assert words[-4:] == [str(hostile.run_dir), value, interface, interface]
    assert f"--x={option}" in words
    start = words.index(container, words.index(f"--x={option}"))
    assert words[start : start + 5] == [container, word, "-P", "-m", "biroute.launcher.start.worker"]
    assert words[start + 5] == f"{hostile.run_dir}/submission/config.yaml"


def test_a_container_of_pyxis_holds_the_preflight_but_not_the_journal() -> None:
    """The batch script itself runs outside of it; other options of srun are for as many tasks as there are ranks."""
    options = ("--container-image=/shared/biroute.sqsh", "--gpus-per-task=1", "--no-container-mount-home")
    script = render_job(request(profile=ClusterProfile(srun_options=options), python=("python3",)))
    assert "journal_python=(/submitting/python3)\n" in script
    preflight = script[script.index("run_step srun") : script.index("-m biroute.slurm.preflight")]
    ranks = script[script.rindex("--kill-on-bad-exit") : script.index("-m biroute.launcher.start.worker")]
    assert [option in preflight for option in options] == [True, False, True]
    assert all(option in ranks for option in options)
    apptainer = render_job(request(python=("apptainer", "exec", "image.sif", "python3")))
    assert "journal_python=(apptainer exec image.sif python3)\n" in apptainer


def replace_texts(profile: ClusterProfile) -> ClusterProfile:
    return profile.model_copy(
        update={"account": "a", "partition": "p", "environment": {"VALUE": "v"}, "network_interface": "i",
                "srun_options": ("--x=o",), "sbatch_options": ("--comment=o",), "venv": Path("/v/v")}
    )  # fmt: skip


def test_an_expression_without_a_quoting_filter_is_an_error() -> None:
    environment = job_script._template(job_script.TEMPLATE).environment
    with pytest.raises(TypeError, match="without a filter that quotes it"):
        environment.from_string("echo {{ value }}").render(value="$(id)")
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("echo {{ nothing | sh }}").render()


def test_yaml_reads_a_time_as_text_and_numbers_as_minutes(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    for text, meant in (("24:00:00", "24:00:00"), ("'24:00:00'", "24:00:00"), ("90", "90"), ("1-12", "1-12")):
        path.write_text(f"time_limit: {text}\n")
        assert load_profile(str(path)).time_limit == meant


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("1:30", 90), ("24:00:00", 86_400), ("2-0", 172_800), ("2-12:30", 217_800), ("UNLIMITED", None)],
)
def test_seconds_of_a_time_limit(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("name", ["cpu", "gpu", "h100", "example"])
def test_shipped_profiles_are_valid_and_survive_writing(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    (tmp_path / "copy.yaml").write_text(dump_profile(profile))
    assert load_profile(str(tmp_path / "copy.yaml")) == profile


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("acount: x", ["acount", "did you mean account?"]),
        ("time_limit: soon", ["time_limit='soon'", "hours:minutes:seconds"]),
        ("gpus_per_node: -1", ["gpus_per_node=-1"]),
        ("sbatch_options: [mem=3]", ["'mem=3'", "--name"]),
        ("environment: {'A B': x}", ["'A B'", "environment variable"]),
        ("- 1", ["expected lines of the form 'field: value', found a list"]),
        ("a: [", ["not a readable YAML file"]),
    ],
)
def test_a_bad_profile_is_named(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_profile(str(path))
    for part in ["cluster.yaml", *parts]:
        assert part in str(caught.value)
