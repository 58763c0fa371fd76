"""Randomness as data: noise that is a function of a key, and of no global random state."""

import hashlib

import torch
from torch import Tensor


def stream(*key: int | str) -> torch.Generator:
    """A private random stream that is a function of its key alone: of no global state, batch or process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64 (multiplications wrap; the masks make its right shifts logical)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(keys: Tensor, step: int, positions: Tensor) -> Tensor:
    """Uniform noise in [0, 1), float64, a function of (row key, step, position) alone.

    keys [B] int64, positions [B, n]. A row draws the same numbers in any batch, in any order and on any process, which
    no sequential generator can promise. 53 bits: coarser noise cuts the tail off (bf16 has 256 levels).
    """
    step_key = (step + 1) * 0x1E3779B97F4A7C15 & (2**63 - 1)
    mixed = _mix(_mix(keys[:, None] + step_key) + positions * 0x3C6EF372FE94F82B)
    return ((mixed >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


def row_keys(rows: Tensor, *key: int | str) -> Tensor:
    """Noise keys [B] int64 of the rows with these global numbers [B], under a key such as (seed, round)."""
    base = int(torch.randint(2**62, (1,), generator=stream(*key)))
    return _mix(_mix(rows * 0x1E3779B97F4A7C15) + base)


def fixed_order(text: str) -> bytes:
    """Sort key of a permutation that is the same on every machine and in every version."""
    return hashlib.sha256(text.encode()).digest()
