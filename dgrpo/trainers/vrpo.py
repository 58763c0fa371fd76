"""VRPO: direct preference optimization on ELBO differences (LLaDA 1.5, arXiv:2505.19223)."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from dgrpo.logprobs import scoring_pass
from dgrpo.trainers.sft import MaskedSFTConfig, MaskedSFTTrainer, encode, fitting


@dataclass
class VRPOConfig(MaskedSFTConfig):
    """MaskedSFTConfig and what preferences add."""

    learning_rate: float = field(default=5e-7)
    beta: float = field(default=0.2, metadata={"help": "Scale of the ELBO differences inside the sigmoid."})
    num_samples: int = field(
        default=8, metadata={"help": "Masked pictures of each completion; all of the budget on masks, one each."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta}: must be a positive finite number.")
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}: must be at least 1.")


def draw_masks(is_completion: Tensor, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden positions [n, B, L] of `num_samples` pictures of each row, and each picture's weight C/(n l), [n, B].

    A row's counts l of hidden tokens are uniform in {1..C} over its own C completion tokens, stratified over the
    pictures; every subset of that size is equally likely. `is_completion` [B, L].
    """
    num_rows = len(is_completion)
    length = is_completion.sum(1)
    spaced = (torch.rand(1, num_rows, generator=generator) + torch.arange(num_samples)[:, None]) / num_samples
    counts = (spaced.to(length.device) * length).long().clamp(max=length - 1) + 1
    noise = torch.rand(num_samples, *is_completion.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(length.device).masked_fill(~is_completion, 2.0)
    return noise.argsort(-1).argsort(-1) < counts[..., None], length / (num_samples * counts)


class VRPOTrainer(MaskedSFTTrainer):
    """Trainer whose loss is -log sigmoid(beta * (d_chosen - d_rejected)), d = the policy's ELBO - the reference's.

    Rows have `prompt`, `chosen` and `rejected`, strings or lists of messages. Policy and reference see the same
    pictures (the paper's antithetic sampling); chosen and rejected completions have their own. The reference is the
    policy without its adapter, so the model must have one; its dropout is turned off, or it would be noise that only
    one of the two sees.
    """

    args: VRPOConfig
    columns = ("prompt", "chosen", "rejected")

    def __init__(self, model, args: VRPOConfig, train_dataset, processing_class, eval_dataset=None, **kwargs):
        if not isinstance(model, PeftModel):
            raise ValueError("model: VRPO compares the policy with itself without its adapter; wrap it in one (peft).")
        disable_dropout_in_model(model)
        super().__init__(model, args, train_dataset, processing_class, eval_dataset, **kwargs)
        self._preferences: dict[str, list[float]] = {}

    @staticmethod
    def _encode(dataset, tokenizer, args: VRPOConfig, max_length: int):
        def both(row: dict) -> dict:
            sides: dict[str, list[int]] = {}
            for side in ("chosen", "rejected"):
                ids = encode({"prompt": row["prompt"], "completion": row[side]}, tokenizer, args.completion_canvas)
                sides |= {f"{side}_{name}": value for name, value in ids.items()}
            return sides

        encoded = dataset.map(both, remove_columns=dataset.column_names)
        return fitting(encoded, max_length, ("chosen_", "rejected_"))

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """The chosen rows, then the rejected ones, as MaskedSFTTrainer collates them."""
        names = ("prompt_ids", "completion_ids")
        sides = [{name: row[f"{side}_{name}"] for name in names} for side in ("chosen", "rejected") for row in rows]
        return super()._collate(sides)

    def _elbo(self, model, inputs: dict[str, Tensor], hidden: Tensor, weights: Tensor) -> Tensor:
        """Evidence lower bound of each completion in nats, [B]; each picture goes through the network on its own."""
        input_ids = inputs["input_ids"]
        attention_mask = None if inputs["attention_mask"].all() else inputs["attention_mask"]
        mask_id = self.processing_class.mask_token_id
        asked = [
            scoring_pass(input_ids.masked_fill(picture, mask_id), attention_mask, input_ids, picture)
            for picture in hidden
        ]
        scores = model(passes=[each for each, _ in asked])
        total = weights.new_zeros(len(input_ids))
        for (_, answer), score, weight in zip(asked, scores, weights, strict=True):
            rows = answer // input_ids.shape[1]
            total = total.index_add(0, rows, score.logps * weight[rows])
        return total

    def _as_reference(self) -> AbstractContextManager:
        return use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden, weights = draw_masks(inputs["is_completion"], self.args.num_samples, self._generator())
        with self._as_reference(), torch.no_grad():
            reference = self._elbo(model, inputs, hidden, weights)
        gains = self.args.beta * (self._elbo(model, inputs, hidden, weights) - reference)
        chosen, rejected = gains.chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        found = {"accuracy": (chosen > rejected).float().mean(), "margin": (chosen - rejected).mean()}
        found |= {"chosen": chosen.mean(), "rejected": rejected.mean()}
        for name, value in found.items():
            value = self.accelerator.gather(value.detach()).mean().item()
            prefix = "" if model.training else "eval_"
            self._preferences.setdefault(f"{prefix}preference/{name}", []).append(value)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        evaluated = any(name.startswith("eval_") for name in logs)
        shown = [name for name in self._preferences if name.startswith("eval_") == evaluated]
        values = {name: self._preferences.pop(name) for name in shown}
        super().log(logs | {name: sum(found) / len(found) for name, found in values.items()}, *args, **kwargs)
