import bz2
import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from fastgpt.data.compression import compressed_bits_per_byte

TEXT = Path(__file__).read_bytes() * 700  # more than a block


def test_sizes_are_those_of_the_files_that_python_writes() -> None:
    assert compressed_bits_per_byte(TEXT) == {
        "gzip": 8 * len(gzip.compress(TEXT, 9)) / len(TEXT),
        "bz2": 8 * len(bz2.compress(TEXT, 9)) / len(TEXT),
        "xz": 8 * len(lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME)) / len(TEXT),
    }


@pytest.mark.skipif(shutil.which("gzip") is None, reason="there is no gzip command")
def test_gzip_is_that_of_the_command() -> None:
    packed = subprocess.run(["gzip", "-9", "-n"], input=TEXT, capture_output=True, check=True).stdout
    ours = compressed_bits_per_byte(TEXT)["gzip"] * len(TEXT) / 8
    assert gzip.decompress(packed) == TEXT
    assert abs(ours - len(packed)) <= 0.02 * len(packed)  # builds of zlib differ a little


def test_random_bytes_do_not_shrink() -> None:
    import random

    figures = compressed_bits_per_byte(random.Random(1).randbytes(100_000))
    assert list(figures) == ["gzip", "bz2", "xz"]
    assert all(8 < bits < 8.1 for bits in figures.values())


def test_an_empty_text_has_no_figure() -> None:
    with pytest.raises(ValueError, match="empty text"):
        compressed_bits_per_byte(b"")
