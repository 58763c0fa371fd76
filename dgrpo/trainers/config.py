"""Configuration of diffu-GRPO: TRL's GRPOConfig and what a diffusion policy adds."""

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trl
from packaging.version import Version
from transformers.utils import logging
from trl import GRPOConfig

from dgrpo.estimators import ESTIMATORS
from dgrpo.objectives import KL_FORMS, LOSS_TYPES, OBJECTIVES, SHARED, facts_of
from dgrpo.reliability.checks import default_to_bf16
from dgrpo.reliability.ranges import check_ranges
from dgrpo.sampling import SamplerConfig
from dgrpo.secrets import WritesNoSecrets
from dgrpo.trainers.plugins import check_plugins, resolve_objective

if not Version("1.16") <= Version(trl.__version__) < Version("1.17"):
    raise ImportError(
        f"dgrpo overrides private methods of trl 1.16, not of {trl.__version__}: pip install 'trl>=1.16,<1.17'"
    )

logger = logging.get_logger(__name__)
# On the embedded word problems a threshold of 0.5 ended exploration, 0.7 did not.
LOW_THRESHOLD = 0.7

# Settings of TRL that speak of next-token generation or of another log-probability; honoured by nothing here.
_REFUSED = {
    "use_vllm": (False, "rollouts are denoised by dgrpo's own sampler"),
    "use_transformers_continuous_batching": (False, "rollouts are denoised by dgrpo's own sampler"),
    "use_transformers_paged": (False, "rollouts are denoised by dgrpo's own sampler"),
    "top_p": (1.0, "what is scored is the whole vocabulary, so it is drawn from too; use temperature"),
    "top_k": (0, "what is scored is the whole vocabulary, so it is drawn from too; use temperature"),
    "min_p": (None, "the sampler draws from the whole vocabulary; use temperature"),
    "repetition_penalty": (1.0, "the sampler has no repetition penalty"),
    "cache_implementation": (None, "use `cache` ('prefix' or 'dual')"),
    "generation_kwargs": (None, "set the sampler's fields themselves (block_length, diffusion_steps, ...)"),
    "use_liger_kernel": (False, "scoring has its own chunked head"),
    "router_aux_loss_coef": (None, "no family has a load-balancing loss"),
    "cast_lm_head_to_fp32": (False, "log-probabilities are float32 already"),
    "off_policy_mask_threshold": (None, "it needs the sampler's own log-probabilities"),
    "transformers_continuous_batching_config": (None, "rollouts are denoised by dgrpo's own sampler"),
    "max_tool_calling_iterations": (None, "a denoised completion cannot wait for a tool"),
    "pad_to_multiple_of": (("auto", None), "views are drawn on the canvas as it is"),
    "model_init_kwargs": (
        None,
        "the model is loaded before the trainer; set dtype, attn_implementation, ... themselves",
    ),
    "trust_remote_code": (False, "no family runs code of its checkpoint"),
    "label_smoothing_factor": (0.0, "the loss has no labels"),
    "neftune_noise_alpha": (None, "noise in the embeddings moves the ratio where the policy has not moved"),
    "auto_find_batch_size": (False, "groups decide the batch; lower per_device_train_batch_size"),
    "train_sampling_strategy": ("random", "prompts are met group by group, in an order that resuming relies on"),
    "data_seed": (None, "the order of the prompts follows seed"),
    "ignore_data_skip": (False, "a resumed run would meet the prompts of the epoch's beginning again"),
}
# Words; TRL looks at its own for the first time in the middle of the first update.
_CHOICES = {
    "loss_type": tuple(LOSS_TYPES),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "prompt_mask_scope": ("group", "row"),
    "kl": (None, *KL_FORMS, "exact"),
}


