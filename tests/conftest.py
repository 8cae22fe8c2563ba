"""What several test files share: a small corpus, a small run's settings, and the real commands."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# as the command line does, and before anything imports PyTorch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # before anything imports Triton: without a GPU its kernels run in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"

# Properties are tried on the same examples each time, so that a run tells of the code and not of its luck;
# `--hypothesis-profile exploring` tries others. No deadline: how long an example takes says how busy the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("exploring", derandomize=False, print_blob=True, deadline=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).parents[1]

TINY = """\
out: {folder}/run
model: {{n_layer: 2, n_head: 2, n_embd: 32, context: 32, vocab_size: 400, dropout: 0.1}}
data: {{path: {folder}/text.jsonl, cache: {folder}/cache, validation_fraction: 0.1}}
train: {{steps: 12, batch_tokens: 512, micro_batch_size: 2, lr: 1e-2, warmup_steps: 2, eval_every: 5, save_every: 4,
         sample_tokens: 4, eval_tokens: 1000}}
# one thread, because several tests run at once
engine: {{threads: 1}}
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what is slow on a GPU, and begin with the longest files.

    Without `slow` a GPU's run is a choice of minutes: most of its time goes into compiling. Of files that start ranks
    the last one would run while other workers have nothing left to do.
    """
    for item in items:
        if item.get_closest_marker("sweep") and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.slow)
    long = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test's tensors: the CPU, and a GPU under the marker gpu."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "cpu" and request.node.get_closest_marker("gpu"):
        pytest.skip("too large for the interpreter")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels of this process are compiled for its GPU; TRITON_INTERPRET=1 interprets them")
    return str(request.param)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, or a skip."""
    folder = Path(os.environ.get("FASTGPT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}; set FASTGPT_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings file of a run of seconds, its corpus and its cache beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    chance = random.Random(0)
    words = [f"w{i}" for i in range(500)]
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(60):
            file.write(json.dumps({"text": " ".join(chance.choices(words, k=200))}) + "\n")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder))
    return path


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For commands in processes of their own: this environment's programs, no variables of a launcher or of pytest.

    They see no GPU: what they are tested for is the same on every machine.
    """
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    left_out = (*launcher, "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if k not in left_out and not k.startswith("PYTEST_")}
    paths = [str(Path(sys.executable).parent), kept.get("PATH", "")]
    source = [str(ROOT), str(ROOT / "kernels"), kept.get("PYTHONPATH", "")]
    return kept | {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": os.pathsep.join(p for p in source if p),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command to its end, from the repository's root."""

    def run(*words: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(w) for w in words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], dict[tuple[int, str], float]]:
    """A run's losses by step and split."""

    def read(run: Path) -> dict[tuple[int, str], float]:
        records: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        table = {(r["step"], r["split"]): r["loss"] for r in records}
        assert len(table) == len(records), "a step is recorded twice"
        return table

    return read
