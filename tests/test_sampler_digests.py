"""Sampled token ids and steps of over a hundred settings are those of the stored digests.

    python tests/test_sampler_digests.py    # writes tests/data/sampler_digests.json; only where a change is meant

The network is integer arithmetic on what it sees, so that no processor's rounding decides: its logits are multiples of
2^-14, and the last test moves them by 1e-6 without moving a digest.
"""

import hashlib
import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dgrpo.sampling import Rollout, SamplerConfig, denoise, generate

STORED = Path(__file__).parent / "data" / "sampler_digests.json"
VOCAB, EOS, END, MASK, PAD = 24, 21, 20, 22, 23
ROWS = 7


def mix(x: Tensor) -> Tensor:
    """Scrambled int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    return x ^ ((x >> 27) & 0x1FFFFFFFFF)


class Hashing(nn.Module):
    """A mask predictor whose logits at a position are a hash of all visible tokens and their places.

    Two layers with keys in the sampler's cache: those of the second depend on all tokens, so they go out of date.
    """

    def __init__(self, logit_shift: int = 0, noise: float = 0.0):
        super().__init__()
        self.config = SimpleNamespace(mask_token_id=MASK, vocab_size=VOCAB, eos_token_id=EOS)
        self.generation_config = SimpleNamespace(eos_token_id=[EOS, END])
        self.logit_shift, self.noise = logit_shift, noise

    def forward(
        self, ids, attention_mask=None, *, positions, position_ids=None, past_key_values=None, columns=slice(None)
    ):
        num_rows, length = ids.shape
        if position_ids is None:
            position_ids = torch.arange(length)[None]
        place = position_ids.expand(num_rows, -1)
        if attention_mask is not None:
            place = place - (~attention_mask).sum(1, keepdim=True)
        total = torch.zeros(num_rows, 1, dtype=torch.long)
        for layer in (0, 1):
            key = mix(mix(ids * 1_000_003 + place * 7919) + total)[:, None, :, None]
            if past_key_values is not None:
                key, _ = past_key_values.update(key, key, layer)
            key = key[:, 0, :, 0] if attention_mask is None else key[:, 0, :, 0] * attention_mask
            total = mix(key.sum(1, keepdim=True))
        row, column = positions // length, positions % length
        start, stop, _ = columns.indices(length)
        assert ((column >= start) & (column < stop)).all()
        seed = mix(total[row, 0] + place[row, column] * 104_729)[:, None]
        word = torch.arange(VOCAB + 2)
        # Twelve random bits and the word's number: no two words of a position are equal.
        logits = (((mix(seed + word * 15_485_863) >> 20) & 0xFFF) * 32 + word).float() / 2**14
        logits = logits * torch.tensor([0.5, 1.0, 2.0, 3.0])[(seed >> 33) & 3]
        return logits + self.noise * torch.sin(1000 * logits)


def prompts() -> tuple[Tensor, Tensor]:
    """Seven prompts of lengths 6 to 1, padded on the left; three are equal."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, END, (ROWS, 6), generator=generator)
    ids[1] = ids[2] = ids[0]
    mask = torch.arange(6) >= 6 - torch.tensor([6, 6, 6, 2, 4, 1, 5])[:, None]
    return ids.masked_fill(~mask, PAD), mask


