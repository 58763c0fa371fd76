"""diffu-GRPO: the difference between a masked diffusion policy and trl.GRPOTrainer.

Letters: B rollouts of this process, G rollouts of one prompt, P prompt tokens, C completion tokens, L = P + C,
N masked views, mu inner updates per rollout batch.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict, use_adapter

from dgrpo.logprobs import ViewScores, mean_entropy, score_views
from dgrpo.noise import stream
from dgrpo.objectives import DRAWS, WITHOUT_RATIO, ObjectiveInputs, kl_k1, kl_k3
from dgrpo.sampling import Rollout
from dgrpo.trainers.checkpoints import ExactResume
from dgrpo.trainers.config import DiffuGRPOConfig
from dgrpo.trainers.data import EpochSampler, without_long_prompts
from dgrpo.trainers.guards import CollapseGuard, SkipsBadUpdates
from dgrpo.trainers.plugins import configured_estimator, configured_objective
from dgrpo.trainers.rewards import check_columns, guarded
from dgrpo.trainers.rollouts import DenoisesRollouts
from dgrpo.views import MaskedViews


class DiffuGRPOTrainer(DenoisesRollouts, ExactResume, SkipsBadUpdates, GRPOTrainer):
    """trl.GRPOTrainer for mask predictors. What differs, method by method:

    `_generate_single_turn` denoises instead of generating left to right and draws the masked views of the rollouts;
    `_generate_and_score_completions` puts the full canvases and the views into the batch;
    `_prepare_inputs` keeps groups together, scores old and reference log-probabilities for each inner iteration, and
    hands out the iteration's slice; `_get_per_token_logps_and_entropies` scores under masked views.
    Rewards, advantages, loss and logging are TRL's.
    """

    args: DiffuGRPOConfig
    _tag_names = ["trl", "grpo", "dgrpo"]

    def __init__(
        self,
        model,
        reward_funcs,
        args: DiffuGRPOConfig,
        train_dataset,
        eval_dataset=None,
        processing_class=None,
        callbacks: list | None = None,
        optimizers=(None, None),
        peft_config=None,
        estimator: Callable[..., MaskedViews] | None = None,
    ):
        if isinstance(model, str):
            raise ValueError(f"model={model!r}: pass the model itself, as dgrpo.load_model({model!r}) returns it.")
        if args.kl == "exact" and peft_config is None and not isinstance(model, PeftModel):
            raise ValueError("kl='exact' needs a head that is not trained: give a peft_config, or set kl='k3'.")
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        check_columns(reward_funcs, train_dataset.column_names)
        is_module = [isinstance(reward, torch.nn.Module | str) for reward in reward_funcs]
        reward_funcs = [
            reward if module else guarded(reward, args.reward_timeout)
            for reward, module in zip(reward_funcs, is_module, strict=True)
        ]
        if args.max_prompt_length is not None:
            train_dataset = without_long_prompts(
                train_dataset, processing_class, args.max_prompt_length, args.chat_template_kwargs
            )
        self._rollout: Rollout | None = None
        self._views: tuple[Tensor, Tensor] | None = None
        self._loss_inputs: dict | None = None
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if self._tokenizer.mask_token_id is None:
            raise ValueError("processing_class: the tokenizer has no mask token; load it with dgrpo.load_model.")
        if args.collapse_window:
            self.add_callback(CollapseGuard(args.collapse_window, args.stop_on_collapse))
        self.sampler_config = args.sampler()
        self.estimator = estimator or configured_estimator(args)
        self.objective = None if args.objective is None else configured_objective(args)
        self._check_parallelism()

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

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        sampler = EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.generate_every,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )
        sampler.set_epoch(0)
        return sampler

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        started = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._metrics[self._mode]["time/rewards"].append(time.perf_counter() - started)
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        rollout, (hidden, weights) = self._rollout, self._views
        completion_mask = rollout.completion_mask
        hidden, weights = hidden.to(completion_mask.device), weights.to(completion_mask.device)
        if self.mask_truncated_completions:
            ended = torch.isin(rollout.completion_ids, torch.tensor(self.eos_token_ids, device=completion_mask.device))
            completion_mask = completion_mask & ended.any(1, keepdim=True)
            weights = weights * completion_mask[:, None, None]
        # TRL cuts completions at their end and pads to the longest; the canvas has all C positions, or its length
        # would tell the model how long the answer is.
        batch |= {"completion_ids": rollout.completion_ids, "completion_mask": completion_mask.long()}
        batch |= {"hidden": hidden, "weights": weights}
        # The trace: for estimators and objectives of one's own, and for whoever looks into a checkpoint's batch.
        trace = {name: getattr(rollout, name) for name in ("revealed_at", "confidence", "entropy")}
        batch |= {"group": rollout.group, **trace}
        self._rollout = self._views = None
        return batch

    def _prepare_inputs(self, generation_batch):
        if self._mode == "eval":
            batch = self._generate_and_score_completions(generation_batch)
            return self._slice(self._with_reference(batch), 0)
        if self._step % self.generate_every == 0 or self._buffered_inputs is None:
            batch = self._shuffled(self._generate_and_score_completions(generation_batch))
            started = time.perf_counter()
            parts = split_tensor_dict(batch, self.args.steps_per_generation)
            self._buffered_inputs = [self._with_reference(self._with_old(part)) for part in parts]
            self._metrics["train"]["time/scoring"].append(time.perf_counter() - started)
        steps = self.args.steps_per_generation
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
        """Inner iterations that are over before the first optimizer step: their old policy is the current one."""
        accumulation, steps = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        aligned = self.generate_every % accumulation == 0 or accumulation % self.generate_every == 0
        return min(accumulation // steps, self.num_iterations) if aligned else 0

    def _with_old(self, batch: dict) -> dict:
        """`batch` with old_per_token_logps [B, mu, C] of this policy; skipped iterations are left at 0."""
        first = self._draws_before_update
        if first >= self.num_iterations or self.args.objective in WITHOUT_RATIO:
            return batch
        per_view = self._logps_of_draws(self.model, batch, first)
        old = {"old_per_token_logps": (batch["weights"] * per_view).sum(2)}
        if self.args.objective == "bgpo":
            old["old_logps_per_view"] = per_view
        return batch | old

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
        """Whether the KL is a metric only; without an adapter there is no reference model to compare with."""
        return (
            self.args.log_kl
            and self.args.beta == 0.0
            and isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        )

    @torch.no_grad()
    def _logps_of_draws(self, model, batch: dict, first: int = 0) -> Tensor:
        """[B, mu, N, C]: each draw in a call of its own, on the rows of the update, so that rounding agrees."""
        logps = torch.zeros_like(batch["weights"])
        for draw in range(first, logps.shape[1]):
            logps[:, draw] = self._score(
                model, batch, MaskedViews(batch["hidden"][:, draw], batch["weights"][:, draw])
            )[0]
        return logps

    def _score(self, model, batch: dict, views: MaskedViews, as_reference=None) -> ViewScores:
        """log p(token | picture) under `views`, [B, N, C], the entropies and, against a reference, the KL there."""
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

    def _slice(self, batch: dict, iteration: int) -> dict:
        """What one inner iteration sees of the batch."""
        inputs = dict(batch)
        for key in ("hidden", "weights", "old_per_token_logps", "old_logps_per_view", "ref_per_token_logps"):
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
        return not (self.args.beta != 0.0 or self._entropy_drives_the_loss or self.args.objective)

    @property
    def _entropy_drives_the_loss(self) -> bool:
        return self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0

    def _compute_loss(self, model, inputs):
        if self.args.objective is not None:
            return self._objective_loss(model, inputs)
        self._loss_inputs = inputs
        # TRL's own KL term is the estimate from sampled tokens.
        self.beta = self.args.beta if self.args.kl == "k3" else 0.0
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs, self.beta = None, self.args.beta
        if self.args.kl == "exact":
            accumulated = self.current_gradient_accumulation_steps if self._mode == "train" else 1.0
            loss = loss + self.beta * self._divergence / accumulated
            self._metrics[self._mode]["kl"].append(self.accelerator.gather(self._divergence.detach()).mean().item())
        if self._metrics[self._mode]["entropy"][-1] == 0.0:
            # Every row was skipped, on all processes: not an entropy of 0, but none.
            self._metrics[self._mode]["entropy"].pop()
        return loss

    def _objective_loss(self, model, inputs: dict) -> Tensor:
        """The loss of `args.objective`, averaged over the accumulated micro-batches; its metrics are logged."""
        views = MaskedViews(inputs["hidden"], inputs["weights"])
        logps, entropies, _ = self._score(model, inputs, views)
        batch = ObjectiveInputs(
            logps_per_view=logps,
            weights=views.weights,
            old_logps=inputs.get("old_per_token_logps"),
            ref_logps=inputs.get("ref_per_token_logps"),
            advantages=inputs["advantages"],
            completion_mask=inputs["completion_mask"].bool(),
            group=inputs["group"],
            old_logps_per_view=inputs.get("old_logps_per_view"),
        )
        loss, found = self.objective(batch)
        if self._watches_kl:
            self._log_kl(batch.logps, inputs)
        scored = (views.weights != 0).any(1)
        found = found | {"entropy": mean_entropy(entropies, views).detach().sum() / scored.sum().clamp(min=1)}
        for name, value in found.items():
            name = {"clip_ratio": "clip_ratio/region_mean"}.get(name, name)
            self._metrics[self._mode][name].append(self.accelerator.gather(value.detach().float()).mean().item())
        return loss / (self.current_gradient_accumulation_steps if self._mode == "train" else 1.0)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        # While rollouts are being scored TRL asks for log-probabilities of its own, cut canvas; `_prepare_inputs`
        # computes them on the full one afterwards.
        if self._loss_inputs is None:
            return None, None, None
        inputs = self._loss_inputs
        views = MaskedViews(inputs["hidden"], inputs["weights"])
        as_reference = self._as_reference if self.args.kl == "exact" else None
        per_view, entropies_per_view, divergences = self._score(model, inputs, views, as_reference)
        if divergences is not None:
            self._divergence = (views.weights * divergences).sum() / views.weights.sum().clamp(min=1)
        logps, entropies = (views.weights * per_view).sum(1), mean_entropy(entropies_per_view, views)
        if self._watches_kl:
            self._log_kl(logps, inputs)
        if not self._entropy_drives_the_loss:
            # A metric only, which TRL averages over all tokens: those that no picture scored take the others' average.
            scored = (views.weights != 0).any(1)
            total, count = self.accelerator.reduce(torch.stack([entropies.sum(), scored.sum()]), "sum")
            entropies = torch.where(scored, entropies, total / count.clamp(min=1))
        return logps, entropies, None

    def _log_kl(self, logps: Tensor, inputs: dict) -> None:
        """Logs the KL to the reference per scored token; nothing where every row was skipped."""
        scored, reference = (inputs["weights"] != 0).any(1), inputs["ref_per_token_logps"]
        if self.args.estimator in DRAWS:
            # Weighted terms mean something only once summed, which the plain log-ratio is.
            divergence, count = kl_k1(logps.detach(), reference), inputs["weights"].sum()
        else:
            divergence, count = kl_k3(logps.detach(), reference), scored.sum()
        total, count = self.accelerator.reduce(torch.stack([(divergence * scored).sum(), count]), "sum").tolist()
        if count:
            self._metrics[self._mode]["kl"].append(total / count)
