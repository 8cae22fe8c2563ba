"""The run folder: which one a command works in, and what it goes on from.

config.yaml   metrics.jsonl   tensorboard/   checkpoints/   summary.json
"""

import fcntl
import logging
import os
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from fastgpt.checkpoint.store import Checkpoint, CheckpointStore
from fastgpt.config import Config, flatten
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import UserError
from fastgpt.files import write_atomically
from fastgpt.finetune_config import FinetuneConfig
from fastgpt.settings import dump_config, read_settings

log = logging.getLogger(__name__)

# What `auto` came to is kept at a resume, for those settings that decide the numbers.
RESOLVED = {"engine.precision": "auto", "kernels.backend": "auto", "engine.threads": None}
# A run with another value of these is another run: its weights or its data order would not fit.
_FIXED = (
    "model.kind",
    "model.n_layer",
    "model.n_head",
    "model.n_units",
    "model.n_embd",
    "model.context",
    "model.vocab_size",
    "model.norm",
    "model.embedding",
    "model.attention",
    "model.window",
    "train.seed",
    "train.init",
    "train.batch_tokens",
    "train.batch_ramp_tokens",
    "train.batch_ramp_start",
)
# These change nothing in what is computed.
_NO_MATTER = (
    "out",
    "data.cache",
    "data.verify",
    "engine.threads",
    "engine.cuda_graph",
    "engine.timeout_minutes",
    "engine.reduce_bucket_size",
    "engine.overlap_comm",
    "engine.nvme_folder",
    "train.activation_checkpointing",
    "train.keep",
    "train.save_every",
)


# Settings that name a file or folder: they compare by where they lead, however that is written.
_PATHS = ("data.path", "train.init", "pretrained", "task.train", "task.validation", "task.test")
# Sections in which a run of fine-tuning may go on otherwise than it was started.
_FREE_SECTIONS = ("engine", "kernels")

C = TypeVar("C", Config, FinetuneConfig)


class Plan(NamedTuple, Generic[C]):
    """What a command is to do."""

    folder: Path
    resume: bool  # go on from the newest checkpoint
    finished: bool  # this very run is done: nothing to do
    changes: tuple[str, ...]  # settings that differ from those the run was started with, in words
    saved: C | None  # the settings the run was started with
    newest: int = 0  # the newest checkpoint's step by its manifest


