"""Seeds derived from seeds: the same on every machine, rank and device."""

_MASK = 2**64 - 1


def fold(seed: int, *data: int) -> int:
    """A seed in [0, 2^63) that depends on `seed` and on each of `data`, in their order.

    Neighbouring arguments give unrelated seeds: each argument passes through splitmix64 (Steele, Lea and Flood, "Fast
    Splittable Pseudorandom Number Generators", 2014). Integers count modulo 2^64.
    """
    state = _splitmix64(seed)
    for item in data:
        state = _splitmix64(state ^ item)
    return state >> 1


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
