"""Settings: what is read, and what a user is told about every kind of mistake."""

from pathlib import Path

import pytest

from fastgpt.ablate_config import AblateConfig
from fastgpt.config import Config, TableConfig
from fastgpt.errors import UserError
from fastgpt.finetune_config import FinetuneConfig
from fastgpt.model import parameter_count
from fastgpt.ramp import batch_tokens
from fastgpt.schema import describe
from fastgpt.settings import dump_config, known_settings, load_config, read_settings
from fastgpt.tasks import DATA_SETS
from fastgpt.wording import Places

FOLDER = Path(__file__).parents[1] / "configs"
TASKS = sorted((FOLDER / "finetune").glob("*.yaml"))
STUDIES = [path for path in sorted((FOLDER / "studies").glob("*.yaml")) if "\nmodels:" in path.read_text()]
CONFIGS = [path for path in sorted(FOLDER.glob("**/*.yaml")) if path not in [*TASKS, *STUDIES]]
CONFIGS_HERE = [path.relative_to(FOLDER.parent) for path in CONFIGS]

GOOD = """\
out: runs/x
model:
  n_layer: 2
  n_head: 2
  n_embd: 32
  context: 16
  vocab_size: 300
data:
  path: stdlib
train:
  steps: 3
  batch_tokens: 64
  micro_batch_size: 2
  lr: 3e-4
"""

AN_LSTM = GOOD.replace("  n_head: 2\n", "").replace("n_layer: 2", "kind: lstm\n  n_layer: 2")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_file_loads(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.name)
def test_every_shipped_study_loads(path: Path) -> None:
    config, _ = read_settings(AblateConfig, path)
    assert all(Path(source) in CONFIGS_HERE for source in config.models.values() if isinstance(source, str))


def test_an_lstm_has_the_units_of_the_paper_and_reads_back_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "lstm.yaml"
    path.write_text(AN_LSTM)
    config = load_config(path)
    assert config.model.n_units == 2048 and config.model.n_head is None
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert load_config(path, ["model.n_units=40"]).model.n_units == 40


def test_the_shipped_lstm_has_the_data_tokens_and_batch_of_gpt_1() -> None:
    lstm, gpt = (load_config(FOLDER / f"{name}.yaml") for name in ("lstm-2048", "gpt1-117m"))
    assert (lstm.data, lstm.train, lstm.engine) == (gpt.data, gpt.train, gpt.engine)
    assert parameter_count(lstm.model) == 55_736_832


def test_there_are_shipped_files() -> None:
    assert {p.stem for p in CONFIGS} >= {"quickstart", "gpt1-117m", "gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m"}


# of the GPT-3 paper's table 2.1; heads of 1.3B and width of 13B as they must be
GPT_3 = {
    "125m": (12, 768, 12, 125e6, 0.5e6, 6.0e-4),
    "350m": (24, 1024, 16, 350e6, 0.5e6, 3.0e-4),
    "760m": (24, 1536, 16, 760e6, 0.5e6, 2.5e-4),
    "1.3b": (24, 2048, 16, 1.3e9, 1e6, 2.0e-4),
    "2.7b": (32, 2560, 32, 2.7e9, 1e6, 1.6e-4),
    "6.7b": (32, 4096, 32, 6.7e9, 2e6, 1.2e-4),
    "13b": (40, 5120, 40, 13.0e9, 2e6, 1.0e-4),
    "175b": (96, 12288, 96, 175.0e9, 3.2e6, 0.6e-4),
}


@pytest.mark.parametrize("name", GPT_3)
def test_a_shipped_gpt_3_is_that_of_the_paper(name: str) -> None:
    layers, width, heads, parameters, batch, rate = GPT_3[name]
    config = load_config(CONFIGS[0].parent / f"gpt3-{name}.yaml")
    model, train = config.model, config.train
    assert (model.n_layer, model.n_embd, model.n_head, model.context) == (layers, width, heads, 2048)
    assert (model.attention, train.lr, train.clip, train.weight_decay) == ("alternating", rate, 1.0, 0.1)
    assert (train.beta1, train.beta2, train.eps) == (0.9, 0.95, 1e-8)
    assert train.min_lr == pytest.approx(rate / 10)
    assert parameter_count(model) == pytest.approx(parameters, rel=0.02)
    assert train.batch_tokens == pytest.approx(batch, rel=0.05)


