"""Tasks: datasets, prompts and graders, the same for training and evaluation."""

from dgrpo.tasks import countdown, gsm8k, math500, programs, sudoku
from dgrpo.tasks.task import EMBEDDED, Task, load_rows, prompt_messages

TASKS: dict[str, Task] = {
    task.name: task for task in (gsm8k.TASK, math500.TASK, countdown.TASK, sudoku.TASK, programs.TASK)
}

__all__ = ["EMBEDDED", "TASKS", "Task", "load_rows", "prompt_messages"]
