"""The tasks by name."""

from __future__ import annotations

from biroute.launcher.evaluate.tasks.choice import Choice
from biroute.launcher.evaluate.tasks.cloze import Cloze
from biroute.launcher.evaluate.tasks.needle import Needle
from biroute.launcher.evaluate.tasks.recall import Recall
from biroute.launcher.evaluate.tasks.task import Task
from biroute.launcher.evaluate.tasks.tracking import Tracking

TASKS: dict[str, Task] = {task.name: task for task in (Needle(), Recall(), Tracking(), Cloze(), Choice())}
