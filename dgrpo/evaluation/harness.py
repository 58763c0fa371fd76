"""The model `dgrpo` of lm-evaluation-harness: generation by denoising, multiple choice by the likelihood bound.

    python -m dgrpo.evaluation.harness --model dgrpo --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct --tasks gsm8k

The command is the harness's own with this model added (`pip install 'dgrpo[eval]'`; under `accelerate launch -m` its
requests are shared by the processes). From Python, importing this module makes `model="dgrpo"` known to
`lm_eval.simple_evaluate`.
"""

from collections import Counter
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
from accelerate.utils import gather
from tqdm.auto import tqdm
from transformers.utils import logging

from dgrpo.evaluation.answers import as_in_training, processes
from dgrpo.logprobs import log_likelihood
from dgrpo.models import load_model
from dgrpo.noise import row_keys, stream
from dgrpo.sampling import SamplerConfig, generate

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("dgrpo.evaluation.harness needs lm-evaluation-harness: pip install 'dgrpo[eval]'.") from error

logger = logging.get_logger(__name__)

# Generation settings that tasks name, and the values at which the sampler, which knows no such cut, agrees with them.
NEUTRAL = {"top_p": (1, None), "top_k": (0, -1, None), "min_p": (0, None), "num_beams": (1, None)}


def _trained_arithmetic(method):
    """The method, with the model in the arithmetic that it was trained in."""

    @wraps(method)
    def inside(self, *args, **kwargs):
        with as_in_training(self.model):
            return method(self, *args, **kwargs)

    return inside


