"""The models of a study: those that it trains itself, and those that are there."""

from pathlib import Path
from typing import NamedTuple

from fastgpt.ablate.names import as_name, content_digest, digest
from fastgpt.ablate_config import AblateConfig, Tree
from fastgpt.checkpoint.store import CheckpointStore
from fastgpt.config import Config
from fastgpt.errors import UserError
from fastgpt.load import load_model, model_folder
from fastgpt.settings import load_config, validated
from fastgpt.wording import Places

SETTINGS = (".yaml", ".yml")


class StudyModel(NamedTuple):
    """A model that fine-tunings start from."""

    name: str
    folder: Path  # a run, or what the user named
    blocks: int
    fingerprint: str  # of its files, or of the settings that make them
    training: Config | None = None  # where the study trains it

    @property
    def trained(self) -> bool:
        """Whether it is there."""
        if self.training is None:
            return True
        done = CheckpointStore(self.folder / "checkpoints").newest_step() >= self.training.train.steps
        return done and (self.folder / "summary.json").is_file()


def study_models(config: AblateConfig, places: Places) -> dict[str, StudyModel]:
    """The models by name, in their order.

    Raises:
        UserError: settings or a folder that cannot be read.
    """
    return {name: _model(config, name, source, places) for name, source in config.models.items()}


def _model(config: AblateConfig, name: str, source: str | Tree, places: Places) -> StudyModel:
    where = f"{places.of(('models', name))}: models.{name}"
    if isinstance(source, dict):
        if "out" in source:
            raise UserError(f"{places.of(('models', name, 'out'))}: out is not set here: the study names the folders")
        inside = Places(f"{places.path}: models.{name}", places.under(("models", name)))
        return _to_train(config, name, validated(Config, source | {"out": "here"}, inside), where)
    if Path(source).suffix in SETTINGS:
        return _to_train(config, name, load_config(source), where)
    return _there(config, name, source, where)


def _there(config: AblateConfig, name: str, path: str, where: str) -> StudyModel:
    try:
        folder = model_folder(Path(path))  # of a run that goes on, the checkpoint of now for all fine-tunings
        model, tokenizer = load_model(folder)
    except UserError as problem:
        raise UserError(f"{where}: {problem}; or name the settings (.yaml) that train one") from None
    if config.zero_shot:
        raise UserError(
            f"{where}: {path} is a model that is there, but zero_shot scores the checkpoints of models that the study "
            "trains: name their settings (.yaml), or leave zero_shot out"
        )
    if tokenizer is None:
        raise UserError(f"{where}: {path}: it has no tokenizer, without which no text becomes tokens")
    return StudyModel(name, folder, model.config.n_layer, content_digest(str(folder)))


def _to_train(config: AblateConfig, name: str, training: Config, where: str) -> StudyModel:
    train = training.train
    out = Path(config.out)
    known = training.model_dump()
    for section, key in (("engine", "threads"), ("data", "cache"), ("data", "verify"), ("train", "keep")):
        del known[section][key]  # which do not decide what becomes of it
    del known["out"]
    fingerprint = digest(known)
    if config.zero_shot:
        if train.save_every is None:
            raise UserError(
                f"{where}: its train.save_every must be set: zero_shot scores the checkpoints of pre-training"
            )
        # all of them: each interruption saves one more
        train = train.model_copy(update={"keep": train.steps})
    folder = out / "models" / f"{as_name(name)}-{fingerprint[:8]}"
    data = training.data
    if data.cache is None:
        data = data.model_copy(update={"cache": str(out / "models" / "cache")})
    training = training.model_copy(update={"out": str(folder), "train": train, "data": data})
    return StudyModel(name, folder, training.model.n_layer, fingerprint, training)
