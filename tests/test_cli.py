"""The command line: what works, and what a user is told about bad input: one line, exit code 2, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt.cli import main

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the small run's settings in a folder of this test's own."""
    for name in ("text.jsonl", "tiny.yaml"):
        shutil.copy(tiny.parent / name, tmp_path / name)
    path = tmp_path / "tiny.yaml"
    path.write_text(path.read_text().replace(str(tiny.parent), str(tmp_path)))
    return path


@pytest.fixture(scope="module")
def shards(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of token shards of the small corpus."""
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    source = str(tiny.parent / "text.jsonl")
    assert main(["prepare", source, str(folder), "--vocab-size", "400", "--validation-fraction", "0.1"]) == 0
    return folder


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must be refused."""
    capsys.readouterr()
    assert main(words) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    lines = [line for line in output.err.splitlines() if line.startswith("fastgpt: error")]
    assert len(lines) == 1, output.err
    assert output.err.splitlines()[-1] == lines[0], output.err
    return lines[0]


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# words after `train CONFIG`, and what the line must say
BAD_TRAIN = {
    "a misspelt key": ("train.stepz=3", "train.stepz is not a setting. Did you mean train.steps?"),
    "a wrong type": ("train.lr=high", "train.lr must be a number above 0, not 'high'"),
    "heads that do not divide": ("model.n_head=3", "must be a multiple of model.n_head (3)"),
    "a batch that is not whole": ("train.batch_tokens=500", "must be a multiple of train.micro_batch_size x"),
    "a vocabulary below bytes": ("model.vocab_size=200", "vocab"),
    "an unknown device": ("engine.device=tpu", "engine.device must be one of auto, cpu, cuda, cuda:N, not 'tpu'"),
    "a GPU that is not there": ("engine.device=cuda:7", "engine.device: cuda:7 asks for GPU 7"),
    "fp16 on a CPU": ("engine.precision=fp16", "fp16 needs a GPU"),
    "an unknown backend": ("kernels.backend=tritn", "Did you mean triton?"),
    "a stage that does not exist": ("engine.zero_stage=4", "engine.zero_stage must be one of 0, 1, 2, 3, not 4"),
    "no such corpus": ("data.path=nowhere.txt", "nowhere.txt"),
    "no such tokenizer": ("data.tokenizer=nowhere", "nowhere"),
    "a context longer than the text": ("model.context=65536 train.batch_tokens=131072", "context"),
    "a choice that is neither": ("engine.compile=maybe", "engine.compile must be true or false, not 'maybe'"),
    "a number of steps without end": ("train.steps=1000000000000000000000000000000", "train.steps must be"),
    "a word that is no setting": ("faster", "'faster' is not a setting of the form key.sub=value"),
    "an option that does not exist": ("--fast", "--fast is not an argument"),
    "resume of nothing": ("--resume", "no checkpoint"),
}


@pytest.mark.parametrize(("words", "said"), BAD_TRAIN.values(), ids=BAD_TRAIN.keys())
def test_a_bad_setting_is_one_line(words: str, said: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(own.parent)
    line = refused(["train", str(own), *words.split()], capsys)
    assert said in line
    # prepared text may be kept for the next try; of the run itself nothing is written
    assert {p for p in tree(own.parent) - before if not p.startswith("cache")} == set()


BAD_CORPUS: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("text.jsonl", b"", "text"),
    "an empty document": ("text.jsonl", b'{"text": ""}\n', "text"),
    "a broken line": ("text.jsonl", b'{"text": "a"}\n{"text": \n', "text.jsonl:2"),
    "a line without text": ("text.jsonl", b'{"text": "a"}\n{"tetx": "b"}\n', "text.jsonl:2"),
    "text that is a number": ("text.jsonl", b'{"text": 3}\n', "text.jsonl:1"),
    "bytes that are no UTF-8": ("text.txt", b"good \xff\xfe bad", "text.txt"),
    "a single document": ("text.txt", b"only one document", "document"),
    "a torn gzip": ("text.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03abc", "text.jsonl.gz"),
    "another kind of file": ("text.pdf", b"%PDF", ".txt"),
}


@pytest.mark.parametrize(("name", "content", "said"), BAD_CORPUS.values(), ids=BAD_CORPUS.keys())
def test_a_bad_corpus_is_one_line(
    name: str, content: bytes, said: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = own.parent / "corpus"
    corpus.mkdir()
    (corpus / name).write_bytes(content)
    line = refused(["train", str(own), f"data.path={corpus}"], capsys)
    assert said in line
    assert not (own.parent / "run").exists()


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "train-00000.bin", 100)


def damage_flip(folder: Path) -> None:
    data = bytearray((folder / "train-00000.bin").read_bytes())
    data[1000] ^= 1
    (folder / "train-00000.bin").write_bytes(data)


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def damage_missing(folder: Path) -> None:
    (folder / "validation-00000.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_truncate, "train-00000.bin"),
        (damage_flip, "train-00000.bin"),
        (damage_manifest, "manifest.json"),
        (damage_missing, "validation-00000.bin"),
    ],
    ids=["truncated", "flipped", "manifest", "missing"],
)
def test_damaged_shards_are_one_line(
    damage: Callable[[Path], None], said: str, shards: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = own.parent / "shards"
    shutil.copytree(shards, copy)
    damage(copy)
    assert said in refused(["train", str(own), f"data.path={copy}"], capsys)
    assert not (own.parent / "run").exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_one_line(
    shards: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["train", str(own), f"data.path={shards}", "model.vocab_size=300"], capsys)
    assert "300" in line
    assert "400" in line


def test_a_missing_settings_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean configs/quickstart.yaml?" in refused(["train", "configs/quikstart.yaml"], capsys)


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean train?" in refused(["trian", "x.yaml"], capsys)


def test_generate_from_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in refused(["generate", str(tmp_path)], capsys)


def test_a_corpus_that_changed_under_a_run_is_one_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(own), "train.steps=2"]) == 0
    with (own.parent / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "something new"}) + "\n")
    assert "no longer gives the tokens" in refused(["train", str(own), "train.steps=3"], capsys)


