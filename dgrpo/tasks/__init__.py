"""Tasks: datasets, prompts and graders, the same for training and evaluation."""

from dgrpo.reliability.dotted import imported
from dgrpo.tasks import countdown, gsm8k, math500, programs, sudoku
from dgrpo.tasks.sources import read_rows
from dgrpo.tasks.task import EMBEDDED, EMBEDDED_MODELS, Task, load_rows, prompt_messages

TASKS: dict[str, Task] = {
    task.name: task for task in (gsm8k.TASK, math500.TASK, countdown.TASK, sudoku.TASK, programs.TASK)
}


def find_task(name: str) -> Task:
    """The task of this name, or one of your own as `package.module:TASK`."""
    if ":" in name:
        if not isinstance(found := imported("task", name), Task):
            raise ValueError(f"task={name!r} is no dgrpo.tasks.Task.")
        return found
    if name not in TASKS:
        raise ValueError(f"task={name!r}: choose {', '.join(TASKS)}, or package.module:TASK.")
    return TASKS[name]


__all__ = ["EMBEDDED", "EMBEDDED_MODELS", "TASKS", "Task", "find_task", "load_rows", "prompt_messages", "read_rows"]
