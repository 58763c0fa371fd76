"""Tasks: datasets, prompts and graders, the same for training and evaluation."""

import importlib

from dgrpo.tasks import countdown, gsm8k, math500, programs, sudoku
from dgrpo.tasks.sources import read_rows
from dgrpo.tasks.task import EMBEDDED, EMBEDDED_MODELS, Task, load_rows, prompt_messages

TASKS: dict[str, Task] = {
    task.name: task for task in (gsm8k.TASK, math500.TASK, countdown.TASK, sudoku.TASK, programs.TASK)
}


def find_task(name: str) -> Task:
    """The task of this name, or one of your own as `package.module:TASK`."""
    module, _, attribute = name.partition(":")
    if attribute:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"task={name!r}: cannot be imported: {error}.") from error
        if not isinstance(found, Task):
            raise ValueError(f"task={name!r} is no dgrpo.tasks.Task.")
        return found
    if name not in TASKS:
        raise ValueError(f"task={name!r}: choose {', '.join(TASKS)}, or package.module:TASK.")
    return TASKS[name]


__all__ = ["EMBEDDED", "EMBEDDED_MODELS", "TASKS", "Task", "find_task", "load_rows", "prompt_messages", "read_rows"]