def test_triton_without_a_gpu_is_one_line(own: Path, command: Command) -> None:
    """In a process of its own: the kernels' tests have loaded Triton's interpreter into this one."""
    outcome = command(sys.executable, "-m", "fastgpt", "train", own, "kernels.backend=triton")
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("fastgpt: error: kernels.backend: ")
    assert "Set kernels.backend to 'torch'" in line
    assert not (own.parent / "run").exists()


def test_settings_are_refused_before_anything_heavy_is_imported(own: Path, environment: dict[str, str]) -> None:
    program = (
        "import sys; from fastgpt.cli import main; code = main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'triton', 'deepspeed', 'numpy', 'tokenizers') if m in sys.modules])"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program, "train", str(own), "train.stepz=1"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert outcome.stdout.strip() == "2 []"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["bench", "start", "--help"]])
def test_help_loads_nothing_heavy(words: list[str], environment: dict[str, str]) -> None:
    program = (
        "import sys, contextlib; from fastgpt.cli import main\n"
        "with contextlib.suppress(SystemExit): main(sys.argv[1:])\n"
        "print({m.partition('.')[0] for m in sys.modules} - {*sys.stdlib_module_names, '__main__'}, file=sys.stderr)"
    )
    # without `site`, whose .pth files load what they like
    outcome = subprocess.run(
        [sys.executable, "-S", "-c", program, *words], env=environment, capture_output=True, text=True
    )
    assert outcome.stdout.startswith("usage: fastgpt") and outcome.stderr.strip() == "{'fastgpt'}"


def test_ranks_that_do_not_divide_the_batch_are_refused(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refused(["train", str(own)], capsys)
    assert "8 micro-batches, which cannot be dealt evenly to 3 ranks; it must be a multiple of 192" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "single runs on one process" in refused(["train", str(own), "engine.kind=single"], capsys)


def test_only_rank_0_speaks_of_what_every_rank_sees(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--local_rank=1", "train", str(own), "train.stepz=1"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("out", ["text.jsonl", "text.jsonl/run", "x" * 300])
def test_a_run_folder_that_cannot_be_is_one_line(out: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert out in refused(["train", str(own), f"out={own.parent / out}"], capsys)


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "two")])
def test_a_launchers_variable_that_is_no_number_is_one_line(
    name: str, value: str, own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, good in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(variable, value if variable == name else good)
    assert f"{name} must be an integer" in refused(["train", str(own)], capsys)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert {"train", "prepare", "generate"} <= set(capsys.readouterr().out.split())


def test_an_internal_error_keeps_its_traceback(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastgpt.train.command as train_command

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(train_command, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", str(own)])
