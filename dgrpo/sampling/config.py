"""Settings of the reverse process."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any, Literal, get_args

from dgrpo.reliability.dotted import imported

Remasking = Literal["low_confidence", "random", "entropy", "topk_margin", "sequential"]
# Settings of parallel decoding, of which one at most is set.
RULES = ("threshold", "factor", "entropy_bound", "entropy_sum")


@dataclass(frozen=True)
class SamplerConfig:
    """How a completion is denoised. The defaults are LLaDA's published procedure and are exact.

    `remasking` is the field's word for the order of commitment; only a `sampler_policy` of one's own hides a committed
    token again.
    """

    max_completion_length: int = 128
    # Blocks are denoised from left to right; within a block any position may come first. None: 32, or the blocks in
    # which the model attends, which leave no choice.
    block_length: int | None = None
    # Denoising steps over the whole completion, shared equally by the blocks.
    diffusion_steps: int = 128
    # 0 takes the most likely token; T draws from softmax(logits / T).
    temperature: float = 0.0
    # Draw from the k most likely words only (0: all), and of these from the fewest that have this share together. How
    # sure the model is, for order and rules below, is then measured among the words that are left (as in SDAR's and
    # LLaDA2's code); what is recorded is the whole distribution's.
    top_k: int = 0
    top_p: float = 1.0
    # Which open positions to commit: most probable drawn token, at random, least entropy, widest margin between the
    # two most probable tokens (these two are Dream's), or leftmost.
    remasking: Remasking = "low_confidence"
    # Classifier-free guidance: logits = unconditional + (1 + cfg_scale) * (conditional - unconditional).
    cfg_scale: float = 0.0
    # Rows stop after the block in which they ended; tokens up to the first end-of-text token are not affected.
    stop_at_eos: bool = True
    # LLaDA's evaluation switches: never draw EOS; commit a block's end-of-text tokens last.
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    # None computes what is exact: keys and values of finished blocks are kept where the model attends block by block,
    # which changes nothing; "recompute" does without. Approximations with full attention, opt-in: keys and values of
    # the finished prefix ("prefix"), or of everything outside the block ("dual"), are reused within a block
    # (Fast-dLLM, arXiv:2505.22618) and refreshed every `cache_refresh` steps (None: at the start of each block; 1:
    # every step, which is exact).
    cache: Literal["prefix", "dual", "recompute"] | None = None
    cache_refresh: int | None = None
    # Parallel decoding, one of four: commit every token at least this probable; the longest prefix of the sorted
    # confidences with (n + 1) * (1 - c_n) < factor (Fast-dLLM); while sum(H) - max(H) stays within a bound in nats
    # (EB-Sampler, arXiv:2505.24857), or while sum(H) stays below a sum in nats (SDAR, with remasking="entropy"), both
    # in the order of `remasking`. Where these are fewer than `min_commit`, the first so many are committed;
    # `diffusion_steps` no longer counts.
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    entropy_sum: float | None = None
    min_commit: int = 1
    # What a step writes: a function (sight, budget, config) -> ids, itself or as package.module:function (see
    # `dgrpo.sampling.policy`); None: `commit`, by the settings above. It has `diffusion_steps` steps, rules or not.
    sampler_policy: str | Callable | None = None
    sampler_policy_kwargs: dict | None = None
    # Compile the layers for the shapes of a denoising step (see `dgrpo.sampling.compiled`): "inductor" fuses kernels,
    # "cudagraphs" also records them, "eager" only traces. Exact; the first passes of each shape take minutes.
    compile_rollouts: Literal["inductor", "cudagraphs", "eager"] | None = None

    def __post_init__(self):
        refuse = self._refuse
        for field in ("max_completion_length", "block_length", "diffusion_steps", "min_commit"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                refuse(field, "must be at least 1.")
        for field in ("temperature", "top_p", "cfg_scale", *RULES):
            if getattr(self, field) is not None and not isfinite(getattr(self, field)):
                refuse(field, "must be a finite number.")
        if self.block_length is not None:
            self._check_blocks()
        if self.temperature < 0:
            refuse("temperature", "must be 0 (greedy) or positive.")
        if self.top_k < 0 or self.top_k == 1:
            refuse("top_k", "must be 0 (off) or at least 2. Of one word the model is always sure: set temperature=0.")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "must be a share of at most 1 (off).")
        if self.cfg_scale < 0:
            refuse("cfg_scale", "must be 0 (off) or positive.")
        if self.remasking not in get_args(Remasking):
            refuse("remasking", f"choose {', '.join(get_args(Remasking))}.")
        for field in ("threshold", "factor", "entropy_sum"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                refuse(field, "must be positive, or left out for `diffusion_steps` steps.")
        if self.threshold is not None and self.threshold > 1:
            refuse("threshold", "is a probability; above 1 no token would reach it.")
        if self.entropy_bound is not None and not self.entropy_bound >= 0:
            refuse("entropy_bound", "must be 0 nats or more, or left out for `diffusion_steps` steps.")
        if self.cache not in (None, "prefix", "dual", "recompute"):
            refuse("cache", "choose prefix or dual, or leave it out for the exact sampler.")
        windowed = self.cache in ("prefix", "dual")
        if self.cache_refresh is not None and (not windowed or self.cache_refresh < 1):
            refuse("cache_refresh", "needs cache=prefix or cache=dual and at least 1 step between refreshes.")
        if windowed and self.cfg_scale:
            refuse("cache", "does not go with cfg_scale; guidance would need a second cache. Drop one of the two.")
        rules = [name for name in RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            refuse(rules[0], f"set only one of {', '.join(RULES[:-1])} and {RULES[-1]}.")
        if self.min_commit > 1 and not rules:
            refuse("min_commit", f"needs one of {', '.join(RULES)}; else `diffusion_steps` says how many.")
        if self.factor is not None and self.remasking != "low_confidence":
            refuse(
                "factor",
                f"is a rule on sorted confidences; remasking={self.remasking!r} sorts otherwise. Take low_confidence, "
                "or another rule.",
            )
        if self.sampler_policy is not None:
            try:
                if not callable(self.policy):
                    raise TypeError(f"{self.policy!r} is no function")
                inspect.signature(self.policy).bind("sight", "budget", "config")
            except (ValueError, TypeError) as error:
                kwargs = f", **{self.sampler_policy_kwargs}" if self.sampler_policy_kwargs else ""
                refuse(
                    "sampler_policy",
                    f"name a function (sight, budget, config{kwargs}) as package.module:function; {error}.",
                )
            if rules and getattr(self.policy, "needs_budget", False):
                refuse(rules[0], f"sampler_policy={self.sampler_policy!r} follows `diffusion_steps`: leave it out.")
        elif self.sampler_policy_kwargs:
            refuse("sampler_policy_kwargs", "needs a sampler_policy that takes them.")
        if self.compile_rollouts not in (None, "inductor", "cudagraphs", "eager"):
            refuse("compile_rollouts", "choose inductor, cudagraphs or eager, or leave it out.")
        if self.compile_rollouts and self.cache in ("prefix", "recompute"):
            refuse(
                "compile_rollouts", f"cache={self.cache!r} has other shapes in each block; take cache=dual or none."
            )

    def _refuse(self, field: str, remedy: str):
        raise ValueError(f"{field}={getattr(self, field)!r}: {remedy}")

    def _check_blocks(self) -> None:
        if self.max_completion_length % (self.block_length or 1):
            self._refuse("block_length", f"must divide max_completion_length={self.max_completion_length}.")
        remedy = f"each of the {self.num_blocks} blocks needs a step; raise it to {self.num_blocks} or more."
        if self.diffusion_steps < self.num_blocks:
            self._refuse("diffusion_steps", remedy)
        if self.diffusion_steps % self.num_blocks:
            self._refuse("diffusion_steps", f"must be a multiple of the number of blocks, {self.num_blocks}.")

    def of(self, block_length: int | None) -> "SamplerConfig":
        """The same sampler for a model that attends in blocks of so many tokens (None: full attention).

        Raises:
            ValueError: What such a model cannot be sampled with.
        """
        if block_length is None:
            return self if self.block_length else replace(self, block_length=min(32, self.max_completion_length))
        if self.block_length not in (None, block_length):
            self._refuse(
                "block_length",
                f"the model attends in blocks of {block_length} tokens: leave it out. If its weights were "
                "trained otherwise, say so in its config.json, or with load_model(block_length=).",
            )
        if self.max_completion_length % block_length:
            self._refuse("max_completion_length", f"must be a multiple of the model's block_length={block_length}.")
        if self.cache in ("prefix", "dual"):
            self._refuse("cache", "is for full attention; block by block the exact cache is on. Leave it out.")
        if self.cfg_scale:
            self._refuse("cfg_scale", "a model that attends block by block never sees a hidden prompt. Set it to 0.")
        return replace(self, block_length=block_length)

    @property
    def policy(self) -> Callable | None:
        """The function that `sampler_policy` names, with its settings."""
        policy: Any = self.sampler_policy
        policy = imported("sampler_policy", policy) if isinstance(policy, str) else policy
        if not self.sampler_policy_kwargs or not callable(policy):
            return policy
        bound = partial(policy, **self.sampler_policy_kwargs)
        vars(bound).update(getattr(policy, "__dict__", {}))
        return bound

    @property
    def num_blocks(self) -> int:
        """Blocks of a completion; known once `block_length` is, as it is of what `of` returns."""
        assert self.block_length is not None
        return self.max_completion_length // self.block_length

    def exact(self) -> "SamplerConfig":
        """The same sampler without approximations."""
        off: dict[str, Any] = dict.fromkeys(
            ("cache", "cache_refresh", *RULES, "sampler_policy", "sampler_policy_kwargs")
        )
        return replace(self, **off, min_commit=1)

    @property
    def approximate(self) -> bool:
        """Whether `exact` would sample otherwise: an outdated cache, several tokens at once, a policy of one's own."""
        windowed = self.cache in ("prefix", "dual") and self.cache_refresh != 1
        return self.parallel or windowed or self.policy is not None

    @property
    def steps_per_block(self) -> int:
        """The most denoising steps that a block takes."""
        if self.parallel and self.policy is None:
            return self.max_completion_length // self.num_blocks
        return self.diffusion_steps // self.num_blocks

    @property
    def parallel(self) -> bool:
        """Whether the model's confidence, not `diffusion_steps`, decides how many tokens a step commits."""
        return any(getattr(self, name) is not None for name in RULES)
