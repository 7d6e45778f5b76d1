"""Mounted commands: listed without being imported, and run as themselves."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from biroute.launcher.cli.lazy import MOUNTED, load_command


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