def plan(config: C, *, steps: int | None = None, must_resume: bool = False) -> Plan[C]:
    """Decide where a run's command works; `steps` are the updates of the whole run, by default `train.steps`.

    The folder is `out`; where that holds another run that is already past `steps`, the first of `out-2`, `out-3`
    and so on that does not, so that nothing is overwritten and the same command always finds its own run again.

    Raises:
        UserError: the run in the folder cannot go on with these settings, or `must_resume` and there is none.
    """
    if steps is None:
        assert isinstance(config, Config)
        steps = config.train.steps
    base = Path(config.out)
    if not base.name:
        base = base.absolute()
    number = 1
    while True:
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        store = CheckpointStore(folder / "checkpoints")
        if not store.names():
            if must_resume:
                raise UserError(f"{folder}: --resume was given, but there is no checkpoint in it to go on from")
            return Plan(folder, resume=False, finished=False, changes=(), saved=None)
        step = store.newest_step()
        saved = _saved(folder, type(config))
        changed = _changes(saved, config)
        if step < steps:
            _refuse_another_run(folder, step, changed, config)
            words = tuple(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
            return Plan(folder, resume=True, finished=False, changes=words, saved=saved, newest=step)
        if not changed:
            # a damaged last checkpoint or an end before the summary: there is something to do after all
            newest = store.latest()
            whole = newest is not None and newest.step >= steps and (folder / "summary.json").exists()
            return Plan(folder, resume=not whole, finished=whole, changes=(), saved=saved, newest=step)
        number += 1


def shared_plan(ranks: Ranks, config: C, *, steps: int | None = None, must_resume: bool = False) -> Plan[C]:
    """The plan on every rank; rank 0 makes it, and alone looks at the folder and hashes a finished run's checkpoint.

    Raises:
        UserError: as `plan` does, on every rank.
    """

    def work() -> dict[str, Any]:
        made = plan(config, steps=steps, must_resume=must_resume)
        return made._asdict() | {"folder": str(made.folder), "saved": made.saved and made.saved.model_dump()}

    found = ranks.on_first(work)
    saved = found["saved"] and type(config).model_validate(found["saved"])
    return Plan(**found | {"folder": Path(found["folder"]), "changes": tuple(found["changes"]), "saved": saved})


def newest_checkpoint(ranks: Ranks, store: CheckpointStore) -> Checkpoint | None:
    """The checkpoint to go on from: rank 0 looks and hashes, the others follow."""

    def look() -> list[Any] | None:
        found = store.latest()
        return [found.folder.name, found.step, found.state] if found else None

    found: list[Any] | None = ranks.on_first(look)
    if found is None:
        return None
    name, step, state = found
    return Checkpoint(store.folder / name, step, state)


def keep_resolved(config: C, saved: C) -> C:
    """Settings left on `auto` take what they came to when the run was started."""
    old, tree = flatten(saved.model_dump()), config.model_dump()
    for key, automatic in RESOLVED.items():
        section, name = key.split(".")
        if tree[section][name] == automatic:
            tree[section][name] = old[key]
    return type(config).model_validate(tree)


class RunLock:
    """The right to train in a run folder; the system takes it back however the process ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take it, making the folder if need be.

        Raises:
            UserError: another process has it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self._folder}: another process is training in it; wait for it, or choose another 'out'"
            ) from None
        except OSError as problem:
            log.warning("%s: cannot be locked against other processes (%s)", self._folder, problem.strerror)

    def take(self, store: CheckpointStore, newest: int, checkpoint: Checkpoint | None) -> None:
        """Take it, and see that nobody has trained in the folder since it was looked into.

        Raises:
            UserError: another process has it, or had it meanwhile.
        """
        self.acquire()
        if store.newest_step() != newest or (checkpoint and not checkpoint.folder.exists()):
            raise UserError(f"{self._folder}: another process has trained in it meanwhile; give the same command again")

    def close(self) -> None:
        """Give it back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def save_config(folder: Path, config: Config | FinetuneConfig) -> None:
    """Write the settings, with what `auto` came to, into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", dump_config(config))


def _saved(folder: Path, kind: type[C]) -> C:
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{path}: missing, although the folder holds checkpoints; restore it or choose another 'out'")
    try:
        return read_settings(kind, path)[0]
    except UserError:
        other, command = (FinetuneConfig, "finetune") if kind is Config else (Config, "train")
        if _is_of(path, other):
            raise UserError(f"{folder}: holds a run of `fastgpt {command}`; choose another 'out'") from None
        raise


def _is_of(path: Path, kind: type[Config] | type[FinetuneConfig]) -> bool:
    """Whether a file of settings is of this kind of run."""
    try:
        read_settings(kind, path)
    except UserError:
        return False
    return True


def _changes(saved: C, config: C) -> dict[str, tuple[object, object]]:
    """Settings that decide the numbers and differ; `auto` agrees with whatever it came to."""
    old, new = flatten(saved.model_dump()), flatten(config.model_dump())
    return {
        key: (old.get(key), new.get(key))
        for key in new | old  # of engine.deepspeed each has its own
        if key not in _NO_MATTER
        and _comparable(key, old.get(key)) != _comparable(key, new.get(key))
        and not (key in RESOLVED and new.get(key) == RESOLVED[key])
    }


def _comparable(key: str, value: object) -> object:
    """Paths compare by where they lead."""
    return str(Path(value).absolute()) if key in _PATHS and isinstance(value, str) else value


def _refuse_another_run(
    folder: Path, step: int, changed: dict[str, tuple[object, object]], config: Config | FinetuneConfig
) -> None:
    # a run of fine-tuning is short, and each setting of its task and training decides what it comes to
    deciding: tuple[str, ...] = _FIXED
    if isinstance(config, FinetuneConfig):
        deciding = tuple(key for key in changed if key.partition(".")[0] not in _FREE_SECTIONS)
    fixed = [f"{key} was {changed[key][0]}, is {changed[key][1]}" for key in deciding if key in changed]
    if fixed:
        raise UserError(
            f"{folder}: holds a run at step {step} that cannot go on with these settings ({'; '.join(fixed)}). "
            "Choose another 'out', or the old settings"
        )
