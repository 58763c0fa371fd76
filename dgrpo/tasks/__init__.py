"""Tasks: datasets, prompts and graders, the same for training and evaluation."""

from dgrpo.tasks import code, countdown, gsm8k, math500, sudoku
from dgrpo.tasks.task import EMBEDDED, Task, load_rows, prompt_messages

TASKS: dict[str, Task] = {
    task.name: task for task in (gsm8k.TASK, math500.TASK, countdown.TASK, sudoku.TASK, code.TASK)
}

__all__ = ["EMBEDDED", "TASKS", "Task", "load_rows", "prompt_messages"]
