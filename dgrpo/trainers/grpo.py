"""diffu-GRPO: the difference between a masked diffusion policy and trl.GRPOTrainer.

Letters: B rollouts of this process, G rollouts of one prompt, P prompt tokens, C completion tokens, L = P + C,
N masked views, mu inner updates per rollout batch.
"""

import copy
import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import use_adapter

from dgrpo.logprobs import ViewScores, block_length_of, mean_entropy, score_views
from dgrpo.models.adapters import adapters_to_float32, check_policy, refuse_16_bit_training
from dgrpo.noise import row_keys, stream
from dgrpo.objectives import SHARED, Metrics, ObjectiveInputs, check_combination, facts_of, kl_k1, kl_k3
from dgrpo.reliability.checkpoints import ExactResume
from dgrpo.reliability.checks import check_blocks, context_length
from dgrpo.reliability.columns import check_columns, check_dataset, checked_rewards
from dgrpo.reliability.guards import CollapseGuard, RewardGuard, UpdateGuard
from dgrpo.sampling import Rollout
from dgrpo.trainers.config import DiffuGRPOConfig
from dgrpo.trainers.data import EpochSampler, without_long_prompts
from dgrpo.trainers.plugins import configured_estimator, configured_objective
from dgrpo.trainers.rollouts import DenoisedRollouts, RolloutSource, rollout_metrics
from dgrpo.views import MaskedViews, draw_views

# Of TRL's constructor; what takes their place here.
_REFUSED = {
    "quantization_config": "the model is loaded already; dgrpo.load_model(..., load_in_4bit=True) quantizes it",
    "tools": "a denoised completion cannot wait for a tool",
    "environment_factory": "a denoised completion cannot wait for an environment",
    "rollout_func": "it returns no trace of the denoising; give a rollout_source",
}


# Names of the views' tensors in a batch.
VIEWS = tuple(MaskedViews.__dataclass_fields__)


class _Sampled(NamedTuple):
    """What `rollout_func` hands to `_generate_and_score_completions`, as a column of TRL's rows."""

    rollout: Rollout
    views: MaskedViews  # of all draws: hidden [B, mu, N, L], weights [B, mu, N, C]


