"""One group of rollouts, a model and its reference: what the cases of `speed.py` do, by the textbook or by dgrpo."""

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import textbook
import torch
from peft import LoraConfig, get_peft_model

from dgrpo import MaskedViews, SamplerConfig, generate, per_token_logps
from dgrpo.estimators import one_step
from dgrpo.models.families import FAMILIES
from dgrpo.models.llada import LLaDAConfig, LLaDAModelLM
from dgrpo.noise import stream

P_MASK_PROMPT = 0.15


@dataclass(frozen=True)
class Shape:
    """What is run: prompt and completion, batch of the rollout cases, and the group that is scored."""

    prompt: int
    sampler: SamplerConfig
    batch: int
    group: int = 6
    draws: int = 12


def shape_of(model: str, vocab: int) -> Shape:
    if model == "8b":
        return Shape(200, SamplerConfig(256, 32, 128, stop_at_eos=False), batch=6)
    if vocab > 100_000:
        return Shape(50, SamplerConfig(64, 8, 32, stop_at_eos=False), batch=1)
    return Shape(100, SamplerConfig(128, 16, 64, stop_at_eos=False), batch=2 if vocab < 10_000 else 1)


class Bench:
    """Model, reference and a group of rollouts: everything that the cases share."""

    def __init__(self, name: str, vocab: int, device: str):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.shape = shape_of(name, vocab)
        special = {"mask_token_id": vocab - 1, "eos_token_id": vocab - 2, "pad_token_id": vocab - 2}
        if name == "8b":
            config = LLaDAConfig(mlp_hidden_size=12288)
            with torch.device(self.device):
                torch.set_default_dtype(torch.bfloat16)
                model = LLaDAModelLM(config)
                torch.set_default_dtype(torch.float32)
            lora = LoraConfig(r=128, lora_alpha=64, target_modules=FAMILIES["llada"].lora_targets)
            self.model = get_peft_model(model, lora, autocast_adapter_dtype=False)
            self.network = self.model.get_base_model()
            self.reference, self.reference_context = self.model, self.model.disable_adapter
        else:
            small = {"d_model": 256, "n_layers": 6, "n_heads": 8, "mlp_hidden_size": 768, "init_std": 0.05}
            config = LLaDAConfig(**small, vocab_size=vocab, max_sequence_length=512, rope_theta=10000.0, **special)
            self.model = self.network = LLaDAModelLM(config).to(self.device)
            self.reference, self.reference_context = copy.deepcopy(self.model), nullcontext
            self.network.get_input_embeddings().requires_grad_(False)
            self.network.get_output_embeddings().requires_grad_(False)
        self.model.eval()
        self.start = copy.deepcopy({n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad})

    @property
    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def reset(self) -> None:
        """Weights and gradients as at the start: every repeat does the same work."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(self.start[name])
                parameter.grad = None

    def prompts(self, num_rows: int) -> torch.Tensor:
        """One prompt, `num_rows` times."""
        generator = torch.Generator().manual_seed(1)
        row = torch.randint(self.network.config.vocab_size - 2, (1, self.shape.prompt), generator=generator)
        return row.repeat(num_rows, 1).to(self.device)

    def rollouts(self, num_rows: int):
        """A group's rollouts as scoring meets them: 60 % of the completion lies before the end on average."""
        generator = torch.Generator().manual_seed(2)
        length = self.shape.sampler.max_completion_length
        ids = torch.randint(self.network.config.vocab_size - 2, (num_rows, length), generator=generator)
        ends = torch.linspace(0.2, 1.0, num_rows).mul(length).long()
        mask = torch.arange(length) < ends[:, None]
        ids = ids.where(mask, self.network.config.eos_token_id)
        prompt = self.prompts(num_rows)
        return SimpleNamespace(
            prompt_ids=prompt,
            prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
            completion_ids=ids.to(self.device),
            completion_mask=mask.to(self.device),
            group=torch.zeros(num_rows, dtype=torch.long, device=self.device),
        )

    def sample(self, how: str, temperature: float, rows: int, cache: str | None = None, steps: int | None = None):
        config = replace(self.shape.sampler, temperature=temperature, cache=cache)
        if steps is not None:
            config = replace(config, diffusion_steps=steps * config.num_blocks)
        prompt = self.prompts(rows)
        if how == "textbook":
            return textbook.generate(self.network, prompt, config)
        generator = torch.Generator().manual_seed(3)
        mask = torch.ones_like(prompt, dtype=torch.bool)
        return generate(self.network, prompt, mask, config, generator=generator).completion_ids

    def views(self, rollout, scope: str, num_draws: int) -> list[MaskedViews]:
        """The masks of the inner iterations: prompts masked once for the group, or each row's on its own."""
        settings = {"p_mask_prompt": P_MASK_PROMPT, "prompt_mask_scope": scope}
        return [one_step(rollout, generator=stream("benchmark", draw), **settings) for draw in range(num_draws)]

    def logps(self, how: str, model, rollout, views: MaskedViews) -> torch.Tensor:
        """[B, C] log-probabilities under one draw, by the textbook or by dgrpo."""
        if how == "textbook":
            return textbook.token_logps(model, self.inputs(rollout, views), rollout.completion_ids)
        return per_token_logps(model, rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, views)

    def inputs(self, rollout, views: MaskedViews) -> torch.Tensor:
        width = rollout.prompt_ids.shape[1]
        length = rollout.completion_ids.shape[1]
        mask_id = self.network.config.mask_token_id
        return textbook.masked_prompts(rollout.prompt_ids, views.hidden[:, 0, :width], mask_id, length)

    def score(self, how: str, scope: str, group: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward and backward of one update's log-probabilities; what came out, for comparison."""
        rollout = self.rollouts(group)
        (views,) = self.views(rollout, scope, 1)
        logps = self.logps(how, self.model, rollout, views) * rollout.completion_mask
        advantages = torch.linspace(-1, 1, group, device=self.device)[:, None]
        (logps * advantages).sum().backward()
        return logps.detach(), [p.grad for p in self.model.parameters() if p.requires_grad]

    def old_and_reference(self, how: str, scope: str) -> None:
        """Old and reference log-probabilities of four inner iterations, as the memory cases ask for them."""
        rollout = self.rollouts(self.shape.group)
        draws = self.views(rollout, scope, 4)
        self.frozen_logps(how, self.model, rollout, draws)
        with self.reference_context():
            self.frozen_logps(how, self.reference, rollout, draws)

    @torch.no_grad()
    def frozen_logps(self, how: str, model, rollout, draws: list[MaskedViews]) -> list[torch.Tensor]:
        """[B, C] for each draw; the textbook stacks the draws."""
        if how == "textbook":
            inputs = torch.stack([self.inputs(rollout, views) for views in draws])
            return list(textbook.stacked_logps(model, inputs, rollout.completion_ids))
        return [self.logps(how, model, rollout, views) for views in draws]

    def cycle(self, how: str, cache: str | None = None) -> None:
        """Rollouts of one group at T=0.9, old and reference log-probabilities, and the updates."""
        rollout = self.rollouts(self.shape.group)
        sampled = self.sample(how, 0.9, self.shape.group, cache)
        rollout.completion_ids = sampled.where(rollout.completion_mask, self.network.config.eos_token_id)
        self.update(how, rollout, self.views(rollout, "row" if how == "textbook" else "group", self.shape.draws))

    def update(self, how: str, rollout, draws: list[MaskedViews]) -> list[float]:
        """The inner iterations on one group of rollouts; their losses."""
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)
        advantages = torch.linspace(-1, 1, len(rollout.completion_ids), device=self.device)
        # Before the first update the policy has not moved: ours takes the old log-probabilities from the update.
        skipped = 0 if how == "textbook" else 1
        old = [None] * skipped + self.frozen_logps(how, self.model, rollout, draws[skipped:])
        with self.reference_context():
            reference = self.frozen_logps(how, self.reference, rollout, draws)
        losses = []
        for views, old_logps, reference_logps in zip(draws, old, reference, strict=True):
            logps = self.logps(how, self.model, rollout, views)
            old_logps = logps.detach() if old_logps is None else old_logps
            loss = textbook.loss_of(logps, old_logps, reference_logps, advantages, rollout.completion_mask)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses
