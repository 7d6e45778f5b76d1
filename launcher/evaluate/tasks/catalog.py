"""The tasks by name."""

from __future__ import annotations

from biroute.launcher.evaluate.tasks.cloze import Cloze
from biroute.launcher.evaluate.tasks.needle import Needle
from biroute.launcher.evaluate.tasks.recall import Recall
from biroute.launcher.evaluate.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (Needle(), Recall(), Cloze())}
