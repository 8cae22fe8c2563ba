"""`fastgpt ablate`: train the models, fine-tune each row to each task with each seed, score, and compare.

What is done stays: the same command goes on where it ended, and repeats nothing whose settings and files are the same.
"""

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastgpt.ablate.cells import Cell, Study, study_of
from fastgpt.ablate.display import shown
from fastgpt.ablate.figures import require_matplotlib
from fastgpt.ablate.jobs import Failure, Job, carry_out
from fastgpt.ablate.lock import locked
from fastgpt.ablate.metrics import metrics_of
from fastgpt.ablate.models import StudyModel, study_models
from fastgpt.ablate.report import told, write_report
from fastgpt.ablate.results import keep_result, result_of
from fastgpt.ablate.zero_shot import Point, check_heuristics, make_untrained, points
from fastgpt.ablate_config import AblateConfig
from fastgpt.engine.host import available_cores
from fastgpt.errors import UserError
from fastgpt.files import write_atomically
from fastgpt.launchers import find_launch
from fastgpt.load import BEST
from fastgpt.settings import dump_config
from fastgpt.wording import Places

log = logging.getLogger(__name__)

CONFIG, LOG, RUN = "config.yaml", "log.txt", "run"


def ablate(config: AblateConfig, places: Places) -> list[Failure]:
    """Carry a study out, or go on with it; gives the runs that failed.

    Raises:
        UserError: something that the user can mend, found before the first run.
        Stopped: a signal ended it.
    """
    if find_launch() is not None:
        raise UserError("fastgpt ablate starts its runs itself: start it alone, without a launcher")
    if config.layers or config.zero_shot:
        require_matplotlib()
    scored = check_heuristics(config, places) if config.zero_shot else ""
    models = study_models(config, places)
    study = study_of(config, models, places)
    metrics = metrics_of(config, study, places)
    with locked(Path(config.out)) as lock:
        failures = _train(config, models, study, lock)
        reached = points(config, models, scored) if config.zero_shot else []
        failures += _fine_tune_and_score(config, models, study, metrics, reached, lock)
        report = write_report(config, study, reached)
    print(f"\n{report.read_text(encoding='utf-8')}\n{report.parent} holds the tables, figures and runs")
    return failures


def _train(config: AblateConfig, models: dict[str, StudyModel], study: Study, lock: int) -> list[Failure]:
    """Train the models that are not there."""
    # those of the same settings whose names make the same folder are one
    missing = list({model.folder: model for model in models.values() if not model.trained}.values())
    at_once = min(config.jobs, len(missing)) or 1
    jobs = []
    for model in missing:
        assert model.training is not None
        engine = model.training.engine.model_copy(update={"threads": _threads(model.training.engine.threads, at_once)})
        training = model.training.model_copy(update={"engine": engine})
        beside = model.folder.parent
        beside.mkdir(parents=True, exist_ok=True)
        settings = beside / f"{model.folder.name}.yaml"
        write_atomically(settings, dump_config(training))
        jobs.append(
            Job(
                f"model {model.name}",
                ("train", str(settings)),
                beside / f"{model.folder.name}.log",
                partial(str, f"in {model.folder}"),
            )
        )
    left = sum(result_of(cell) is None for cell in study.cells.values())
    log.info(
        "%s: %d models to train, %d fine-tunings of which %d are to be done",
        config.out,
        len(missing),
        len(study.cells),
        left,
    )
    with shown("models", len(jobs), at_once) as tell:
        failures = carry_out(jobs, at_once, tell, hold=[lock])
    for model in models.values():
        if config.zero_shot and model.trained:
            make_untrained(model)
    return failures


def _fine_tune_and_score(
    config: AblateConfig,
    models: dict[str, StudyModel],
    study: Study,
    metrics: dict[str, str],
    scored: Sequence[Point],
    lock: int,
) -> list[Failure]:
    """Everything that starts from a model that is there."""
    cells = [cell for cell in study.cells.values() if models[cell.model].trained and result_of(cell) is None]
    waiting = {p.result: p for p in scored if models[p.model].trained and not p.result.is_file()}
    at_once = min(config.jobs, len(cells) + len(waiting)) or 1
    jobs = [_fine_tuning(cell, metrics[cell.fingerprint], at_once, keep_model=config.keep_models) for cell in cells]
    jobs += [_scoring(config, point, at_once) for point in waiting.values()]
    with shown("runs", len(jobs), at_once) as tell:
        return carry_out(jobs, at_once, tell, hold=[lock])


def _fine_tuning(cell: Cell, metric: str, at_once: int, *, keep_model: bool) -> Job:
    run = cell.folder / RUN
    engine = cell.settings.engine.model_copy(update={"threads": _threads(cell.settings.engine.threads, at_once)})
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        cell.folder / CONFIG, dump_config(cell.settings.model_copy(update={"out": str(run), "engine": engine}))
    )

    def finish() -> str:
        result = keep_result(cell, run, metric)
        if not keep_model:
            for name in ("checkpoints", BEST):
                shutil.rmtree(run / name, ignore_errors=True)
        return told(result)

    words = ("finetune", cell.settings.pretrained, str(cell.folder / CONFIG))
    return Job(cell.label, words, cell.folder / LOG, finish)


def _scoring(config: AblateConfig, point: Point, at_once: int) -> Job:
    assert config.zero_shot is not None
    point.result.parent.mkdir(parents=True, exist_ok=True)
    heuristics = [f"--heuristic={name}={path}" for name, path in config.zero_shot.heuristics.items()]
    few = [] if config.zero_shot.examples is None else [f"--examples={config.zero_shot.examples}"]
    words = ("evaluate", str(point.folder), *heuristics, *few, f"--seed={config.seeds[0]}", f"--out={point.result}")
    label = f"{point.model} after {point.step:,} updates, zero-shot"
    return Job(label, words, point.result.with_suffix(".log"), lambda: "scored", _threads(None, at_once))


def _threads(asked: int | None, at_once: int) -> int | None:
    """CPU threads of one run of several at a time."""
    return asked if asked or at_once == 1 else max(1, len(available_cores()) // at_once)
