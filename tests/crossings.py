"""How often one training step goes from our code into TRL's and back: `python tests/crossings.py`."""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import dgrpo

SIDES = {str(Path(dgrpo.__file__).parent): "ours", "/trl/": "trl"}


def crossings_of(step) -> tuple[Counter, set[str]]:
    """Calls from one side into the other while `step()` runs, by (caller's function, called function).

    Other libraries belong to whoever called them: our code called by PyTorch called by TRL counts as called by TRL.
    """
    stack: list[tuple[str, str]] = [("trl", "training_step")]
    crossed: Counter = Counter()
    files: set[str] = set()

    def watch(frame, event, argument):
        if event == "call":
            name = frame.f_code.co_filename
            side = next((side for part, side in SIDES.items() if part in name), stack[-1][0])
            own = any(part in name for part in SIDES)
            if side != stack[-1][0]:
                crossed[stack[-1][1], frame.f_code.co_qualname] += 1
            if own and side == "ours":
                files.add(Path(name).name)
            stack.append((side, frame.f_code.co_qualname if own else stack[-1][1]))
        elif event == "return" and len(stack) > 1:
            stack.pop()

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return crossed, files


def measure(folder: str) -> tuple[Counter, set[str]]:
    """Of the first training step of a run with the KL, which samples, scores and updates."""
    from trainers import lora, place_in_group, tiny_trainer

    trainer = tiny_trainer(folder, reward=place_in_group, lora=lora(), beta=0.04, max_steps=1, log_completions=False)
    inner, found = trainer.training_step, []

    def step(*args):
        result = []
        found.append(crossings_of(lambda: result.append(inner(*args))))
        return result[0]

    trainer.training_step = step
    trainer.train()
    return found[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        crossed, files = measure(folder)
    for (caller, called), count in crossed.most_common():
        print(f"{count:4} {caller} -> {called}")
    print(f"{crossed.total()} crossings, {len(files)} of our files")
