"""The kernels run in Triton's interpreter, program by program on the CPU: chosen before they are imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