@dataclass
class DiffuGRPOConfig(WritesNoSecrets, GRPOConfig):
    """The objective defaults to d1's (arXiv:2504.12216) in TRL's words; see `recipes/presets` for other methods."""

    loss_type: str = field(default="bnpo", metadata={"help": "d1 averages tokens over the micro-batch."})
    scale_rewards: str = field(default="none", metadata={"help": "d1 does not divide advantages by their deviation."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.04, metadata={"help": "Weight of the KL to the reference model."})
    num_iterations: int = field(
        default=12, metadata={"help": "Inner updates (mu) per rollout, each on its own masks."}
    )
    num_generations: int = field(default=6, metadata={"help": "Completions sampled per prompt (G)."})
    temperature: float = field(default=0.9, metadata={"help": "Sampling temperature of the rollouts."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Without it the ratio is not 1 where the policy has not moved."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rewards read the other columns."})

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Prompts with more tokens are skipped before training, with a count."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of the canvas (C)."})
    block_length: int | None = field(
        default=None,
        metadata={"help": "Blocks are denoised from left to right; None: the model's own, 32 with full attention."},
    )
    diffusion_steps: int | None = field(
        default=128, metadata={"help": "Denoising steps over the whole completion; null: one for each token."}
    )
    remasking: str = field(default="low_confidence", metadata={"help": "Order of commitment within a block."})
    cfg_scale: float = field(default=0.0, metadata={"help": "Classifier-free guidance of the rollouts; 0 is off."})
    stop_at_eos: bool = field(default=True, metadata={"help": "Rows leave the batch after the block they ended in."})
    cache: str | None = field(default=None, metadata={"help": "Approximate rollouts: 'prefix' or 'dual' cache."})
    cache_refresh: int | None = field(default=None, metadata={"help": "Steps between refreshes; None: per block."})
    threshold: float | None = field(default=None, metadata={"help": "Commit every token at least this probable."})
    factor: float | None = field(default=None, metadata={"help": "Fast-dLLM's factor rule for parallel decoding."})
    entropy_bound: float | None = field(default=None, metadata={"help": "EB-Sampler's bound, in nats."})
    entropy_sum: float | None = field(default=None, metadata={"help": "SDAR's sum of entropies, in nats."})
    min_commit: int = field(default=1, metadata={"help": "With one of these four: at least so many tokens a step."})
    sampler_policy: str | None = field(
        default=None, metadata={"help": "What a denoising step writes: package.module:function; None: as set above."}
    )
    sampler_policy_kwargs: dict | str | None = field(default=None, metadata={"help": "Settings of the policy."})
    compile_rollouts: str | None = field(
        default=None, metadata={"help": "Compile a step's layers: 'inductor', 'cudagraphs' or 'eager'; exact."}
    )
    merge_adapter_for_rollouts: bool = field(
        default=False,
        metadata={"help": "Fold the adapter into the base weights while rollouts are sampled; takes a copy of them."},
    )
    agreement_every: int = field(
        default=16,
        metadata={"help": "Rollouts between measurements of what cache, threshold and their kin change; 0: none."},
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Rows denoised at a time on one process; None: all of them."}
    )

    estimator: str | None = field(
        default="one_step",
        metadata={
            "help": f"Which views are scored: {', '.join(ESTIMATORS)}, or package.module:function. None: the function "
            "that the trainer is given."
        },
    )
    estimator_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Settings of the estimator, as a mapping (JSON on the command line)."}
    )
    objective: str = field(
        default="grpo",
        metadata={
            "help": f"The loss: {', '.join(OBJECTIVES)}, or package.module:function. TRL's loss_type is of grpo."
        },
    )
    objective_kwargs: dict | str | None = field(default=None, metadata={"help": "Settings of the objective."})
    p_mask_prompt: float | None = field(
        default=None,
        metadata={"help": "one_step: share of prompt tokens hidden; None: 0.15 (d1's), and 0 for block models."},
    )
    prompt_mask_scope: str = field(
        default="group",
        metadata={
            "help": "one_step: 'group' shares a prompt mask, and so one pass, among a prompt's rollouts; 'row'."
        },
    )
    score_temperature: float = field(default=1.0, metadata={"help": "Logits are divided by it in scoring."})
    kl: str | None = field(
        default=None,
        metadata={
            "help": "What beta weighs: 'k1', 'k2' or 'k3', estimated from the sampled tokens, or 'exact', over all "
            "words; None: the objective's own (grpo: k3, espo: k2)."
        },
    )
    log_kl: bool = field(
        default=False,
        metadata={"help": "Where beta is 0: log the KL to the reference all the same, over the rows that are scored."},
    )
    log_kl_every: int = field(
        default=1, metadata={"help": "log_kl: rollouts between measurements, each of which scores the reference."}
    )
    views_per_pass: int = field(default=4, metadata={"help": "Views of each row in memory at a time while scoring."})

    reward_timeout: float | None = field(
        default=600.0,
        metadata={"help": "Seconds that a reward may take for a batch before its rows count as not applicable."},
    )
    max_skipped_updates: int | None = field(
        default=5,
        metadata={
            "help": "Updates with a NaN or infinite loss or gradient are skipped and kept in output_dir/bad_batches; "
            "so many in a row end the run. None: no check."
        },
    )
    max_failed_rollouts: int | None = field(
        default=5,
        metadata={
            "help": "The run ends after so many rollouts in a row without a value of any reward. None: no check."
        },
    )
    collapse_window: int = field(
        default=8, metadata={"help": "Rollouts in the averages that are watched for a collapse; 0: not watched."}
    )
    stop_on_collapse: bool = field(default=False, metadata={"help": "End the run there instead of a warning."})

    if TYPE_CHECKING:
        # What TRL and `__post_init__` leave None nowhere.
        output_dir: str = ""
        num_generations_eval: int = 8
        generation_batch_size: int = 8
        steps_per_generation: int = 1
        shuffle_dataset: bool = True
        chat_template_kwargs: dict[str, Any] | None = None

    _VALID_DICT_FIELDS = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "estimator_kwargs",
        "objective_kwargs",
        "sampler_policy_kwargs",
    ]

    def __post_init__(self):
        check_ranges(self)
        fields = self.__dataclass_fields__
        for name, (neutral, reason) in _REFUSED.items():
            neutrals = neutral if isinstance(neutral, tuple) else (neutral,)
            if (value := getattr(self, name)) not in neutrals:
                raise ValueError(f"{name}={value!r} cannot be honoured: {reason}. Leave it at {neutrals[0]!r}.")
        for name in [name for name in fields if name.startswith("vllm_")]:
            if (value := getattr(self, name)) != fields[name].default:
                raise ValueError(
                    f"{name}={value!r} cannot be honoured: rollouts are denoised without vLLM. Remove it."
                )
        # TRL's names; TRL takes a truth value for one of them, which its type does not say.
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)  # type: ignore[call-overload]
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r}: choose {', '.join(map(repr, choices))}.")
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: rewards are compared within a group; set at least 2."
            )
        if self.whole_groups and self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size}: what a group shares needs it whole; "
                f"make it a multiple of num_generations={self.num_generations}, or set "
                "prompt_mask_scope='row' where the objective allows it."
            )
        # TRL turns bf16 on wherever it is not set.
        default_to_bf16(self)
        if self.diffusion_steps is None:
            self.diffusion_steps = self.max_completion_length
        super().__post_init__()
        self.sampler()
        self._check_objective()
        if self.threshold is not None and self.threshold < LOW_THRESHOLD:
            logger.warning(
                f"threshold={self.threshold}: below {LOW_THRESHOLD} a group's completions soon open alike and nothing "
                "is explored; set 0.9, and judge by the exact sampler."
            )
        if self.stop_on_collapse and not self.collapse_window:
            raise ValueError("stop_on_collapse=True with collapse_window=0: nothing is watched; set collapse_window.")

    def _check_objective(self) -> None:
        objective = resolve_objective(self.objective)
        accepted = inspect.signature(objective).parameters
        fields = self.__dataclass_fields__
        # epsilon, loss_type and beta have defaults of d1's, which no other objective is to be troubled with.
        for name in [name for name in SHARED if name not in ("epsilon", "loss_type", "beta", *accepted)]:
            if (value := getattr(self, name)) != fields[name].default:
                raise ValueError(
                    f"{name}={value!r}: objective={self.objective!r} does not read it; remove it, or set "
                    "objective='grpo'."
                )
        if self.use_adaptive_entropy and "entropy_coef" not in accepted:
            raise ValueError(
                f"use_adaptive_entropy=True: objective={self.objective!r} has no entropy_coef; remove it."
            )
        if self.kl == "exact" and self.beta == 0.0:
            raise ValueError("kl='exact' with beta=0: there is no KL in the loss; set beta, or leave kl out.")
        check_plugins(self)

    @property
    def whole_groups(self) -> bool:
        """Whether the rollouts of one prompt must stay together in a micro-batch."""
        return self.prompt_mask_scope == "group" or facts_of(resolve_objective(self.objective)).whole_groups

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that one rollout takes, over all processes."""
        return self.generation_batch_size // self.num_generations

    def check_num_prompts(self, num_rows: int) -> None:
        """ValueError where a dataset of so many rows does not fill one rollout: nothing would be trained."""
        if num_rows < self.prompts_per_rollout:
            raise ValueError(
                f"the dataset has {num_rows} prompts, one rollout takes {self.prompts_per_rollout} "
                f"(generation_batch_size={self.generation_batch_size} over all processes, divided by "
                f"num_generations={self.num_generations}): give more prompts, or lower per_device_train_batch_size or "
                "steps_per_generation."
            )

    def sampler(self) -> SamplerConfig:
        """The rollouts' sampler; it has no settings of its own."""
        names = SamplerConfig.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        return SamplerConfig(**{name: getattr(self, name) for name in names})
