"""`fastgpt finetune`: a pre-trained model and a task to a model that does the task."""

import json
import logging
import math
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch

from fastgpt.checkpoint.store import Checkpoint, CheckpointStore
from fastgpt.config import Config
from fastgpt.data.prefetch import prefetch
from fastgpt.engine.backend import ops_for
from fastgpt.engine.base import Engine
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import SharedError, alike_on_every_rank
from fastgpt.files import write_atomically
from fastgpt.finetune_config import FinetuneConfig, engine_config
from fastgpt.launch import kind_of
from fastgpt.launchers import find_launch
from fastgpt.model.seeds import fold
from fastgpt.model.task import new_task_model
from fastgpt.model.transfer import transferred_values
from fastgpt.sizes import flops_per_token, parameter_count
from fastgpt.task_folder import FineTuned, load_task_model, save_task_model
from fastgpt.tasks.source import ExampleSource
from fastgpt.train.best import best_result, replace_best
from fastgpt.train.display import Reporter, display_for
from fastgpt.train.folder import Plan, RunLock, keep_resolved, newest_checkpoint, save_config, shared_plan
from fastgpt.train.hardware import peak_flops
from fastgpt.train.loop import train
from fastgpt.train.process import as_rank, check_deepspeed_keys
from fastgpt.train.recorder import Recorder
from fastgpt.train.saver import Saver
from fastgpt.train.scoring import Untrained, evaluate, told
from fastgpt.train.start import set_up
from fastgpt.train.task_evaluation import TaskEvaluation, best_so_far
from fastgpt.train.task_inputs import Examples, Pretrained, read_task
from fastgpt.train.watchers import Guard, Watcher
from fastgpt.wording import Places

log = logging.getLogger(__name__)

ORDER = 3  # what the run's seed is folded with for the order of the examples


def run(config: FinetuneConfig, *, must_resume: bool = False, places: Places | None = None) -> Path:
    """Fine-tune, or go on with it, as the settings say; every rank calls this.

    Args:
        config: the settings.
        must_resume: refuse to start anew.
        places: where each setting was written, for what is said of it.

    Returns:
        The run folder.

    Raises:
        UserError: something that the user can mend.
        RankLost: another rank is gone.
        Interrupted: a signal ended the run; its checkpoint is written.
    """
    launch = find_launch()
    kind = kind_of(config.engine, launch)
    world_size = launch.world_size if launch else 1
    parts = config.train.batch_size // config.train.micro_batch_size
    if parts % world_size:
        unit = config.train.micro_batch_size * world_size
        raise SharedError(
            f"train.batch_size: {config.train.batch_size} is {parts} micro-batches, which cannot be dealt evenly to "
            f"{world_size} ranks; it must be a multiple of {unit}. The nearest is "
            f"{max(1, round(config.train.batch_size / unit)) * unit}"
        )
    return as_rank(
        config.engine,
        kind,
        launch,
        lambda device, ranks: _Run(config, kind, device, ranks, places or Places(), must_resume=must_resume).go(),
    )


