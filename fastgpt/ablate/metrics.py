"""What the fine-tunings of a study are scored by, found before the first of them begins."""

from fastgpt.ablate.cells import FILES, Study, first_row, places_of
from fastgpt.ablate_config import AblateConfig
from fastgpt.errors import UserError
from fastgpt.finetune_config import TaskConfig
from fastgpt.tasks import load_examples
from fastgpt.tasks.catalogue import data_set
from fastgpt.tasks.metrics import check_metrics
from fastgpt.wording import Places


def metrics_of(config: AblateConfig, study: Study, places: Places) -> dict[str, str]:
    """The metric of each fine-tuning, by its fingerprint.

    The files of examples are read, so that a mistake in them is found before hours of training.

    Raises:
        UserError: a file or row that cannot be read, a metric that cannot be, or rows of a task whose scores are of
            different metrics, or of test here and validation there: their means could not be compared.
    """
    found: dict[str, str] = {}
    checked: dict[str, str] = {}  # by the settings that decide it
    for (row, task, _), fingerprint in study.rows.items():
        settings = study.cells[fingerprint].settings.task
        key = settings.model_dump_json(include={"data", "table", "metrics", "bad_rows", *FILES})
        if key not in checked:
            checked[key] = _metric(settings, places_of(config, row, task, places))
        found[fingerprint] = checked[key]
    first = first_row(config)
    for (row, task, seed), fingerprint in study.rows.items():
        base = study.rows[first, task, seed]
        where, names = places_of(config, row, task, places), f"the rows {first!r} and {row!r}, which are compared"
        if found[fingerprint] != found[base]:
            raise UserError(
                f"{where.of(('task', 'metrics'))}: {task} is scored by {found[base]} and {found[fingerprint]} in "
                f"{names}; their first metric must be the same"
            )
        if (study.cells[fingerprint].settings.task.test is None) != (study.cells[base].settings.task.test is None):
            raise UserError(
                f"{where.of(('task', 'test'))}: {task} has a task.test in only one of {names}; give it to all, "
                "or to none"
            )
    for (task, _, seed), fingerprint in study.layers.items():
        found[fingerprint] = found[study.rows[first, task, seed]]
    return found


def _metric(settings: TaskConfig, places: Places) -> str:
    data = settings.source
    if isinstance(data, str):
        data_set(data, setting=f"{places.of(('task', 'data'))}: task.data")
    task, _ = load_examples(settings.train, data, bad_rows=settings.bad_rows)
    for path in (settings.validation, settings.test):
        if path is not None:
            load_examples(path, data, bad_rows=settings.bad_rows)
    metrics = tuple(settings.metrics) or task.metrics
    check_metrics(metrics, task, setting=f"{places.of(('task', 'metrics'))}: task.metrics")
    return metrics[0]
