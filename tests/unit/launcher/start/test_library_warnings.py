"""Warnings of libraries reach a file and not the terminal; known noise reaches neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, warnings
from pathlib import Path
from biroute.launcher.start.library_warnings import LibraryWarnings
taken = LibraryWarnings()
warnings.warn("before there is a file")
warnings.warn("an old name", FutureWarning)
warnings.warn("Transformer Engine and Apex are not installed. Falling back")
taken.write_to(Path(sys.argv[1]))
warnings.warn("after")
"""


def test_real_warnings_go_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "warnings.log"
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    text = path.read_text()
    assert text.index("UserWarning: before there is a file") < text.index("UserWarning: after")
    assert "an old name" not in text and "Apex" not in text


def test_the_profiler_is_silent() -> None:
    program = (
        "from biroute.launcher.start.library_warnings import silence_known_noise; silence_known_noise()\n"
        "import torch; from torch.profiler import profile\n"
        "with profile(): torch.ones(2) + 1"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