def given_words(width: int) -> Tensor:
    """Words given in advance: none in one row, all of a block in another, parts in the rest."""
    generator = torch.Generator().manual_seed(8)
    words = torch.randint(0, END, (ROWS, width), generator=generator)
    share = torch.tensor([1.1, 0.5, 0.3, 0.8, 0.6, 0.9, 0.2])[:, None]
    free = torch.rand(ROWS, width, generator=generator) < share
    free[1, : width // 2] = False
    return words.masked_fill(free, -1)


SHAPES = {"12/6/8": (12, 6, 8), "12/12/5": (12, 12, 5), "12/4/24": (12, 4, 24), "16/4/8": (16, 4, 8)}
CACHES = {
    "": {},
    "prefix": {"cache": "prefix"},
    "prefix 2": {"cache": "prefix", "cache_refresh": 2},
    "dual": {"cache": "dual"},
    "dual 3": {"cache": "dual", "cache_refresh": 3},
}
RULES = {
    "": {},
    "threshold": {"threshold": 0.3},
    "factor": {"factor": 1.4},
    "entropy bound": {"entropy_bound": 2.0},
}
ORDERS = ("low_confidence", "random", "entropy", "topk_margin")


def settings() -> dict[str, tuple[dict, dict]]:
    """Name of each setting: fields of SamplerConfig, and what else is asked for."""
    cases: dict[str, tuple[dict, dict]] = {}

    def add(name: str, shape: str = "12/6/8", temperature: float = 0.9, extras: dict | None = None, **fields) -> None:
        length, block, steps = SHAPES[shape]
        sizes = {"max_completion_length": length, "block_length": block, "diffusion_steps": steps}
        cases[f"{name}, {shape}, T={temperature}"] = sizes | {"temperature": temperature} | fields, extras or {}

    for shape, order, temperature in product(SHAPES, ORDERS, (0.0, 0.9)):
        add(order, shape, temperature, remasking=order)
    for (cache, cached), (rule, ruled), temperature in product(CACHES.items(), RULES.items(), (0.0, 0.9)):
        if cache or rule:
            add(f"{cache} {rule}".strip(), "16/4/8" if temperature else "12/6/8", temperature, **cached, **ruled)
    for order in ORDERS[1:]:
        add(f"threshold, {order}", remasking=order, threshold=0.3)
        add(f"entropy bound, {order}", remasking=order, entropy_bound=2.0)
    for temperature in (0.3, 2.0):
        add("temperature", temperature=temperature)
    for scale, temperature in product((0.5, 2.0), (0.0, 0.9)):
        add(f"guidance {scale}", "12/4/24", temperature, cfg_scale=scale)
    add("guidance, threshold", cfg_scale=1.0, threshold=0.3)
    for switch, (rule, ruled) in product(("logits_eos_inf", "confidence_eos_eot_inf"), RULES.items()):
        add(f"{switch} {rule}".strip(), **{switch: True}, **ruled)
    for (cache, cached), (rule, ruled) in product(CACHES.items(), RULES.items()):
        add(f"not stopped {cache} {rule}".strip(), stop_at_eos=False, **cached, **ruled)
        add(f"given {cache} {rule}".strip(), extras={"given": True}, stop_at_eos=False, **cached, **ruled)
        add(f"shifted {cache} {rule}".strip(), extras={"logit_shift": 1}, **cached, **ruled)
    for size in (1, 2, 3):
        add(f"batches of {size}", "12/4/24", extras={"batch_size": size})
        add(f"batches of {size}, dual", "12/4/24", extras={"batch_size": size, "given": True}, cache="dual")
    return cases


SETTINGS = settings()


def sample(fields: dict, extras: dict, noise: float = 0.0) -> Rollout:
    config = SamplerConfig(**fields)
    row_keys = torch.randint(2**62, (ROWS,), generator=torch.Generator().manual_seed(5))
    return generate(
        Hashing(extras.get("logit_shift", 0), noise),
        *prompts(),
        config,
        row_keys=row_keys,
        fixed=given_words(config.max_completion_length) if extras.get("given") else None,
        batch_size=extras.get("batch_size"),
    )


def digest(rollout: Rollout) -> str:
    """Of integers alone: ids, which of them belong to the completion, steps, and the number of passes."""
    values = [rollout.completion_ids, rollout.completion_mask.long(), rollout.revealed_at]
    numbers = [value.tolist() for value in values] + [rollout.num_steps, rollout.num_forwards]
    return hashlib.blake2b(repr(numbers).encode(), digest_size=8).hexdigest()


@pytest.fixture(scope="module")
def rollouts() -> dict[str, Rollout]:
    return {name: sample(*case) for name, case in SETTINGS.items()}


@pytest.fixture(scope="module")
def stored() -> dict[str, str]:
    return json.loads(STORED.read_text())


def test_digests_are_those_stored(rollouts, stored):
    assert len(SETTINGS) >= 80
    assert {name: digest(rollout) for name, rollout in rollouts.items()} == stored


def test_settings_differ_and_rows_end_at_different_places(rollouts):
    # Some agree by right, such as a threshold in batches of any size.
    assert len({digest(rollout) for rollout in rollouts.values()}) > 0.8 * len(SETTINGS)
    assert sum(len(each.completion_mask.sum(1).unique()) > 2 for each in rollouts.values()) > 0.5 * len(SETTINGS)


@pytest.mark.slow
def test_rounding_decides_no_digest(stored):
    for name, case in SETTINGS.items():
        assert digest(sample(*case, noise=1e-6)) == stored[name], name


@pytest.mark.slow
def test_one_wrong_draw_or_order_shows_in_the_digests(monkeypatch, stored):
    right = denoise.uniform
    monkeypatch.setattr(denoise, "uniform", lambda keys, step, positions: right(keys, step + (step == 3), positions))
    assert sum(digest(sample(*case)) != stored[name] for name, case in SETTINGS.items()) > 0.3 * len(SETTINGS)


if __name__ == "__main__":
    STORED.write_text(json.dumps({name: digest(sample(*case)) for name, case in SETTINGS.items()}, indent=1) + "\n")
