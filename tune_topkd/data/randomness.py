"""Random numbers from a counter-based hash in integer arithmetic: without a state, and the same on every device."""

import torch
from torch import Tensor

SPLIT, ORDER, VIEW, DETAIL, SAMPLE = range(5)
"""Streams: numbers that are drawn for different purposes are independent."""

DRAW_BITS = 20
DRAW = 2**DRAW_BITS - 1


def random_order(size: int, seed: int, epoch: int, stream: int, device: torch.device) -> Tensor:
    """A permutation of the numbers below `size`, a function of (seed, epoch, stream): `(size,)` int64."""
    bits = random_bits(torch.arange(size, device=device), seed, epoch, stream)
    return bits.argsort(stable=True)


def random_bits(indices: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    """64 random bits for each index, `(B,)` int64: a hash of (seed, epoch, stream, index)."""
    key = torch.zeros((), dtype=torch.int64)
    for word in (seed, epoch, stream):
        key = mixed(key + signed(word))
    return mixed(indices * signed(0x9E3779B97F4A7C15) + key.item())


def mixed(z: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): int64 products wrap around as unsigned ones do."""
    z = z + signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def signed(word: int) -> int:
    """The low 64 bits of a whole number, as int64 has them."""
    word &= 2**64 - 1
    return word - 2**64 if word >> 63 else word


def _shifted(z: Tensor, bits: int) -> Tensor:
    return z >> bits & (1 << 64 - bits) - 1  # >> alone copies the sign
