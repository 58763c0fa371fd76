"""Ends a run before its end, as a kill between two updates would."""

from transformers import TrainerCallback


class StopAt(TrainerCallback):
    """Stops the training after update `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step
