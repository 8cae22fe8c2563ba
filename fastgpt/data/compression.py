"""What general compressors reach on a text: the figure that a model's bits per byte is read beside."""

from collections.abc import Callable
from typing import Protocol

BLOCK_BYTES = 1 << 20


class Compressor(Protocol):
    """What zlib, bz2 and lzma compressors have in common."""

    def compress(self, data: bytes, /) -> bytes:
        """More of the output."""

    def flush(self) -> bytes:
        """The rest of the output."""


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits of compressed file per byte of `text` for gzip -9, bz2 -9 and xz -9e; the output is counted, not kept.

    Raises ValueError for an empty text.
    """
    if not text:
        raise ValueError("an empty text has no bits per byte")
    return {name: 8 * compressed_size(text, start()) / len(text) for name, start in compressors().items()}


def compressed_size(text: bytes, compressor: Compressor) -> int:
    """The bytes of the compressed file."""
    blocks = (compressor.compress(text[i : i + BLOCK_BYTES]) for i in range(0, len(text), BLOCK_BYTES))
    return sum(len(block) for block in blocks) + len(compressor.flush())


def compressors() -> dict[str, Callable[[], Compressor]]:
    """The strongest setting of each, by its command's name."""
    import bz2
    import lzma
    import zlib

    return {
        "gzip": lambda: zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS),  # 16: with gzip's header and trailer
        "bz2": lambda: bz2.BZ2Compressor(9),
        "xz": lambda: lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    }
