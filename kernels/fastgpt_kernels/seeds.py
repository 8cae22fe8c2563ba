"""Seeds, and the dropout masks that PyTorch draws from them without touching its global generators.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, section 4) as a function of a
counter, so that any part of a mask can be drawn by itself, by any number of threads, on any device:

    mix(mix(seed + g) + (c + 1) g)      mix(z): z ^= z >>> 30; z *= a; z ^= z >>> 27; z *= b; z ^= z >>> 31

Its 64 bits are four lanes of 16 bits, lowest first. Element j of row i of a mask (..., C), its rows counted through,
takes lane j mod 4 of the number c = i ceil(C / 4) + j // 4, and is kept where that lane, read as an integer with a
sign, is at least 65536 r - 32768. The rate of dropping is r, a multiple of 2^-16: p to within 2^-17, and 1 - 2^-16
where that is nearer to p than 1. What is kept is scaled by 1 / (1 - r), so that the mean is that of x.

PyTorch's own generator for CPUs draws one number after the other in one thread, 7 ns for each element of a mask. These
take 0.8 ns of one thread, and have no more to do where threads are many.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgpt_kernels.checks import Seed, integer

LANES = 4  # elements that share 64 random bits
CHUNK = 163_840  # numbers for each thread: fewer would leave more of the time to the waking of threads


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


GAMMA = _signed(0x9E3779B97F4A7C15)
_A, _B = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def seed_tensor(seed: Seed, device: torch.device) -> Tensor:
    """The seed as an int64 tensor of one element on a device; written there by a fill, with no copy from the host."""
    if isinstance(seed, Tensor):
        return seed.detach().reshape(1).to(device)
    return torch.full((1,), integer(seed), dtype=torch.int64, device=device)


def origin(seed: Tensor) -> Tensor:
    """Where the counters of a seed, int64 (1,), start: what is mixed at c = 0."""
    return mix_(seed + GAMMA, torch.empty_like(seed)).add_(GAMMA)


def mix_(z: Tensor, spare: Tensor) -> Tensor:
    """SplitMix64's function of int64 numbers, in place; `spare` is overwritten, of their shape."""
    for shift, factor in ((30, _A), (27, _B), (31, None)):
        torch.bitwise_right_shift(z, shift, out=spare)
        z.bitwise_xor_(spare.bitwise_and_(2 ** (64 - shift) - 1))  # the shift repeats the sign; this takes it away
        if factor is not None:
            z.mul_(factor)
    return z


def rate(p: float) -> float:
    """The rate at which a mask drops that is asked for p."""
    # beyond 65535 the bound would not fit into 16 bits
    return min(round(65536 * p), 65535) / 65536


def lanes_(z: Tensor, spare: Tensor, p: float) -> Tensor:
    """The mask of the numbers z (..., W), contiguous: int16 (..., 4 W), -1 to keep, 0 to drop. Both are overwritten."""
    lanes = mix_(z, spare).view(torch.int16)
    return lanes.ge_(int(65536 * rate(p)) - 32768).neg_()


def rows_of(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns under which the numbers of a mask of this shape follow each other."""
    columns = shape[-1] if shape else 1
    if columns % LANES == 0:
        columns = LANES  # no number is left over at the end of a row: it may as well be cut anywhere
    return (shape.numel() // columns if columns else 0), columns


def mask_parts(shape: torch.Size, seed: Tensor, p: float) -> Iterator[tuple[slice, Tensor]]:
    """The mask of a shape in parts that stay in the cache, each overwritten by the next.

    A part is a slice of its `rows_of`, and int16 (rows, columns) as `lanes_`.
    """
    rows, columns = rows_of(shape)
    words = -(-columns // LANES)
    step = rows if seed.device.type != "cpu" else max(1, CHUNK * torch.get_num_threads() // words)
    numbers = torch.arange(min(step, rows) * words, device=seed.device).mul_(GAMMA).add_(origin(seed))
    z, spare = torch.empty_like(numbers), torch.empty_like(numbers)
    for start in range(0, rows, step or 1):
        part = slice(start, min(start + step, rows))
        count = (part.stop - start) * words
        torch.add(numbers[:count], _signed(start * words * GAMMA % 2**64), out=z[:count])
        yield part, lanes_(z[:count], spare[:count], p).view(-1, words * LANES)[:, :columns]


@torch.library.custom_op("fastgpt::keep_mask", mutates_args=())
def keep_mask(like: Tensor, seed: Tensor, p: float) -> Tensor:
    """A boolean mask in the shape of `like`, true at the rate 1 - `rate(p)`, from seed and shape alone."""
    mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    rows = mask.view(rows_of(like.shape))
    for part, kept in mask_parts(like.shape, seed, p):
        rows[part] = kept
    return mask


@keep_mask.register_fake
def _(like: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x / (1 - `rate(p)`) where the seed's mask keeps it, 0 elsewhere; autograd keeps the mask, one byte an element."""
    return torch.where(keep_mask(x.detach(), seed, p), x / (1.0 - rate(p)), 0.0)
