"""`fastgpt train`: from settings to a finished run."""

import logging
from contextlib import closing
from pathlib import Path
from typing import Literal

import torch

from fastgpt.checkpoint.store import Checkpoint, CheckpointStore
from fastgpt.config import Config
from fastgpt.data.prefetch import prefetch
from fastgpt.data.shards import TokenShards
from fastgpt.data.source import ShardSource
from fastgpt.engine.backend import ops_for
from fastgpt.engine.base import Engine
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import SharedError
from fastgpt.launch import engine_kind
from fastgpt.launchers import find_launch
from fastgpt.load import save_model
from fastgpt.model.build import new_model
from fastgpt.model.seeds import fold
from fastgpt.ramp import batch_tokens, micro_batches
from fastgpt.sizes import flops_per_token, parameter_count
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.corpus import prepare_corpus
from fastgpt.train.display import Reporter, display_for
from fastgpt.train.evaluation import Evaluation
from fastgpt.train.folder import RunLock, keep_resolved, newest_checkpoint, save_config, shared_plan
from fastgpt.train.hardware import peak_flops
from fastgpt.train.initial import started_with, with_its_tokenizer
from fastgpt.train.loop import train
from fastgpt.train.process import as_rank, check_deepspeed_keys
from fastgpt.train.recorder import Recorder
from fastgpt.train.saver import Saver
from fastgpt.train.start import set_up
from fastgpt.train.summary import summarise
from fastgpt.train.watchers import FirstUpdate, Guard, Watcher
from fastgpt.wording import Places

log = logging.getLogger(__name__)

ORDER = 3  # what the run's seed is folded with for the order of the data