def _copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is, its weights gathered while they are copied: under ZeRO-3 each process holds only a part."""
    parts = [weight for weight in model.parameters() if hasattr(weight, "ds_id")]
    if not parts:
        return copy.deepcopy(model).eval()
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        return copy.deepcopy(model).eval()


class DiffuGRPOTrainer(GRPOTrainer):
    """trl.GRPOTrainer for mask predictors. TRL's loop, prompts, advantages and logging stay; this is overridden:

    - `rollout_func` (TRL's own slot): rollouts come from `rollout_source`, and the views are drawn on them;
    - `_generate_and_score_completions`: full canvases and views go into the batch, where TRL cuts at the end of text;
    - `_calculate_rewards`: timed, and watched by `reward_guard`;
    - `_prepare_inputs`: groups stay together, old and reference policy are scored for each inner iteration, which
      then gets its slice;
    - `_get_per_token_logps_and_entropies`: empty, as `_prepare_inputs` scores on the full canvas;
    - `_compute_loss`: scores under the views and calls `objective`, whichever it is;
    - `compute_loss`, `_get_grad_norm`: what `update_guard` watches;
    - `_get_train_sampler`: the order of prompts is a function of seed and epoch;
    - `evaluation_loop`: an evaluation's batches draw on from each other;
    - `train`: a checkpoint is verified first; a run that ends before its last update says so;
    - `_save_checkpoint`, `_get_output_dir`, `_run_epoch`: what `checkpoints` writes, where, and that it is the end.
    """

    args: DiffuGRPOConfig
    # As TRL has them once it is built.
    model: Any
    train_dataset: Dataset
    num_generations: int
    num_generations_eval: int
    shuffle_dataset: bool
    _buffered_inputs: Any
    _entropy_window_stats: Any

    objective: Callable[..., tuple[Tensor, Metrics]]
    update_guard: UpdateGuard | None = None
    reward_guard: RewardGuard | None = None
    _tag_names = ["trl", "grpo", "dgrpo"]

    def __init__(
        self,
        model,
        reward_funcs,
        args: DiffuGRPOConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks: list | None = None,
        optimizers=(None, None),
        peft_config=None,
        estimator: Callable[..., MaskedViews] | None = None,
        rollout_source: RolloutSource | None = None,
        **refused,
    ):
        for name, value in refused.items():
            if name not in _REFUSED:
                raise TypeError(f"DiffuGRPOTrainer has no argument {name!r}.")
            if value is not None:
                raise ValueError(f"{name}={value!r:.80} cannot be honoured: {_REFUSED[name]}.")
        if isinstance(model, str):
            raise ValueError(f"model={model!r}: pass the model itself, as dgrpo.load_model({model!r}) returns it.")
        if args.kl == "exact" and peft_config is None and not isinstance(model, PeftModel):
            raise ValueError("kl='exact' needs a head that is not trained: give a peft_config, or set kl='k3'.")
        if getattr(processing_class, "mask_token_id", None) is None:
            raise ValueError("processing_class: the tokenizer has no mask token; load it with dgrpo.load_model.")
        if estimator is None and args.estimator is None:
            raise ValueError("estimator=None: name one in the settings, or give the trainer a function.")
        self.estimator, self.objective = estimator or configured_estimator(args), configured_objective(args)
        check_combination(self.estimator, self.objective, {name: getattr(args, name) for name in SHARED})
        reward_funcs = checked_rewards(reward_funcs, train_dataset, args)
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, each in held_out.items():
            if each is not None:
                check_columns(reward_funcs, check_dataset(name, each, args))
        if args.max_prompt_length is not None:
            train_dataset = without_long_prompts(
                train_dataset, processing_class, args.max_prompt_length, args.chat_template_kwargs
            )
            args.check_num_prompts(len(train_dataset))
        check_blocks(model, args, self.estimator)
        if peft_config is None:
            check_policy(model)
            if args.deepspeed_plugin is None:
                refuse_16_bit_training(model)
        # TRL would load the reference again by the policy's name, as another network where the policy was converted or
        # changed in memory; and it would put its own head for causal scoring over `forward`.
        with mock.patch.multiple(
            grpo_trainer,
            create_model_from_path=lambda *args, **kwargs: _copy_of(model),
            add_fused_lm_head=lambda *args, **kwargs: None,
        ):
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        if args.deepspeed_plugin is None:
            adapters_to_float32(self.model)
        self.sampler_config = args.sampler()
        self.rollout_source = rollout_source or DenoisedRollouts(self.accelerator, args)
        self.rollout_func = self._sample
        self._rows_evaluated = 0
        if args.max_skipped_updates is not None:
            decode = self._tokenizer.decode
            self.update_guard = UpdateGuard(args.max_skipped_updates, args.output_dir, self.accelerator, decode)
            self.add_callback(self.update_guard)
        if args.max_failed_rollouts is not None:
            self.reward_guard = RewardGuard(args.max_failed_rollouts, self.reward_weights.tolist())
        if args.collapse_window:
            self.add_callback(CollapseGuard(args.collapse_window, args.stop_on_collapse))
        self.checkpoints = ExactResume(self)
        self.checkpoints.settings["reward_funcs"] = self.reward_func_names

    def _get_output_dir(self, trial):
        return self.checkpoints.folder(super()._get_output_dir(trial=trial))

    def _save_checkpoint(self, model, trial):
        self.checkpoints.save(lambda: super(DiffuGRPOTrainer, self)._save_checkpoint(model, trial))

    def _run_epoch(self, *args, **kwargs):
        if not self.checkpoints.at_end():
            super()._run_epoch(*args, **kwargs)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def generate_every(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    @property
    def _round(self) -> int:
        """How many rollouts came before this one: with the seed, the key of all of its random numbers."""
        return self._step // self.generate_every if self._mode == "train" else self.state.global_step

    @property
    def logged_completions(self) -> list[tuple]:
        """(prompt, completion, advantage) of the last rollouts of all processes."""
        return list(zip(self._logs["prompt"], self._logs["completion"], self._logs["advantages"], strict=True))

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return bool(self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device)).any())

    def _log(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)

    # The loop: which prompts, how long.

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        sampler = EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.prompts_per_rollout,
            repeat_count=self.generate_every,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )
        sampler.set_epoch(0)
        return sampler

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        result = super().train(self.checkpoints.check(resume_from_checkpoint), *args, **kwargs)
        done, asked = self.state.global_step, self.state.max_steps
        if done == 0 or (done < asked and not self.control.should_training_stop):
            raise ValueError(
                f"max_steps={asked}: the run ended after {done} updates: the dataset gave no more batches. Give "
                "more prompts, or lower per_device_train_batch_size or steps_per_generation."
            )
        return result

    def evaluation_loop(self, *args, **kwargs):
        self._rows_evaluated = 0
        return super().evaluation_loop(*args, **kwargs)

    # Rollouts.

    def _sample(self, prompts: list, trainer: GRPOTrainer) -> dict:
        """TRL's `rollout_func`: completions cut at their end for TRL, and the rest of the rollout beside them."""
        device, mode = self.accelerator.device, self._mode
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        started = time.perf_counter()
        prompt_ids, *_ = self._tokenize_prompts(prompts)
        ids = [torch.tensor(each) for each in prompt_ids]
        padded = pad_sequence(ids, True, self._tokenizer.pad_token_id, padding_side="left").to(device)
        mask = pad_sequence([torch.ones_like(each) for each in ids], True, 0, padding_side="left").to(device)
        longest, canvas = padded.shape[1], self.args.max_completion_length
        if (context := context_length(self.accelerator.unwrap_model(self.model))) and longest + canvas > context:
            raise ValueError(
                f"a prompt has {longest} tokens, which with max_completion_length={canvas} is more than the model's "
                f"context of {context}: set max_prompt_length={context - canvas}, or lower max_completion_length."
            )
        # Global row numbers: the noise of a row does not depend on how many processes share the batch.
        rows = torch.arange(len(ids), device=device) + self.accelerator.process_index * len(ids)
        if mode == "eval":
            rows += self._rows_evaluated
            self._rows_evaluated += self.accelerator.num_processes * len(ids)
        keys = row_keys(rows, "rollout", mode, self.args.seed, self._round)
        self.rollout_source.update(self.model_wrapped, self.state.global_step)
        rollout = self.rollout_source(padded, mask, self.sampler_config, keys, rows // num_generations)
        if rollout.block_length != (size := block_length_of(self.model_wrapped)):
            raise ValueError(
                f"rollout_source: its rollout has block_length={rollout.block_length}, the model {size}. Prompts of a "
                "block model are whole blocks, and the rest of them begins the canvas (see Rollout)."
            )
        seconds = time.perf_counter() - started
        every, compare = self.args.agreement_every, getattr(self.rollout_source, "agreement", None)
        if mode == "train" and self.sampler_config.approximate and compare and every and self._round % every == 0:
            first = slice(None, None, num_generations)
            self._log({"rollout/agreement": compare(padded[first], mask[first], self.sampler_config, keys[first])})
        # Views are drawn group by group: on a GPU each would be many small copies and waits.
        host, key = rollout.to("cpu"), ("views", mode, self.args.seed, self._round)
        unit = host.group if self.args.whole_groups else rows.cpu()
        views = draw_views(self.estimator, host, unit, key, self.num_iterations if mode == "train" else 1)
        self._log(rollout_metrics(rollout, seconds, self.args.rollout_batch_size, self.accelerator))
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [
                row[keep].tolist() for row, keep in zip(host.completion_ids, host.completion_mask, strict=True)
            ],
            "logprobs": None,
            "sampled": _Sampled(rollout, views.each(lambda value: value.to(device))),
        }

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        started = time.perf_counter()
        rows = [{name: value for name, value in row.items() if name != "sampled"} for row in inputs]
        rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        self._log({"time/rewards": time.perf_counter() - started})
        if self.reward_guard is not None and self._mode == "train":
            self.reward_guard.check(rewards)
        return rewards

    def _generate_and_score_completions(self, inputs):
        rows = [dict(row) for row in inputs]
        batch = super()._generate_and_score_completions(rows)
        rollout, views = rows[0]["sampled"]
        weights = views.weights
        # Behind the end a trace of blocks scores what had a part in the answer.
        kept = rollout.completion_mask | (weights != 0).flatten(1, 2).any(1)
        if self.mask_truncated_completions:
            ends = torch.tensor(self.eos_token_ids, device=kept.device)
            has_end = torch.isin(rollout.completion_ids, ends) & rollout.completion_mask
            kept = kept & has_end.any(1, keepdim=True)
            weights = weights * kept[:, None, None]
        trace = {name: getattr(rollout, name) for name in ("revealed_at", "confidence", "entropy", "history")}
        canvas = {"completion_ids": rollout.completion_ids}
        if rollout.block_length is not None:
            canvas = {"prompt_ids": rollout.prompt_ids, "prompt_mask": rollout.prompt_mask.long()}
            canvas["completion_ids"] = rollout.trace_ids()
        # TRL cuts completions at their end and pads to the longest; the canvas has all C positions, or its length
        # would tell the model how long the answer is. Its count of tokens takes a last [PAD] for an end of text.
        return batch | {
            **canvas,
            "completion_mask": kept.long(),
            "num_items_in_batch": self.accelerator.reduce(kept.sum(), "sum"),
            **views.tensors(),
            "weights": weights,
            "group": rollout.group,
            # For estimators and objectives of one's own, and for whoever looks into a checkpoint's batch.
            **{name: value for name, value in trace.items() if value is not None},
        }

    # What an inner iteration gets.

    def _prepare_inputs(self, generation_batch):
        if self._mode == "eval":
            batch = self._generate_and_score_completions(generation_batch)
            return self._slice(self._with_reference(batch), 0)
        steps = self.args.steps_per_generation
        if self._step % self.generate_every == 0 or self._buffered_inputs is None:
            batch = self._shuffled(self._generate_and_score_completions(generation_batch))
            started = time.perf_counter()
            size = len(batch["group"]) // steps
            parts = [
                {key: value[at : at + size] if value.dim() else value for key, value in batch.items()}
                for at in range(0, steps * size, size)
            ]
            self._buffered_inputs = [self._with_reference(self._with_old(part)) for part in parts]
            self._log({"time/scoring": time.perf_counter() - started})
        # Passes over the generation batch, not micro-batches: each micro-batch meets every draw exactly once.
        iteration = (self._step // steps) % self.num_iterations
        return self._slice(self._buffered_inputs[self._step % steps], iteration)

    def _shuffled(self, batch: dict) -> dict:
        """The batch with its rows, or its groups, in random order."""
        size = self.num_generations if self.args.whole_groups else 1
        generator = stream("shuffle", self.args.seed, self._round, self.accelerator.process_index)
        order = torch.randperm(len(batch["group"]) // size, generator=generator)
        rows = (order[:, None] * size + torch.arange(size)).flatten().to(batch["group"].device)
        return {key: value[rows] if value.dim() else value for key, value in batch.items()}

    @property
    def _draws_before_update(self) -> int:
        """Number of inner iterations before the first optimizer step; their ratio is 1 by construction."""
        accumulation, steps = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        aligned = self.generate_every % accumulation == 0 or accumulation % self.generate_every == 0
        return min(accumulation // steps, self.num_iterations) if aligned else 0

    def _with_old(self, batch: dict) -> dict:
        """`batch` with old_per_token_logps [B, mu, C] of this policy; skipped iterations are left at 0."""
        first, read = self._draws_before_update, facts_of(self.objective).old_policy
        if first >= self.num_iterations or read is None:
            return batch
        per_view = self._logps_of_draws(self.model, batch, first)
        old = {"old_per_token_logps": (batch["weights"] * per_view).sum(2)}
        return batch | old | ({"old_logps_per_view": per_view} if read == "per_view" else {})

    def _with_reference(self, batch: dict) -> dict:
        """`batch` with ref_per_token_logps [B, mu, C]: the reference model's, or this one's without its adapter."""
        if self.args.kl == "exact" or (self.beta == 0.0 and not self._watches_kl):
            return batch
        if self.ref_model is not None:
            per_view = self._logps_of_draws(self.ref_model, batch)
        else:
            with self._as_reference():
                per_view = self._logps_of_draws(self.model, batch)
        return batch | {"ref_per_token_logps": (batch["weights"] * per_view).sum(2)}

    def _as_reference(self) -> AbstractContextManager:
        """Inside, the policy is its own reference: without its adapter, or with the one that it started from."""
        model = self.accelerator.unwrap_model(self.model)
        return use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)

    @property
    def _watches_kl(self) -> bool:
        """Whether this rollout's KL is a metric only; without an adapter there is no reference to compare with."""
        due = self._mode == "eval" or self._round % self.args.log_kl_every == 0
        watched = self.args.log_kl and self.beta == 0.0 and due
        return watched and isinstance(self.accelerator.unwrap_model(self.model), PeftModel)

    def _slice(self, batch: dict, iteration: int) -> dict:
        """What one inner iteration sees of the batch."""
        inputs = dict(batch)
        for key in (*VIEWS, "old_per_token_logps", "old_logps_per_view", "ref_per_token_logps"):
            if key in inputs:
                inputs[key] = inputs[key][:, iteration]
        if self._mode == "train" and iteration < self._draws_before_update:
            inputs.pop("old_per_token_logps", None)
            inputs.pop("old_logps_per_view", None)
        if self._mode == "train" and self._skips_idle_rows:
            inputs["weights"] = inputs["weights"] * (inputs["advantages"] != 0)[:, None, None]
            if "old_per_token_logps" in inputs:
                inputs["old_per_token_logps"] = inputs["old_per_token_logps"] * (inputs["advantages"] != 0)[:, None]
        return inputs

    @property
    def _skips_idle_rows(self) -> bool:
        """Rows with advantage 0 have no gradient when nothing but the advantage drives the loss."""
        entropy = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0
        return facts_of(self.objective).advantage_is_factor and self.beta == 0.0 and not entropy

    # Scores and loss.

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return None, None, None

    @torch.no_grad()
    def _logps_of_draws(self, model, batch: dict, first: int = 0) -> Tensor:
        """[B, mu, N, C]: each draw in a call of its own, on the rows of the update, so that rounding agrees."""
        logps = torch.zeros_like(batch["weights"])
        for draw in range(first, logps.shape[1]):
            views = MaskedViews(**{name: batch[name][:, draw] for name in VIEWS if name in batch})
            logps[:, draw] = self._score(model, batch, views)[0]
        return logps

    def _score(self, model, batch: dict, views: MaskedViews, as_reference=None) -> ViewScores:
        """log p(token | canvas) under `views`, [B, N, C], the entropies and, against a reference, the KL there."""
        with self.accelerator.autocast():
            return score_views(
                model,
                batch["prompt_ids"],
                batch["prompt_mask"],
                batch["completion_ids"],
                views,
                mask_token_id=self._tokenizer.mask_token_id,
                temperature=self.args.score_temperature,
                views_per_pass=self.args.views_per_pass,
                entropy_grad=self._entropy_bonus_enabled,
                as_reference=as_reference,
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self._compute_loss(model, inputs)
        guard = self.update_guard if self._mode == "train" else None
        return loss if guard is None else guard.watched(inputs, loss)

    def _compute_loss(self, model, inputs):
        views = MaskedViews(**{name: inputs[name] for name in VIEWS if name in inputs})
        scores = self._score(model, inputs, views, self._as_reference if self.args.kl == "exact" else None)
        training, weights = self._mode == "train", views.weights
        # Tokens of the generation batch in all processes, as a mean over its micro-batches.
        parts = self.accelerator.num_processes * (self.args.steps_per_generation if training else 1)
        divergences = None
        if scores.divergences is not None:
            divergences = (weights * scores.divergences).sum(1) / weights.sum(1).clamp(min=1e-9)
        batch = ObjectiveInputs(
            logps_per_view=scores.logps,
            weights=weights,
            old_logps=inputs.get("old_per_token_logps"),
            ref_logps=inputs.get("ref_per_token_logps"),
            advantages=inputs["advantages"],
            completion_mask=inputs["completion_mask"].bool(),
            group=inputs["group"],
            old_logps_per_view=inputs.get("old_logps_per_view"),
            entropies=mean_entropy(scores.entropies, views),
            divergences=divergences,
            tokens_per_batch=inputs["num_items_in_batch"].clamp(min=1) / parts,
            gather=self._gather,
        )
        # The one setting that moves during a run; None: nothing is to be measured for it.
        takes_bonus = "entropy_coef" in inspect.signature(self.objective).parameters
        bonus = {"entropy_coef": self._entropy_coef if self._entropy_bonus_enabled else None} if takes_bonus else {}
        loss, metrics = self.objective(batch, **bonus)
        scored = (weights != 0).any(1)
        assert batch.entropies is not None
        metrics["entropy"] = torch.stack([(batch.entropies * scored).sum(), scored.sum()])
        if self.beta == 0.0 and batch.ref_logps is not None:
            metrics["kl"] = self._kl_to_reference(batch, scored)
        self._record(metrics)
        if self._entropy_bonus_enabled and training:
            self._adapt_entropy_coef(metrics["bonus_entropy"])
        return loss / (self.current_gradient_accumulation_steps if training else 1.0)

    def _gather(self, values: Tensor) -> Tensor:
        """The values [n] of all processes, of which each may have another number."""
        numbered = self.accelerator.pad_across_processes(values, pad_index=float("nan"))
        gathered = self.accelerator.gather(numbered)
        return gathered[~gathered.isnan()]

    def _kl_to_reference(self, batch: ObjectiveInputs, scored: Tensor) -> Tensor:
        """[total, count] of the KL per scored token."""
        assert batch.ref_logps is not None
        logps = batch.logps.detach()
        if facts_of(self.estimator).draws:
            # Weighted terms mean something only once summed, which the plain log-ratio is.
            return torch.stack([(kl_k1(logps, batch.ref_logps) * scored).sum(), batch.weights.sum()])
        return torch.stack([(kl_k3(logps, batch.ref_logps) * scored).sum(), scored.sum()])

    def _record(self, metrics: Metrics) -> None:
        """Logs an objective's metrics over all processes: scalars averaged, [total, count] divided."""
        pairs = [value if value.dim() else torch.stack([value, torch.ones_like(value)]) for value in metrics.values()]
        totals = self.accelerator.reduce(torch.stack([pair.detach().float() for pair in pairs]), "sum").tolist()
        self._log({name: total / count for name, (total, count) in zip(metrics, totals, strict=True) if count})

    @property
    def _entropy_coef(self) -> float:
        """The weight of the entropy bonus, which the adaptive one pays only while the entropy is below its target."""
        return (
            0.0
            if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
            else self.entropy_coef
        )

    def _adapt_entropy_coef(self, entropy: Tensor) -> None:
        """Moves the coefficient by a step after each update, by the entropy [total, count] of its micro-batches."""
        update_ends = self.accelerator.sync_gradients
        if self.use_adaptive_entropy:
            before = self._entropy_window_stats
            self._entropy_window_stats = entropy if before is None else before + entropy
            if update_ends:
                total, count = self.accelerator.reduce(self._entropy_window_stats, "sum").tolist()
                self._last_world_entropy, self._entropy_window_stats = total / max(count, 1.0), None
                low = self._last_world_entropy <= self.args.entropy_target
                step = self.args.entropy_coef_delta if low else -self.args.entropy_coef_delta
                lowest, highest = self.args.entropy_coef_min, self.args.entropy_coef_max
                moved = self.entropy_coef + step
                self.entropy_coef = min(moved, highest) if low else max(moved, lowest)
        if update_ends:
            self._log({"entropy_coef": self.entropy_coef})

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.update_guard is not None:
            skipped = self.update_guard.skips(model, float(norm), self.state.global_step + 1)
            self._log({"skipped_updates": float(skipped)})
        return norm
