"""Run alone: `fastgpt train` with these words, then what PyTorch compiled and what it found compiled, as JSON.

usage: compile_program.py RESULTS KERNELS WORD...
KERNELS stands for the digest of our operations' sources; `-` leaves it.
"""

import json
import sys
from pathlib import Path
from unittest import mock

from fastgpt.cli import main

if __name__ == "__main__":
    results, kernels, *words = sys.argv[1:]
    if kernels != "-":
        mock.patch("fastgpt.engine.compiler.kernels_digest", lambda: kernels).start()
    code = main(["train", *words])
    from torch._dynamo.utils import counters

    found = {section: dict(counters[section]) for section in ("stats", "aot_autograd", "inductor")}
    Path(results).write_text(json.dumps({"code": code, **found}))