@register_model("dgrpo")
class DiffusionLM(TemplateLM):
    """A masked diffusion model as the harness asks it. What a request gets depends on no other request.

    pretrained, adapter, revision, dtype: as in `load_model`. batch_size: completions to sample at a time.
    max_gen_toks: completion length where the task names none, denoised in blocks of `block_length` and in
    `diffusion_steps` steps (default: half as many as tokens).
    num_samples: masked views behind a likelihood, of which `pictures_per_pass` go through the network at a time.
    check_greedy: also find out whether a continuation is what greedy denoising writes, at one pass a token; only tasks
    that ask for it need it (LAMBADA's accuracy, not multiple choice).
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        block_length: int = 32,
        diffusion_steps: int | None = None,
        cfg_scale: float = 0.0,
        num_samples: int = 128,
        pictures_per_pass: int = 32,
        check_greedy: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}: give the number of texts to sample at a time, such as 32.")
        self.state = processes(device)
        self._rank, self._world_size = self.state.process_index, self.state.num_processes
        self._device = self.state.device
        # The harness says cuda:0 where nobody chose a device; of several processes each has its own.
        if self._world_size == 1 and device and torch.device(device).type == self._device.type:
            self._device = torch.device(device)
        model, self.tokenizer = load_model(pretrained, dtype, adapter=adapter, revision=revision)
        self.model: Any = model.to(self._device).eval()
        # The harness asks for it to tell one request cache from another.
        self.tokenizer_id = pretrained.replace("/", "__")
        self.batch_size, self.max_gen_toks = int(batch_size), max_gen_toks
        self.block_length, self.diffusion_steps, self.cfg_scale = block_length, diffusion_steps, cfg_scale
        self.num_samples, self.pictures_per_pass = num_samples, pictures_per_pass
        self.check_greedy, self.seed = check_greedy, seed
        limits = (
            getattr(self.model.config, name, None) for name in ("max_sequence_length", "max_position_embeddings")
        )
        self.max_length = max_length or next(filter(None, limits), 4096)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer_id

    def all_gather(self, tensor):
        return gather(tensor)

    def gather_object(self, obj, dst=0):
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        self.state.wait_for_everyone()

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None:
            # A chat template writes the token that begins a text itself.
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def _fitted(self, context: list[int], room: int) -> list[int]:
        """The context's end that leaves `room` tokens; says once that something was cut off."""
        limit = max(self.max_length - room, 1)
        if len(context) > limit:
            logger.warning_once(
                f"max_length={self.max_length}: contexts that are longer lose their beginning (the first one "
                f"{len(context) - limit} tokens)."
            )
        return (context or [self.prefix_token_id])[-limit:]

    def _log_likelihood(self, context: list[int], continuation: list[int]) -> float:
        """The bound in nats; choices of equal length after one context are compared on the same masks."""
        if not continuation:
            return 0.0
        context = self._fitted(context, len(continuation))
        [bound] = log_likelihood(
            self.model,
            torch.tensor([context], device=self.device),
            torch.tensor([continuation], device=self.device),
            # A single token has only one view.
            1 if len(continuation) == 1 else self.num_samples,
            generator=stream("lm_eval", self.seed, *context),
            batch_size=self.pictures_per_pass,
        ).tolist()
        return bound

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        """Whether greedy denoising, a token a step, writes this continuation on a canvas of its length."""
        if not continuation:
            return True
        length = len(continuation)
        prompt_ids = torch.tensor([self._fitted(context, length)], device=self.device)
        config = SamplerConfig(length, length, length, cfg_scale=self.cfg_scale, stop_at_eos=False)
        if self.model.block_length is not None:
            config = self._sampler(length, stop_at_eos=False)
        rollout = generate(self.model, prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool), config)
        tail = int(rollout.prompt_tail[0])
        return rollout.trace_ids()[0, tail : tail + length].tolist() == continuation

    @_trained_arithmetic
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        results = []
        for pair, context, continuation in tqdm(requests, "likelihoods", disable=disable_tqdm or self.rank != 0):
            bound = self._log_likelihood(context, continuation)
            result = (bound, self.check_greedy and self._is_greedy(context, continuation))
            self.cache_hook.add_partial("loglikelihood", pair, result)
            results.append(result)
        return results

    @_trained_arithmetic
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The bound on a whole text: the sum over windows of `max_length` tokens, each given what fits before it."""
        results = []
        for request in tqdm(requests, "likelihoods", disable=disable_tqdm or self.rank != 0):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            bound = sum(self._log_likelihood(*make_disjoint_window(window)) for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, bound)
            results.append(bound)
        return results

    def _settings(self, gen_kwargs: dict[str, Any]) -> tuple[list[str], int, SamplerConfig]:
        """Where a text stops, how many tokens it has at most, and its sampler; ValueError for what cannot be had."""
        settings = dict(gen_kwargs)
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        length = int(settings.pop("max_gen_toks", None) or self.max_gen_toks)
        temperature = float(settings.pop("temperature", None) or 0.0)
        if not settings.pop("do_sample", temperature > 0):
            temperature = 0.0
        refused = {name: value for name, value in settings.items() if value not in NEUTRAL.get(name, ())}
        if refused:
            raise ValueError(
                f"gen_kwargs: the sampler has no {', '.join(refused)}; it knows until, max_gen_toks, do_sample and "
                "temperature. Override them with --gen_kwargs."
            )
        config = self._sampler(length, temperature=temperature)
        return [stop for stop in stops if stop], length, config

    def _sampler(self, length: int, **settings) -> SamplerConfig:
        """The sampler of at least `length` tokens: of a block model with room for any prompt's last tokens."""
        if (block := self.model.block_length) is not None:
            canvas = -(-(length + block - 1) // block) * block
            return SamplerConfig(canvas, None, self.diffusion_steps or canvas, cfg_scale=self.cfg_scale, **settings)
        block = min(self.block_length, length)
        canvas = -(-length // block) * block
        steps = self.diffusion_steps or canvas // block * max(block // 2, 1)
        return SamplerConfig(canvas, block, steps, cfg_scale=self.cfg_scale, **settings)

    @_trained_arithmetic
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions cut off before the first of the strings at which the task stops."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [self._settings(request.args[1]) for request in requests]
        # A request that is repeated draws anew each time.
        seen: Counter[str] = Counter()
        noise = []
        for context, (_, _, config) in zip(contexts, settings, strict=True):
            key = f"{context} {config}"
            noise.append(int(row_keys(torch.tensor([seen[key]]), "lm_eval", self.seed, key)))
            seen[key] += 1
        results = [""] * len(requests)
        with tqdm(total=len(requests), desc="completions", disable=disable_tqdm or self.rank != 0) as bar:
            for batch in self._batches(contexts, [config for _, _, config in settings]):
                config = settings[batch[0]][2]
                prompts = [self._fitted(contexts[i], config.max_completion_length) for i in batch]
                padded = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
                rollout = generate(
                    self.model,
                    padded["input_ids"].to(self.device),
                    padded["attention_mask"].bool().to(self.device),
                    config,
                    row_keys=torch.tensor([noise[i] for i in batch]),
                )
                for i, ids, mask in zip(batch, rollout.completion_ids, rollout.completion_mask, strict=True):
                    stops, length, _ = settings[i]
                    text = str(self.tokenizer.decode(ids[mask][:length], skip_special_tokens=True))
                    for stop in stops:
                        text = text.split(stop, maxsplit=1)[0]
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        return results

    def _batches(self, contexts: list[list[int]], configs: list[SamplerConfig]) -> Iterable[list[int]]:
        """Numbers of requests that are sampled together: of one sampler, and of similar length, the longest first."""
        for config in dict.fromkeys(configs):
            group = [i for i, other in enumerate(configs) if other == config]
            group.sort(key=lambda i: -len(contexts[i]))
            for first in range(0, len(group), self.batch_size):
                yield group[first : first + self.batch_size]


def main() -> None:
    """The harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