@pytest.mark.parametrize("name", GPT_3)
def test_a_shipped_gpt_3_counts_the_papers_tokens_in_updates(name: str) -> None:
    config = load_config(CONFIGS[0].parent / f"gpt3-{name}.yaml")
    train, sizes = config.train, batch_tokens(config)
    assert train.decay_steps is not None
    for steps, tokens in ((train.warmup_steps, 375e6), (train.decay_steps, 260e9), (train.steps, 300e9)):
        assert sizes.before(steps + 1) == pytest.approx(tokens, abs=train.batch_tokens)
    assert train.batch_ramp_tokens in (4e9, 8e9, 12e9)


def test_scientific_notation_without_a_point_is_a_number(good: Path) -> None:
    assert load_config(good).train.lr == 3e-4


def test_a_word_on_the_command_line_replaces_the_files_value(good: Path) -> None:
    config = load_config(good, ["train.steps=7", "model.norm=post", "train.clip=null", "engine.zero_stage=3"])
    assert (config.train.steps, config.model.norm, config.train.clip, config.engine.zero_stage) == (7, "post", None, 3)


def test_deepspeeds_own_keys_are_read_and_written_back(good: Path, tmp_path: Path) -> None:
    words = ["engine.deepspeed.aio.block_size=3", "engine.deepspeed.zero_optimization.stage3_max_live_parameters=1e3"]
    config = load_config(good, words)
    assert config.engine.deepspeed == {
        "aio": {"block_size": 3},
        "zero_optimization": {"stage3_max_live_parameters": 1e3},
    }
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config


def test_places_tell_where_a_setting_was_written(good: Path) -> None:
    places = read_settings(Config, good, ["engine.deepspeed.aio.block_size=3"])[1]
    assert places.of(("train", "steps")) == f"{good}:11"
    assert places.of(("train", "nothing")) == f"{good}:10"  # the section's
    assert places.of(("engine", "deepspeed", "aio")) == "command line"  # what it has
    assert places.of(("kernels",)) == str(good)
    assert Places().of(("train",)) == ""


def test_the_last_word_counts(good: Path) -> None:
    assert load_config(good, ["train.steps=7", "train.steps=8"]).train.steps == 8


