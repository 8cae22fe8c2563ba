"""The checkpoints of one run: each is committed whole or not at all, and a damaged one is passed over.

    checkpoints/step-00000200/     manifest.json, state-*.safetensors + .json, model/
    checkpoints/latest             the name of the newest one, replaced last

A checkpoint is built in `.partial-step-...`, flushed to the disk, given its manifest, and renamed. So a folder named
`step-...` was whole when it was written; its hashes tell whether it still is.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safetensors import SafetensorError

from fastgpt.checkpoint.manifest import NAME as MANIFEST
from fastgpt.checkpoint.manifest import Manifest, describe, read_manifest, verify, write_manifest
from fastgpt.errors import SharedError, UserError
from fastgpt.files import sync, sync_tree, write_atomically

LATEST = "latest"
log = logging.getLogger(__name__)


class Barrier(Protocol):
    """The ranks of a run, as far as saving together needs them."""

    rank: int

    def barrier(self) -> None:
        """Wait for every rank."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in order of rank."""


class Checkpoint(NamedTuple):
    """A checkpoint whose files agree with its manifest."""

    folder: Path
    step: int
    state: dict[str, Any]


class CheckpointStore:
    """The folder `checkpoints` of a run."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def names(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        return sorted(p.name for p in self.folder.glob("step-*") if p.is_dir())

    def save(self, step: int, state: dict[str, Any], writes: Sequence[Callable[[Path], None]], ranks: Barrier) -> Path:
        """Commit a checkpoint; every rank of the run calls this together.

        Args:
            step: updates done.
            state: JSON values kept in the manifest (rank 0's count).
            writes: each writes files of this rank's into the folder it is given. The ranks wait for each other after
                each one, and where one has failed none goes on to the next, which may be collective.
            ranks: the ranks that save together.

        Raises:
            SharedError: a rank could not write; earlier checkpoints are untouched.
        """
        name = f"step-{step:08d}"
        partial, final = self.folder / f".partial-{name}", self.folder / name
        if ranks.rank == 0:
            for leftover in self.folder.glob(".partial-*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        ranks.barrier()
        for write in writes:
            outcomes = ranks.gather(_attempt(write, partial))
            problems = [f"rank {rank}: {problem}" for rank, problem in enumerate(outcomes) if problem]
            if problems:
                if ranks.rank == 0:
                    shutil.rmtree(partial)
                raise SharedError(
                    f"{final}: cannot be written ({'; '.join(problems)}). "
                    "Earlier checkpoints are untouched; the same command goes on from the newest"
                )
        # all have written, so that no temporary file of another rank's can be among the names
        parts = ranks.gather(_describe_own(partial, ranks.rank))
        if ranks.rank == 0:
            files = {path: facts for part in parts for path, facts in part.items()}
            write_manifest(partial, Manifest(step, state, files))
            sync_tree(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync(self.folder)
            write_atomically(self.folder / LATEST, name + "\n")
            self._forget_others(name)
        ranks.barrier()
        return final

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None where there has never been one.

        `latest` is a hint for people and other programs: the folders themselves decide, so that a missing or damaged
        `latest` loses nothing. Each checkpoint passed over is logged with what is wrong with it.

        Raises:
            UserError: there are checkpoints, and not one of them is whole.
        """
        problems = []
        for name in reversed(self.names()):
            try:
                return self.open(name)
            except UserError as problem:
                log.warning("passing over a damaged checkpoint: %s", problem)
                problems.append(str(problem))
        if problems:
            raise UserError(
                f"{self.folder}: none of its checkpoints is whole ({problems[0]}). "
                "Restore one, or choose another 'out' to start anew"
            )
        return None

    def pointed(self) -> Path:
        """The checkpoint that `latest` names, or where it is missing or damaged the newest; nothing is hashed.

        Raises:
            UserError: there is no checkpoint.
        """
        committed = [name for name in self.names() if (self.folder / name / MANIFEST).is_file()]
        if not committed:
            raise UserError(
                f"{self.folder}: no checkpoint yet; `fastgpt train` writes one every train.save_every updates"
            )
        latest = self.folder / LATEST
        name = latest.read_bytes().decode("utf-8", errors="replace").strip() if latest.is_file() else ""
        if name not in committed:
            name = committed[-1]
            log.warning("%s names no whole checkpoint; taking the newest, %s", latest, name)
        return self.folder / name

    def open(self, name: str) -> Checkpoint:
        """A checkpoint by name, every file checked against its hash."""
        manifest = verify(self.folder / name)
        return Checkpoint(self.folder / name, manifest.step, manifest.state)

    def newest_step(self) -> int:
        """The step of the newest checkpoint whose manifest can be read, 0 where there is none; nothing is hashed."""
        for name in reversed(self.names()):
            try:
                return read_manifest(self.folder / name).step
            except UserError:
                continue
        return 0

    def _forget_others(self, newest: str) -> None:
        """Drop what is older than `keep` checkpoints, and later steps: the run went back past them as damaged."""
        names = self.names()
        kept = [name for name in names if name <= newest][-self._keep :]
        for name in set(names) - set(kept):
            # renamed first, so that a crash in the middle leaves no half-deleted checkpoint under a good name
            doomed = self.folder / f".partial-old-{name}"
            (self.folder / name).rename(doomed)
            shutil.rmtree(doomed)


def _attempt(write: Callable[[Path], None], folder: Path) -> str | None:
    """Write, and say what went wrong: it is told to all ranks, so that none waits for ever."""
    try:
        write(folder)
    except (OSError, SafetensorError) as problem:
        return str(problem)
    return None


def _describe_own(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Flush and hash this rank's files: their names carry its number, and those without a number are rank 0's."""
    mine = sorted(p for p in folder.rglob("*") if p.is_file() and _writer(p) == rank)
    for path in mine:
        sync(path)
    return describe(folder, mine)


def _writer(path: Path) -> int:
    """The rank that wrote a file: the number in `state-00003.json`, else rank 0."""
    number = path.stem.rpartition("-")[2]
    return int(number) if path.stem.startswith("state-") and number.isdigit() else 0
