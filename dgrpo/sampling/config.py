"""Settings of the reverse process."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from pkgutil import resolve_name
from typing import Any, Literal

Remasking = Literal["low_confidence", "random", "entropy", "topk_margin"]


@dataclass(frozen=True)
class SamplerConfig:
    """How a completion is denoised. The defaults are LLaDA's published procedure and are exact.

    `remasking` is the field's word for the order of commitment; only a `sampler_policy` of one's own hides a committed
    token again.
    """

    max_completion_length: int = 128
    # Blocks are denoised from left to right; within a block any position may come first.
    block_length: int = 32
    # Denoising steps over the whole completion, shared equally by the blocks.
    diffusion_steps: int = 128
    # 0 takes the most likely token; T draws from softmax(logits / T).
    temperature: float = 0.0
    # Which open positions to commit: most probable drawn token, at random, least entropy, or widest margin between
    # the two most probable tokens (the last two are Dream's).
    remasking: Remasking = "low_confidence"
    # Classifier-free guidance: logits = unconditional + (1 + cfg_scale) * (conditional - unconditional).
    cfg_scale: float = 0.0
    # Rows stop after the block in which they ended; tokens up to the first end-of-text token are not affected.
    stop_at_eos: bool = True
    # LLaDA's evaluation switches: never draw EOS; commit a block's end-of-text tokens last.
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    # Approximations, all opt-in. Keys and values of the finished prefix ("prefix"), or of everything outside the
    # block ("dual"), are reused within a block (Fast-dLLM, arXiv:2505.22618) and refreshed every `cache_refresh`
    # steps (None: at the start of each block; 1: every step, which is exact).
    cache: Literal["prefix", "dual"] | None = None
    cache_refresh: int | None = None
    # Parallel decoding, one of three: commit every token at least this probable; the longest prefix of the sorted
    # confidences with (n + 1) * (1 - c_n) < factor (Fast-dLLM); or while sum(H) - max(H) stays within a bound in nats
    # (EB-Sampler, arXiv:2505.24857, in the order of `remasking`). Where that is none, the first one is committed;
    # `diffusion_steps` no longer counts.
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    # What a step writes: a function (sight, budget, config) -> ids, itself or as package.module:function (see
    # `dgrpo.sampling.policy`); None: `commit`, by the settings above. It has `diffusion_steps` steps, rules or not.
    sampler_policy: str | Callable | None = None

    def __post_init__(self):
        def refuse(field: str, remedy: str):
            raise ValueError(f"{field}={getattr(self, field)!r}: {remedy}")

        for field in ("max_completion_length", "block_length", "diffusion_steps"):
            if getattr(self, field) < 1:
                refuse(field, "must be at least 1.")
        for field in ("temperature", "cfg_scale", "threshold", "factor", "entropy_bound"):
            if getattr(self, field) is not None and not isfinite(getattr(self, field)):
                refuse(field, "must be a finite number.")
        if self.max_completion_length % self.block_length:
            refuse("block_length", f"must divide max_completion_length={self.max_completion_length}.")
        num_blocks = self.max_completion_length // self.block_length
        if self.diffusion_steps < num_blocks:
            refuse(
                "diffusion_steps", f"each of the {num_blocks} blocks needs a step; raise it to {num_blocks} or more."
            )
        if self.diffusion_steps % num_blocks:
            refuse("diffusion_steps", f"must be a multiple of the number of blocks, {num_blocks}.")
        if self.temperature < 0:
            refuse("temperature", "must be 0 (greedy) or positive.")
        if self.cfg_scale < 0:
            refuse("cfg_scale", "must be 0 (off) or positive.")
        if self.remasking not in ("low_confidence", "random", "entropy", "topk_margin"):
            refuse("remasking", "choose low_confidence, random, entropy or topk_margin.")
        for field in ("threshold", "factor"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                refuse(field, "must be positive, or left out for `diffusion_steps` steps.")
        if self.entropy_bound is not None and not self.entropy_bound >= 0:
            refuse("entropy_bound", "must be 0 nats or more, or left out for `diffusion_steps` steps.")
        if self.cache not in (None, "prefix", "dual"):
            refuse("cache", "choose prefix or dual, or leave it out for the exact sampler.")
        if self.cache_refresh is not None and (self.cache is None or self.cache_refresh < 1):
            refuse("cache_refresh", "needs cache=prefix or cache=dual and at least 1 step between refreshes.")
        if self.cache is not None and self.cfg_scale:
            refuse("cache", "does not go with cfg_scale; guidance would need a second cache. Drop one of the two.")
        rules = [name for name in ("threshold", "factor", "entropy_bound") if getattr(self, name) is not None]
        if len(rules) > 1:
            refuse(rules[0], "set only one of threshold, factor and entropy_bound.")
        if self.factor is not None and self.remasking != "low_confidence":
            refuse(
                "factor",
                f"is a rule on sorted confidences; remasking={self.remasking!r} sorts otherwise. Take low_confidence, "
                "or threshold or entropy_bound.",
            )
        if self.sampler_policy is not None:
            try:
                if not callable(self.policy):
                    raise TypeError(f"{self.policy!r} is no function")
                inspect.signature(self.policy).bind("sight", "budget", "config")
            except (ImportError, AttributeError, ValueError, TypeError) as error:
                refuse(
                    "sampler_policy", f"name a function (sight, budget, config) as package.module:function; {error}."
                )

    @property
    def policy(self) -> Callable | None:
        """The function that `sampler_policy` names."""
        return resolve_name(self.sampler_policy) if isinstance(self.sampler_policy, str) else self.sampler_policy

    @property
    def num_blocks(self) -> int:
        return self.max_completion_length // self.block_length

    def exact(self) -> "SamplerConfig":
        """The same sampler without approximations."""
        off: dict[str, Any] = dict.fromkeys(
            ("cache", "cache_refresh", "threshold", "factor", "entropy_bound", "sampler_policy")
        )
        return replace(self, **off)

    @property
    def approximate(self) -> bool:
        """Whether `exact` would sample otherwise: an outdated cache, several tokens at once, a policy of one's own."""
        return self.parallel or (self.cache is not None and self.cache_refresh != 1) or self.policy is not None

    @property
    def steps_per_block(self) -> int:
        """The most denoising steps that a block takes."""
        if self.parallel and self.policy is None:
            return self.block_length
        return self.diffusion_steps // self.num_blocks

    @property
    def parallel(self) -> bool:
        """Whether the model's confidence, not `diffusion_steps`, decides how many tokens a step commits."""
        return (self.threshold, self.factor, self.entropy_bound) != (None, None, None)