def test_what_is_written_is_read_back_the_same(good: Path, tmp_path: Path) -> None:
    config = load_config(good, ["train.lr=1e-7", "out=runs/é: #x", "data.text_key='12'"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config


def test_settings_are_frozen(good: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(good).train.steps = 5  # type: ignore[misc]


def test_every_stable_key_is_known() -> None:
    stable = (
        "out data.path data.tokenizer data.cache model.n_layer model.n_head model.n_embd model.context "
        "model.vocab_size model.norm model.dropout train.steps train.seed train.batch_tokens train.micro_batch_size "
        "train.lr train.eval_every train.save_every engine.kind engine.zero_stage engine.precision kernels.backend"
    )
    assert set(stable.split()) <= set(known_settings())


# each mistake, and what its one line must say
IN_FILE = {
    "a slip in a key": (
        GOOD.replace("n_embd", "n_emb"),
        ":5: model.n_emb is not a setting. Did you mean model.n_embd?",
    ),
    "a key of another section": (
        GOOD.replace("  n_layer: 2", "  n_layer: 2\n  lr: 1"),
        ":4: model.lr is not a setting. Did you mean train.lr?",
    ),
    "a key at the top that belongs in a section": (
        GOOD + "zero_stage: 1\n",
        ":15: zero_stage is not a setting. Did you mean engine.zero_stage?",
    ),
    "a key as the command line has it": (
        GOOD + "engine.threads: 2\n",
        ":15: engine.threads is written in its section here: 'threads:', indented, under 'engine:'",
    ),
    "such a key within its section": (
        GOOD + "engine:\n  engine.threads: 2\n",
        ":16: engine.threads is written in its section here: 'threads:', indented, under 'engine:'",
    ),
    "a slip in such a key": (
        GOOD + "train.stepz: 3\n",
        ":15: train.stepz is not a setting. Did you mean train.steps?",
    ),
    "a slip in a section": (GOOD.replace("train:", "trian:"), "trian is not a setting"),
    "text for a number": (GOOD.replace("steps: 3", "steps: many"), ":11: train.steps must be an integer of at least 1"),
    "a fraction for an integer": (GOOD.replace("steps: 3", "steps: 3.5"), ":11: train.steps must be an integer"),
    "true for an integer": (GOOD.replace("steps: 3", "steps: true"), ":11: train.steps must be an integer"),
    "a list for a number": (GOOD.replace("lr: 3e-4", "lr: [1, 2]"), ":14: train.lr must be a number above 0"),
    "zero layers": (GOOD.replace("n_layer: 2", "n_layer: 0"), ":3: model.n_layer must be an integer of at least 1"),
    "a width the heads do not divide": (
        GOOD.replace("n_embd: 32", "n_embd: 33"),
        ":5: model.n_embd must be a multiple of model.n_head (2), not 33. The nearest is 32",
    ),
    "the paper's heads of a GPT-3 of 1.3B": (
        GOOD.replace("n_head: 2", "n_head: 24").replace("n_embd: 32", "n_embd: 2048"),
        ":5: model.n_embd must be a multiple of model.n_head (24), not 2048. The GPT-3 paper prints 24 heads of 128 "
        "for its 1.3B model, but 24 x 128 is 3072: use 16 heads",
    ),
    "the paper's width of a GPT-3 of 13B": (
        GOOD.replace("n_head: 2", "n_head: 40").replace("n_embd: 32", "n_embd: 5140"),
        ":5: model.n_embd must be a multiple of model.n_head (40), not 5140. The GPT-3 paper prints a width of 5140 "
        "for its 13B model, but its 40 heads of 128 make 5120",
    ),
    "no heads": (GOOD.replace("  n_head: 2\n", ""), ":2: model.n_head is missing; it must be an integer of at least 1"),
    "units of a transformer": (
        GOOD.replace("n_head: 2", "n_head: 2\n  n_units: 40"),
        ":5: model.n_units is 40, but model.kind is transformer: leave it out",
    ),
    "heads of an LSTM": (
        GOOD.replace("n_layer: 2", "kind: lstm\n  n_layer: 2"),
        ":5: model.n_head is 2, but model.kind is lstm, which has no such thing: leave it out",
    ),
    "a norm of an LSTM": (
        AN_LSTM.replace("kind: lstm", "kind: lstm\n  norm: post"),
        ":4: model.norm is post, but model.kind is lstm",
    ),
    "attention of an LSTM": (
        AN_LSTM.replace("kind: lstm", "kind: lstm\n  attention: alternating\n  window: 4"),
        ":4: model.attention is alternating, but model.kind is lstm",
    ),
    "one table of an LSTM": (
        AN_LSTM.replace("kind: lstm", "kind: lstm\n  embedding: table"),
        ":4: model.embedding is table, but model.kind is lstm",
    ),
    "an LSTM compiled": (
        AN_LSTM + "engine:\n  compile: true\n",
        ":16: engine.compile compiles the blocks of a transformer, and model.kind is lstm: set it to false",
    ),
    "another kind of model": (
        GOOD.replace("n_layer: 2", "n_layer: 2\n  kind: lsmt"),
        ":4: model.kind must be one of transformer, lstm, not 'lsmt'. Did you mean lstm?",
    ),
    "bands without a width": (
        GOOD.replace("n_layer: 2", "n_layer: 2\n  attention: alternating"),
        ":2: model.window must be an integer of 1 to 16 where model.attention is alternating",
    ),
    "a width without bands": (
        GOOD.replace("n_layer: 2", "n_layer: 2\n  window: 4"),
        ":4: model.window is 4, but model.attention is dense: leave it out, or use attention: alternating",
    ),
    "a band wider than the context": (
        GOOD.replace("n_layer: 2", "n_layer: 2\n  attention: alternating\n  window: 17"),
        ":5: model.window must be at most model.context (16), not 17",
    ),
    "a slip in a pattern": (
        GOOD.replace("n_layer: 2", "n_layer: 2\n  attention: alternate"),
        ":4: model.attention must be one of dense, alternating, not 'alternate'. Did you mean alternating?",
    ),
    "a batch that is not whole": (
        GOOD.replace("batch_tokens: 64", "batch_tokens: 65"),
        ":12: train.batch_tokens must be a multiple of train.micro_batch_size x model.context (2 x 16 = 32), not 65",
    ),
    "a ramp that starts with no whole batch": (
        GOOD + "  batch_ramp_tokens: 500\n  batch_ramp_start: 48\n",
        ":16: train.batch_ramp_start must be a multiple of train.micro_batch_size x model.context (32) that divides "
        "train.batch_tokens (64), not 48",
    ),
    "a floor above the rate": (GOOD + "  min_lr: 1\n", ":15: train.min_lr must be at most train.lr"),
    "an early end of no cosine": (
        GOOD + "  decay_steps: 2\n  schedule: constant\n",
        ":15: train.decay_steps is for train.schedule: cosine, not constant",
    ),
    "an unknown word of a choice": (
        GOOD + "engine:\n  precision: bf61\n",
        ":16: engine.precision must be one of auto, fp32, bf16, fp16, not 'bf61'. Did you mean bf16?",
    ),
    "an unknown device": (
        GOOD + "engine:\n  device: gpu\n",
        ":16: engine.device must be one of auto, cpu, cuda, cuda:N",
    ),
    "parameters off the device below stage 3": (
        GOOD + "engine:\n  zero_stage: 2\n  offload_parameters: cpu\n",
        ":17: engine.offload_parameters needs engine.zero_stage 3, not 2: below it every GPU holds all parameters",
    ),
    "an optimizer off the device at stage 0": (
        GOOD + "engine:\n  zero_stage: 0\n  offload_optimizer: cpu\n",
        ":17: engine.offload_optimizer needs engine.zero_stage 1, 2 or 3, not 0",
    ),
    "an optimizer on a disk below stage 3": (
        GOOD + "engine:\n  offload_optimizer: nvme\n  nvme_folder: /fast\n",
        ":16: engine.offload_optimizer of nvme needs engine.zero_stage 3, not 1; stages 1 and 2 offload to cpu only",
    ),
    "a disk without a folder": (
        GOOD + "engine:\n  zero_stage: 3\n  offload_parameters: nvme\n",
        ":17: engine.offload_parameters is nvme, which needs engine.nvme_folder",
    ),
    "a folder for nothing": (
        GOOD + "engine:\n  zero_stage: 3\n  nvme_folder: /fast\n",
        ":17: engine.nvme_folder is set, but neither engine.offload_optimizer nor offload_parameters is nvme",
    ),
    "something off the device without DeepSpeed": (
        GOOD + "engine:\n  kind: single\n  offload_optimizer: cpu\n",
        ":17: engine.offload_optimizer needs DeepSpeed, but engine.kind is single: use engine.kind=deepspeed, or auto",
    ),
    "another place to offload to": (
        GOOD + "engine:\n  offload_optimizer: disk\n",
        ":16: engine.offload_optimizer must be one of none, cpu, nvme, not 'disk'",
    ),
    "a key of DeepSpeed's that is a setting of ours": (
        GOOD + "engine:\n  deepspeed:\n    zero_optimization:\n      overlap_comm: true\n      stage: 2\n",
        ":18: engine.deepspeed.zero_optimization.overlap_comm is not set there: use engine.overlap_comm",
    ),
    "a section of DeepSpeed's that is ours": (
        GOOD + "engine:\n  deepspeed:\n    fp16:\n      loss_scale_window: 5\n",
        ":18: engine.deepspeed.fp16.loss_scale_window is not set there: use engine.precision",
    ),
    "no keys of DeepSpeed's": (GOOD + "engine:\n  deepspeed:\n", ":16: engine.deepspeed must be a group of keys and"),
    "dropout of one": (GOOD.replace("n_layer: 2", "n_layer: 2\n  dropout: 1.0"), ":4: model.dropout must be a number"),
    "a rate that is no number": (GOOD.replace("3e-4", ".nan"), ":14: train.lr must be a number"),
    "a missing key": (GOOD.replace("  steps: 3\n", ""), "train.steps is missing; it must be an integer of at least 1"),
    "a missing section": (GOOD.replace("data:\n  path: stdlib\n", ""), "data is missing"),
    "a number for a section": (GOOD + "engine: 3\n", ":15: engine must be a group of settings: kind, zero_stage"),
    "a number for a name": (GOOD.replace("stdlib", "2024"), ":9: data.path must be text, not empty, not 2024."),
    "an empty name": (GOOD.replace("runs/x", "''"), ":1: out must be text, not empty"),
    "a key set twice": (GOOD + "out: b\n", ":15: out is set twice (first at"),
    "broken YAML": (GOOD + "engine: {kind: [\n", ":16: not valid YAML"),
    "a value that does not fit its tag": (GOOD.replace("runs/x", "!!bool z"), "not valid YAML"),
    "more layers than anybody has": (GOOD.replace("n_layer: 2", "n_layer: 100000"), "model.n_layer must be an integer"),
    "a tab": (GOOD + "engine:\n\tkind: auto\n", ":16: not valid YAML"),
    "an empty file": ("", "the file is empty"),
    "a list": ("- 1\n", ":1: the file must hold 'key: value' settings"),
    "a Python object": (GOOD.replace("runs/x", "!!python/object/apply:os.getcwd []"), ":1: not valid YAML"),
    "a merge key": ("a: &a {b: 1}\n<<: *a\n", ":2: YAML merge keys are not read here"),
}


@pytest.mark.parametrize(("text", "said"), IN_FILE.values(), ids=IN_FILE.keys())
def test_a_mistake_in_the_file_is_told_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert any(line.startswith(f"{path}") and said in line for line in str(caught.value).splitlines()), caught.value


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.stepz=3", "command line: train.stepz is not a setting. Did you mean train.steps?"),
        ("steps=3", "command line: steps is not a setting. Did you mean train.steps?"),
        ("train.steps=0", "command line: train.steps must be an integer of at least 1 and at most 1000000000, not 0."),
        ("train.steps", "command line: 'train.steps' is not a setting of the form key.sub=value."),
        ("train=3", "command line: train is not a setting."),
        ("train.lr=[", "command line: train.lr cannot be read from '['"),
        ("engine.deepspeed.optimizer.type=Adam", "command line: engine.deepspeed.optimizer.type is not set there: the"),
        ("engine.depspeed.aio.block_size=3", "command line: engine.depspeed.aio.block_size is not a setting."),
        ("out=", "command line: out must be text, not empty, not ''."),
        ("model.n_head=3", "must be a multiple of model.n_head (3), not 32. The nearest is 33"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(word: str, said: str, good: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(good, [word])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told_with_its_neighbour(good: Path) -> None:
    with pytest.raises(UserError, match=r"god\.yaml: no such file\. Did you mean .*good\.yaml\?"):
        load_config(good.with_name("god.yaml"))


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"out: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_config(path)


def test_micro_batches_count_the_whole_update(good: Path) -> None:
    config: Config = load_config(good, ["train.batch_tokens=128"])
    assert config.micro_batches == 4


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("labels", "a list or a group of keys and values or null"),
        ("text", "a list"),
        ("label", "text, not empty or an integer of at least 1 or null"),
        ("n_choices", "an integer of at least 2 and at most 100 or null"),
    ],
)
def test_a_setting_of_several_types_names_them_all(setting: str, words: str) -> None:
    field = TableConfig.model_fields[setting]
    assert describe(field.annotation, field.metadata) == words


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_every_shipped_task_is_read(path: Path) -> None:
    config = read_settings(FinetuneConfig, path)[0]
    assert config.task.data in {None, *DATA_SETS}
    assert read_settings(FinetuneConfig, path, ["train.lr=1e-3"])[0].train.lr == 1e-3
    with pytest.raises(UserError, match=r"train\.epoch is not a setting. Did you mean train\.epochs\?"):
        read_settings(FinetuneConfig, path, ["train.epoch=2"])


def test_the_defaults_of_fine_tuning_are_those_of_gpt1(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("out: x\npretrained: y\ntask: {data: sst2, train: z}\n")
    config = read_settings(FinetuneConfig, tmp_path / "task.yaml")[0]
    train, task = config.train, config.task
    assert (train.epochs, train.batch_size, train.lr, train.warmup_share) == (3, 32, 6.25e-5, 0.002)
    assert (train.schedule, train.optimizer, train.weight_decay, train.clip) == ("linear", "gpt1", 0.01, 1.0)
    assert (train.beta1, train.beta2, train.eps) == (0.9, 0.999, 1e-8)
    assert (task.lm_weight, task.dropout, train.dropout, task.transfer_blocks) == (0.5, 0.1, 0.1, None)