class _Run:
    """One rank's part of a run."""

    def __init__(
        self,
        config: FinetuneConfig,
        kind: Literal["single", "deepspeed"],
        device: torch.device,
        ranks: Ranks,
        places: Places,
        *,
        must_resume: bool,
    ) -> None:
        self.ranks = ranks
        self.kind = kind
        self.device = device
        self.display = display_for(ranks.rank)
        self.pretrained, self.tuned, self.examples = self._read_together(config)
        self.fingerprint = self.examples.fingerprint()
        if len(set(ranks.gather(self.fingerprint))) > 1:
            raise SharedError("task.train: the ranks read unlike examples; each host needs the same files")
        with alike_on_every_rank():
            source = self._source(config)
        self.updates_per_epoch = source.updates_per_epoch
        self.steps = config.train.epochs * source.updates_per_epoch
        self.source = source
        self.plan: Plan[FinetuneConfig] = shared_plan(ranks, config, steps=self.steps, must_resume=must_resume)
        asked = config.engine.threads
        if self.plan.saved:
            config = keep_resolved(config, self.plan.saved)
        self.config = set_up(config, device, ranks, threads=asked)
        self.model = self.pretrained.with_special_tokens(dropout=config.train.dropout)
        self.engine_config: Config = engine_config(self.config, self.model, self.updates_per_epoch)
        check_deepspeed_keys(self.engine_config, kind, device, ranks.local_rank, places)

    def go(self) -> Path:
        """Fine-tune to the end."""
        folder = self.plan.folder
        if self.plan.finished:
            self.display.print(f"{folder}: finished at step {self.steps}; nothing to do")
            return folder
        for change in self.plan.changes:
            log.info("%s: %s", folder, change)
        if folder != Path(self.config.out):
            log.info("%s holds another run, which is kept; this one is in %s", self.config.out, folder)
        store = CheckpointStore(folder / "checkpoints", keep=self.config.train.keep)
        checkpoint = newest_checkpoint(self.ranks, store) if self.plan.resume else None
        if checkpoint and checkpoint.state.get("data") != self.fingerprint:
            raise SharedError(
                f"task.train: its examples, or those of validation, are no longer those that the run in {folder} was "
                "trained on. Restore them, or choose another 'out'"
            )
        engine = self._engine()
        if checkpoint:
            engine.read(checkpoint.folder)
            log.info("going on from %s", checkpoint.folder)
        with closing(RunLock(folder)) as lock:
            self.ranks.on_first(lambda: lock.take(store, self.plan.newest, checkpoint))
            if self.ranks.rank == 0:
                save_config(folder, self.config)
            self._train(engine, store, checkpoint)
        return folder

    def _train(self, engine: Engine, store: CheckpointStore, checkpoint: Checkpoint | None) -> None:
        config, folder, first = self.config, self.plan.folder, self.ranks.rank == 0
        task = self.examples.task
        resume_step = checkpoint.step if checkpoint else None
        best = self.ranks.on_first(lambda: best_so_far(folder / "metrics.jsonl", resume_step or 0, task))
        recorder = Recorder(folder if first else None, resume_step=resume_step)

        def write_model(target: Path) -> None:
            weights = engine.model_state()
            if weights is not None:
                save_task_model(target, weights, self.model, self.pretrained.tokenizer, self.tuned)

        def keep(result: dict[str, Any]) -> None:
            weights = engine.model_state()
            if weights is not None:
                tokenizer, tuned = self.pretrained.tokenizer, self.tuned
                replace_best(
                    folder, lambda target: save_task_model(target, weights, self.model, tokenizer, tuned), result
                )
            self.ranks.barrier()

        evaluation = TaskEvaluation(
            engine,
            self.examples.validation,
            task,
            steps=self.steps,
            every=config.train.eval_every or self.updates_per_epoch,
            batch_size=config.train.micro_batch_size,
            record=recorder.write,
            show=self.display.print,
            keep=keep,
            best=-math.inf if best is None else best,  # JSON has no infinity
        )
        saver = Saver(
            engine,
            store,
            steps=self.steps,
            every=config.train.save_every or self.updates_per_epoch,
            state={"data": self.fingerprint, "world_size": self.ranks.world_size, "config": config.model_dump()},
            save_model=write_model,
            before=recorder.sync,
        )
        peak = peak_flops(self.device)
        reporter = Reporter(
            self.display, self.steps, flops_per_token(self.model), peak and peak * self.ranks.world_size
        )
        watchers: list[Watcher] = [Guard(), recorder, reporter, evaluation, saver]
        try:
            with saver.signals(), prefetch(self.source.batches(engine.step)) as batches:
                train(engine, batches, steps=self.steps, sizes=self.source.tokens(self.steps), watchers=watchers)
        finally:
            self.display.stop()
            recorder.close()
        self._summarise()

    def _summarise(self) -> None:
        """What the run reached, for people and in `summary.json`: the best validation, and the test of that model."""
        folder, task = self.plan.folder, self.examples.task
        best = self.ranks.broadcast(best_result(folder) if self.ranks.rank == 0 else None)
        if best is None:
            raise SharedError(f"{folder}: no validation gave a number for {task.metrics[0]}; no model is the best")
        summary: dict[str, Any] = {"steps": self.steps, "best": best}
        if self.examples.test is not None:
            model = load_task_model(folder, device=self.device, backend=self.config.kernels.backend)[0]
            size = self.config.train.micro_batch_size
            # by all ranks: they would not wait for one for more than engine.timeout_minutes
            summary["test"] = evaluate(Untrained(model, self.device, self.ranks), self.examples.test, task, size)
        if self.ranks.rank == 0:
            write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
            self.display.print(f"\nbest validation, after step {best['step']}: {told(best, task)}")
            if "test" in summary:
                self.display.print(f"test of that model: {told(summary['test'], task)}")
            self.display.print(f"run folder {folder}; use it: fastgpt predict {folder} FILE")
        self.ranks.barrier()

    def _read_together(self, config: FinetuneConfig) -> tuple[Pretrained, FineTuned, Examples]:
        """The same on every rank; rank 0 reads first, and tells all what is wrong."""
        found = []

        def read() -> bool:
            found.append(read_task(config))
            return True

        self.ranks.on_first(read)
        return found[0] if found else read_task(config)

    def _source(self, config: FinetuneConfig) -> ExampleSource:
        return ExampleSource(
            self.examples.train,
            self.examples.task,
            config.train.batch_size,
            config.train.micro_batch_size,
            fold(config.train.seed, ORDER),
            self.ranks.rank,
            self.ranks.world_size,
        )

    def _engine(self) -> Engine:
        config = self.config
        ops = ops_for(config.kernels.backend, self.device)
        with alike_on_every_rank():
            values = transferred_values(
                self.pretrained.weights, self.model, config.train.seed, blocks=config.task.transfer_blocks
            )
        engine = prepare(
            lambda: new_task_model(self.model, ops, self.tuned.shape),
            self.engine_config,
            kind=self.kind,
            precision=config.engine.precision,
            device=self.device,
            ranks=self.ranks,
            values=values,
        )
        log.info(
            "%s parameters, %d training and %d validation examples, %d updates, %s engine on %d x %s, %s, %s kernels",
            f"{parameter_count(self.model):,}",
            len(self.examples.train),
            len(self.examples.validation),
            self.steps,
            self.kind,
            self.ranks.world_size,
            self.device,
            config.engine.precision,
            config.kernels.backend,
        )
        return engine
