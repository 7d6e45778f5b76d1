"""Mounted commands: listed without being imported, and run as themselves."""

from __future__ import annotations

import inspect
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import pytest

from biroute.launcher.cli.lazy import MOUNTED, load_command
from biroute.launcher.cli.main import app, main


@pytest.mark.parametrize("name", MOUNTED)
def test_the_listed_line_is_the_first_of_the_commands_own_help(name: str) -> None:
    assert inspect.cleandoc(load_command(name).help or "").splitlines()[0] == MOUNTED[name].help


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_listing_imports_no_mounted_module() -> None:
    program = (
        "import sys; from biroute.launcher.cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "wanted = [m for m in sys.modules if m.startswith(('biroute.slurm', 'biroute.launcher.bench', 'pydantic'))]\n"
        "sys.exit(str(wanted) if wanted else 0)"
    )
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in MOUNTED)


def test_the_version_is_the_installed_one() -> None:
    done = run("from biroute.launcher.cli.main import app; app(['--version'])")
    assert (done.returncode, done.stdout.split()) == (0, ["biroute", "0.1.0"])


@pytest.mark.parametrize(("typed", "offered"), [("biroute st", "status"), ("biroute bench a", "attention")])
def test_the_shell_completes_commands(typed: str, offered: str) -> None:
    """As bash asks: through variables of the environment."""
    program = (
        f"import os; os.environ.update(_BIROUTE_COMPLETE='complete_bash', COMP_WORDS={typed!r}, "
        f"COMP_CWORD='{len(typed.split()) - 1}')\n"
        "from biroute.launcher.cli.main import app; app(prog_name='biroute')"
    )
    assert run(program).stdout.split() == [offered]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "where", "status", "said"),
    [
        (["data", "bigram", "x.yaml"], "biroute.launcher.cli.data.load_config", 130, "stopped\n"),
        (["plan", "x.yaml"], "biroute.launcher.cli.lazy.load_command", 130, "stopped\n"),
        (["train", "x.yaml"], "biroute.launcher.start.train.load_config", 75, "run the same command again\n"),
    ],
)
def test_an_interrupted_command_says_so(
    arguments: list[str], where: str, status: int, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wherever it is: while it runs, while it is imported, or before the ranks of a training are started."""
    monkeypatch.setattr(where, lambda *_: interrupt())
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (status, "")
    assert captured.err.endswith(said) and captured.err.count("\n") == 1


@pytest.mark.parametrize("imported", ["biroute.launcher.cli.main", "typer", "biroute.launcher.cli.options"])
def test_ctrl_c_while_the_command_line_is_imported_is_one_line(imported: str) -> None:
    """In the first tenth of a second, from where the installed script begins; a shell's `&` makes it deaf to it."""
    scripts = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["biroute"].split(":")
    program = (
        "import os, signal, sys\n"
        "deaf = False\nsignal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.default_int_handler)\n"
        "class Interrupting:\n"
        "    def find_spec(name, *_):\n"
        f"        if name == {imported!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        f"sys.argv = ['biroute', '--version']\nfrom {module} import {function} as begin\nbegin()"
    )
    ended = run(program)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "stopped\n")
    deaf = run(program.replace("deaf = False", "deaf = True"))
    assert (deaf.returncode, deaf.stdout, deaf.stderr) == (0, "biroute 0.1.0\n", "")


def test_an_interruption_that_a_callback_swallows_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ignores what is raised where an object is destroyed, and imports of libraries run such code."""

    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def work() -> None:
        Interrupted()
        time.sleep(30)

    monkeypatch.setattr("biroute.launcher.cli.main.app", work)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this deaf to it
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            main()
    finally:
        signal.signal(signal.SIGINT, heard)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "program",
    [
        "import os; from biroute.launcher.cli import main\n"
        "main.app = lambda: os._exit(2 if [os.fstat(number) for number in range(3)] else 0)\nmain.main()",
        "import sys; sys.argv = ['worker', 'missing.yaml']; from biroute.launcher.start import worker; worker.main()",
    ],
)
def test_closed_streams_are_no_failure(program: str, tmp_path: Path) -> None:
    """A daemon may be started so: a usage error keeps its status, and no file gets the number of a stream."""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, check=False, cwd=tmp_path).returncode == 2


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    program = "import sys; sys.argv = ['biroute', '--version']; from biroute.launcher.cli.main import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr.startswith("error: what this command prints cannot be written (No space left on device); free")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("tarin x", "error: No such command 'tarin'. Did you mean 'train'?; `biroute --help` says what there is"),
        ("train", "error: Missing argument 'CONFIG'; `biroute train --help` says what there is"),
        ("data verify", "error: Missing argument 'CONFIG'; `biroute data verify --help` says what there is"),
        ("plan c --nodes", "error: Option '--nodes' requires an argument; `biroute --help` says what there is"),
    ],
)
def test_a_word_that_cannot_be_is_told_in_one_line(
    typed: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["biroute", *typed.split()])
    monkeypatch.setattr("biroute.launcher.cli.main.app", partial(app, prog_name="biroute"))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"{line}\n")


def test_no_words_at_all_show_the_help() -> None:
    done = run("import sys; sys.argv = ['biroute', 'data']; from biroute.launcher.cli.main import main; main()")
    assert done.returncode == 2
    assert "inspect" in done.stdout + done.stderr and "error:" not in done.stderr