def run(config: Config, *, must_resume: bool = False, places: Places | None = None) -> Path:
    """Train, or go on training, as the settings say; every rank calls this.

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
    kind = engine_kind(config, launch)
    return as_rank(
        config.engine,
        kind,
        launch,
        lambda device, ranks: _Run(config, kind, device, ranks, must_resume=must_resume).go(),
        check=lambda device, launch: check_deepspeed_keys(config, kind, device, launch.local_rank, places or Places()),
    )


class _Run:
    """One rank's part of a run."""

    def __init__(
        self,
        config: Config,
        kind: Literal["single", "deepspeed"],
        device: torch.device,
        ranks: Ranks,
        *,
        must_resume: bool,
    ) -> None:
        self.ranks = ranks
        self.kind = kind
        self.device = device
        self.display = display_for(ranks.rank)
        self.plan = shared_plan(ranks, config, must_resume=must_resume)
        self.config = self._resolved(config)

    def go(self) -> Path:
        """Train to the end."""
        folder = self.plan.folder
        if self.plan.finished:
            self.display.print(f"{folder}: finished at step {self.config.train.steps}; nothing to do")
            return folder
        for change in self.plan.changes:
            log.info("%s: %s", folder, change)
        if folder != Path(self.config.out):
            log.info("%s holds another run, which is kept; this one is in %s", self.config.out, folder)

        corpus = prepare_corpus(with_its_tokenizer(self.config), self.ranks, self.display)
        training = TokenShards.open(corpus.folder, "train", verify=False)
        validation = TokenShards.open(corpus.folder, "validation", verify=False)
        store = CheckpointStore(folder / "checkpoints", keep=self.config.train.keep)
        checkpoint = newest_checkpoint(self.ranks, store) if self.plan.resume else None
        if checkpoint and checkpoint.state.get("data") != corpus.fingerprint:
            raise SharedError(
                f"data.path: {self.config.data.path} no longer gives the tokens that the run in {folder} was "
                "trained on: its text, data.text_key, data.tokenizer or data.validation_fraction has changed. "
                "Restore it, or choose another 'out'"
            )

        source = self._source(training)
        engine = self._engine(resumed=checkpoint is not None)
        if checkpoint:
            engine.read(checkpoint.folder)
            log.info("going on from %s", checkpoint.folder)
        self.ranks.on_first(corpus.verified)
        with closing(RunLock(folder)) as lock:
            self.ranks.on_first(lambda: lock.take(store, self.plan.newest, checkpoint))
            if self.ranks.rank == 0:
                save_config(folder, self.config)
            return self._train(engine, source, training.tokenizer(), validation, store, checkpoint, corpus.fingerprint)

    def _train(
        self,
        engine: Engine,
        source: ShardSource,
        tokenizer: Tokenizer,
        validation: TokenShards,
        store: CheckpointStore,
        checkpoint: Checkpoint | None,
        fingerprint: str,
    ) -> Path:
        config, folder, first = self.config, self.plan.folder, self.ranks.rank == 0
        resume_step = checkpoint.step if checkpoint else None
        recorder = Recorder(folder if first else None, resume_step=resume_step)
        evaluation = Evaluation(engine, validation, tokenizer, config, record=recorder.write, show=self.display.print)

        def write_model(target: Path) -> None:
            weights = engine.model_state()
            if weights is not None:
                save_model(target, weights, config.model, tokenizer)

        saver = Saver(
            engine,
            store,
            steps=config.train.steps,
            every=config.train.save_every,
            state={"data": fingerprint, "world_size": self.ranks.world_size, "config": config.model_dump()},
            save_model=write_model,
            before=recorder.sync,
        )
        peak = peak_flops(self.device)
        flops = flops_per_token(config.model)
        reporter = Reporter(self.display, config.train.steps, flops, peak and peak * self.ranks.world_size)
        watchers: list[Watcher] = [Guard(), recorder, reporter, evaluation, saver]
        if config.engine.compile:
            watchers.append(FirstUpdate(batch_tokens(config)))
        try:
            with saver.signals(), prefetch(source.batches(engine.step)) as batches:
                train(
                    engine,
                    batches,
                    steps=config.train.steps,
                    sizes=batch_tokens(config),
                    watchers=watchers,
                )
        finally:
            self.display.stop()
            recorder.close()
        if first:
            summarise(folder, validation, self.display)
        self.ranks.barrier()
        return folder

    def _resolved(self, config: Config) -> Config:
        """The settings with nothing left on `auto` that decides the numbers."""
        asked = config.engine.threads
        if self.plan.saved:
            config = keep_resolved(config, self.plan.saved)
        return set_up(config, self.device, self.ranks, threads=asked)

    def _source(self, shards: TokenShards) -> ShardSource:
        config = self.config
        return ShardSource(
            shards,
            config.model.context,
            config.train.micro_batch_size,
            micro_batches(config),
            fold(config.train.seed, ORDER),
            self.ranks.rank,
            self.ranks.world_size,
        )

    def _engine(self, *, resumed: bool) -> Engine:
        config = self.config
        ops = ops_for(config.kernels.backend, self.device)
        values = None if resumed else started_with(config)
        engine = prepare(
            lambda: new_model(config.model, ops),
            config,
            kind=self.kind,
            precision=config.engine.precision,
            device=self.device,
            ranks=self.ranks,
            values=values,
        )
        stage = f" ZeRO-{config.engine.zero_stage}{_offloading(config)}" if self.kind == "deepspeed" else ""
        log.info(
            "%s parameters, %s engine%s on %d x %s, %s, %s kernels, %d threads a rank",
            f"{parameter_count(config.model):,}",
            self.kind,
            stage,
            self.ranks.world_size,
            self.device,
            config.engine.precision,
            config.kernels.backend,
            config.engine.threads,
        )
        return engine


def _offloading(config: Config) -> str:
    """What is kept off the device, in words."""
    places = {"optimizer": config.engine.offload_optimizer, "parameters": config.engine.offload_parameters}
    return "".join(f" ({name} offloaded to {place})" for name, place in places.items() if place != "none")
