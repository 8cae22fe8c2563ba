import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

LINE = "some words, and some more, on a line that comes again and again until the file is large\n"
READ = """
import resource, sys
from fastgpt.data.sources import read_documents
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
print(sum(len(text) for text in read_documents(sys.argv[1])), (peak() - before) * 1024)
"""
PREPARE = """
import resource, sys
from fastgpt.data.prepare import prepare
prepare(sys.argv[1], sys.argv[2], vocab_size=500, workers=2)
print(max(resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def run(code: str, *arguments: Path) -> list[int]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


@pytest.mark.parametrize("kind", ["lines.txt", "endless line.txt", "lines.jsonl.gz"])
def test_reading_100_megabytes_takes_memory_for_one_piece(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "lines.jsonl.gz":
        with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
            row = json.dumps({"text": LINE * 100}) + "\n"
            file.writelines(row for _ in range(12_000))
    else:
        with path.open("w", encoding="utf-8") as file:
            block = (LINE if kind == "lines.txt" else LINE.replace("\n", " ")) * 1000
            file.writelines(block for _ in range(1200))
    characters, growth = run(READ, path)
    assert characters > 100e6
    assert growth < 8e6


@pytest.mark.slow
def test_preparing_four_times_the_text_takes_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (80, 320):  # both above what a tokenizer is trained on
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(LINE * 1000 for _ in range(megabytes * 10**6 // (1000 * len(LINE))))
        peaks += run(PREPARE, path, tmp_path / f"out-{megabytes}")
    assert peaks[1] < 1.25 * peaks[0], f"{peaks} bytes"
