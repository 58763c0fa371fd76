"""VRPO: direct preference optimization on ELBO differences (LLaDA 1.5, arXiv:2505.19223)."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from dgrpo.trainers.sft import MaskedSFTConfig, MaskedSFTTrainer, encode, fitting


@dataclass
class VRPOConfig(MaskedSFTConfig):
    """MaskedSFTConfig and what preferences add."""

    learning_rate: float = field(default=5e-7)
    beta: float = field(default=0.2, metadata={"help": "Scale of the ELBO differences inside the sigmoid."})
    num_samples: int = field(
        default=8, metadata={"help": "Masked views of each completion; all of the budget on masks, one each."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta}: must be a positive finite number.")
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}: must be at least 1.")
        for name in ("min_ratio", "max_ratio", "token_weights", "block_schedule"):
            if (value := getattr(self, name)) != self.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value!r}: VRPO compares ELBOs of one model; leave it out.")


class VRPOTrainer(MaskedSFTTrainer):
    """Trainer whose loss is -log sigmoid(beta * (d_chosen - d_rejected)), d = the policy's ELBO - the reference's.

    Rows have `prompt`, `chosen` and `rejected`, strings or lists of messages. Policy and reference are scored on
    the same views (the paper's antithetic sampling); chosen and rejected have their own. The reference is
    the policy without its adapter, so the model must have one; its dropout is turned off, or it would be noise that
    only one of the two sees.
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
    def _encode(dataset, tokenizer, args: Any, max_length: int):
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

    def _as_reference(self) -> AbstractContextManager:
        return use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids, mask, is_open = self._texts(model, inputs)
        texts, views = (input_ids, mask), self._draw(model, is_open, self.args.num_samples)
        with self._as_reference(), torch.no_grad():
            reference = self._log_bound(model, texts, views)
        gains = self.args.beta * (self._log_bound(model, texts, views) - reference)
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
