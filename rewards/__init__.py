"""Verifiable rewards, one module per task, in TRL's signature.

    def correctness_reward(prompts, completions, answer, **columns) -> list[float | None]

One number per completion, in [0, 1] and in the order given; None means that the reward does not apply to the row
(its reference is missing). A completion is a list of messages, of which the first one's `content` is read, or a
string. The columns of the dataset arrive as arguments: `answer` for GSM8K and MATH, `numbers` and `target` for
Countdown, `puzzle` and `solution` for Sudoku, `tests` for programs.

What a model writes is hostile input. A reward prints nothing, draws no random number, evaluates no text as code,
raises on no text and ends within a second on any text (programs, which run in a sandbox, within the sandbox's limits).
The answer is read in one way by all tasks: see `rewards.text`.
"""
