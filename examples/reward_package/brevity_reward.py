"""Right answers in few words."""

from rewards.gsm8k import correctness_reward
from rewards.text import completion_text

FREE_WORDS, MOST_WORDS = 40, 120


def brevity_reward(prompts, completions, answer, **columns):
    """1.0 for the right number within 40 words, falling to 0.5 at 120; 0.0 for a wrong one, None without reference."""
    scores = []
    for mark, completion in zip(correctness_reward(prompts, completions, answer), completions, strict=True):
        excess = (len(completion_text(completion).split()) - FREE_WORDS) / (MOST_WORDS - FREE_WORDS)
        scores.append(None if mark is None else mark * (1 - 0.5 * min(max(excess, 0.0), 1.0)))
    return scores
