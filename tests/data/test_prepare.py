import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastgpt
from fastgpt.data.manifest import read_manifest
from fastgpt.data.prepare import prepare, prepare_cached
from fastgpt.data.shards import TokenShards
from fastgpt.data.sources import read_documents
from fastgpt.data.splitting import SplitRule
from fastgpt.data.writer import HashedFile
from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

WORDS = [
    "lorem",
    "ipsum",
    "dolor",
    "sit",
    "amet,",
    "consectetur",
    "한국어",
    "do\r\n",
    "naïve",
    "😀",
    "it's",
    "\n\n",
    "2024",
]


def text(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 documents in three files, some of them blank, one with the special token in its text."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [text(number, 1 + number * 7 % 300) for number in range(120)]
    documents[5] = "a <|endoftext|> in a text"
    documents[7] = " \n"
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    parted = "\n<|endoftext|>\n".join(text(number, 40) for number in range(200, 230))
    (folder / "b.txt").write_text(parted, encoding="utf-8", newline="")
    (folder / "c.txt").write_text(text(9, 30_000), encoding="utf-8", newline="")
    return folder


@pytest.fixture
def tokenizer_folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(tmp_path / "bpe")
    return tmp_path / "bpe"


def content(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_shards_hold_every_document_once_led_by_the_special_token(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(
        corpus, tmp_path / "out", vocab_size=320, validation_fraction=0.1, seed=3, shard_tokens=5000, workers=1
    )
    assert manifest == read_manifest(tmp_path / "out")
    documents = list(read_documents(corpus))
    assert 150 < len(documents) < 170
    rule = SplitRule(0.1, 3)
    found = {}
    for split in ("train", "validation"):
        shards = TokenShards.open(tmp_path / "out", split)
        bpe = shards.tokenizer()
        ids = shards.slice(0, len(shards)).tolist()
        assert max(ids) < shards.vocab_size == manifest.vocab_size <= 320
        bounds = [*shards.document_starts().tolist(), len(shards)]
        assert all(ids[start] == bpe.end_of_text for start in bounds[:-1])
        assert ids.count(bpe.end_of_text) == shards.documents, "no special token comes from the text"
        found[split] = [bpe.decode(ids[start:stop]) for start, stop in pairwise(bounds)]
        assert shards.bytes == sum(len(one.encode()) for one in found[split])
    assert found["train"] == [one for number, one in enumerate(documents) if not rule.is_validation(number)]
    assert found["validation"] == [one for number, one in enumerate(documents) if rule.is_validation(number)]
    assert len(manifest.splits["train"].shards) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", ["auto", "given"])
def test_the_number_of_workers_does_not_change_a_byte(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt.data.prepare.BATCH_CHARACTERS", 20_000)  # many batches
    chosen = "auto" if kind == "auto" else tokenizer_folder
    outputs = [tmp_path / f"out-{workers}" for workers in (1, 2)]
    for workers, output in enumerate(outputs, 1):
        prepare(corpus, output, tokenizer=chosen, vocab_size=300, shard_tokens=7000, workers=workers)
    assert content(outputs[0]) == content(outputs[1])
    assert len(content(outputs[0])) > 8


def test_the_seed_changes_the_split_and_the_fraction_its_size(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    def validation(seed: int, fraction: float) -> tuple[int, int]:
        output = tmp_path / f"{seed}-{fraction}"
        manifest = prepare(
            corpus,
            output,
            tokenizer=tokenizer_folder,
            vocab_size=300,
            validation_fraction=fraction,
            seed=seed,
            workers=1,
        )
        return manifest.splits["validation"].documents, manifest.splits["validation"].bytes

    assert validation(1, 0.02) != validation(2, 0.02)
    assert validation(1, 0.5)[0] > 70 > 20 > validation(1, 0.1)[0] > 10


def test_a_tokenizer_is_trained_on_the_training_documents_alone(tmp_path: Path) -> None:
    rule = SplitRule(0.5, 0)
    documents = ["zyx zyx zyx zyx" if rule.is_validation(number) else "abc abc abc abc" for number in range(20)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    prepare(tmp_path / "a.txt", tmp_path / "out", vocab_size=300, validation_fraction=0.5, workers=1)
    bpe = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert len(bpe.encode(" abc")) == 1 and len(bpe.encode(" zyx")) == 4


def test_a_vocabulary_of_more_than_65536_takes_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "bpe")
    saved = json.loads((tmp_path / "bpe" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    # a vocabulary of tokens that no merge makes, with the ones in use at its end
    letters = sorted(token for token in saved if len(token) == 1)
    fillers = [a + b + c for a in letters[:41] for b in letters[:41] for c in letters[:41]]
    vocab = {token: index for index, token in enumerate([*fillers, *letters, "<|endoftext|>"])}
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "big" / "merges.txt").write_text("", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo", encoding="utf-8")
    manifest = prepare(
        tmp_path / "a.txt", tmp_path / "out", tokenizer=tmp_path / "big", vocab_size=len(vocab), workers=1
    )
    assert manifest.dtype == "uint32"
    shards = TokenShards.open(tmp_path / "out", "train")
    assert shards.slice(0, 1).tolist() == [len(vocab) - 1]
    assert shards.tokenizer().decode(shards.slice(0, len(shards)).tolist()) in ("one\n", "two")


@pytest.mark.parametrize(("tokenizer_name", "readings"), [("bpe", 1), ("auto", 2)])
def test_progress_is_told_up_to_the_end(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, tokenizer_name: str, readings: int
) -> None:
    size = sum(path.stat().st_size for path in corpus.iterdir())
    chosen = "auto" if tokenizer_name == "auto" else tokenizer_folder
    calls: list[tuple[int, int, int | None]] = []
    prepare(
        corpus, tmp_path / "out", tokenizer=chosen, vocab_size=300, workers=1, progress=lambda *call: calls.append(call)
    )
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[-1] == readings * size
    assert {call[2] for call in calls} == {readings * size}
    assert calls[-1][0] == len(list(read_documents(corpus)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, "vocab_size 256 is too small to train a tokenizer; .* at least 257"),
        (
            {"tokenizer": "GIVEN", "vocab_size": 269},
            "the tokenizer has 270 entries, more than vocab_size 269; set vocab_size to 270",
        ),
        ({"tokenizer": "nowhere"}, "nowhere: not a folder; a tokenizer is"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"path": "nowhere"}, "nowhere: no such file or folder"),
        ({"text_key": "body"}, "a.jsonl:1: no key 'body'"),
        ({"validation_fraction": 0}, "validation_fraction must be above 0"),
        ({"output": "TAKEN"}, "TAKEN: already exists; remove it, or choose another folder"),
    ],
)
def test_what_cannot_be_prepared_is_refused_and_leaves_nothing(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "TAKEN").mkdir()
    arguments = {"path": corpus, "output": tmp_path / "out", "vocab_size": 300, "workers": 1, **settings}
    if arguments.get("tokenizer") == "GIVEN":
        arguments["tokenizer"] = tokenizer_folder
    if arguments["output"] == "TAKEN":
        arguments["output"] = tmp_path / "TAKEN"
    with pytest.raises(UserError, match=message) as raised:
        prepare(**arguments)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["TAKEN", "bpe"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_of_one_document_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "alone"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"one document, .* put a line <\|endoftext\|> between documents"):
        prepare(tmp_path / name, tmp_path / "out", vocab_size=300, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: HashedFile, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(UserError, match=r"out: cannot be written: .*No space left on device"):
        prepare(corpus, tmp_path / "out", tokenizer=tokenizer_folder, vocab_size=300, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bpe"]


def test_an_output_below_a_file_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out: cannot be written: .*(Not a directory|File exists)"):
        prepare(corpus, tmp_path / "file" / "out", vocab_size=300, workers=1)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """16 MB of text: some seconds of work."""
    (tmp_path / "large.txt").write_text((text(1, 30_000) + "\n") * 80, encoding="utf-8", newline="")
    return tmp_path / "large.txt"


def test_a_worker_that_dies_is_reported_and_the_others_are_stopped(
    large: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    def kill_one(*_: object) -> None:
        for pid in children(os.getpid())[:1]:
            os.kill(int(pid), signal.SIGKILL)

    with pytest.raises(UserError, match=r"a worker process died \(exit code -9\), perhaps for want of memory"):
        prepare(large, tmp_path / "out", tokenizer=tokenizer_folder, vocab_size=300, workers=2, progress=kill_one)
    assert children(os.getpid()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe", "large.txt"]


@pytest.mark.parametrize("kind", ["standard input", "file"])
def test_a_script_needs_no_guard_for_its_workers(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, kind: str
) -> None:
    (tmp_path / "script.py").write_text(PREPARE, encoding="utf-8")
    (tmp_path / "json.py").write_text("raise RuntimeError('not the real json')", encoding="utf-8")
    command = [sys.executable, "-P", "-" if kind == "standard input" else str(tmp_path / "script.py")]
    command += [str(corpus), str(tmp_path / "out"), str(tokenizer_folder)]
    subprocess.run(command, input=PREPARE, text=True, check=True, cwd=tmp_path, env=with_this_package())
    TokenShards.open(tmp_path / "out", "train")


def with_this_package() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(fastgpt.__file__).parents[1])}


def test_an_interrupt_stops_the_workers_and_leaves_nothing(large: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    def interrupt(*_: object) -> None:
        if children(os.getpid()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(large, tmp_path / "out", tokenizer=tokenizer_folder, vocab_size=300, workers=2, progress=interrupt)
    assert children(os.getpid()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe", "large.txt"]


PREPARE = """
import sys
from fastgpt.data.prepare import prepare
prepare(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], vocab_size=300, workers=2)
"""


def test_a_killed_process_leaves_no_output_no_workers_and_nothing_in_the_way(
    large: Path, tmp_path: Path, tokenizer_folder: Path, corpus: Path
) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", PREPARE, str(large), str(output), str(tokenizer_folder)])
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob(".out.partial-*/train-00000.bin")))
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert list(tmp_path.glob(".out.partial-*")) != []
    wait_for(lambda: not any(is_running(pid) for pid in workers))
    prepare(corpus, output, tokenizer=tokenizer_folder, vocab_size=300, workers=1)
    TokenShards.open(output, "train")
    assert list(tmp_path.glob(".*")) == []


def children(pid: int) -> list[str]:
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_in_the_cache_is_not_prepared_again(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    calls: list[object] = []
    arguments: dict[str, Any] = {"tokenizer": tokenizer_folder, "vocab_size": 300}
    folder = prepare_cached(corpus, tmp_path / "cache", progress=lambda *call: calls.append(call), **arguments)
    assert calls
    calls.clear()
    again = prepare_cached(corpus, tmp_path / "cache", progress=lambda *call: calls.append(call), **arguments)
    assert again == folder and not calls
    assert folder.parent == tmp_path / "cache" and folder.name.startswith("corpus")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    TokenShards.open(folder, "validation")


def test_the_cache_tells_apart_all_that_decides_the_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "a.jsonl"

    def write(words: str) -> None:
        path.write_text(f'{{"text": "{words}", "body": "b"}}\n' * 9, encoding="utf-8")

    def folder(**settings: Any) -> Path:
        return prepare_cached(path, tmp_path / "cache", **{"vocab_size": 300, **settings})

    write("one two")
    first = folder()
    other = [
        folder(vocab_size=299),
        folder(seed=1),
        folder(validation_fraction=0.2),
        folder(text_key="body"),
        folder(tokenizer=tokenizer_folder),
    ]
    assert folder(tokenizer=tokenizer_folder, vocab_size=400) == other[-1], "a given tokenizer is what it is"
    write("one twO")
    other.append(folder())
    assert len({first, *other}) == 7
    write("one two")
    assert folder() == first


def test_two_processes_that_want_the_same_text_make_it_once(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from fastgpt.data.prepare import prepare_cached; calls = []\n"
        "folder = prepare_cached(sys.argv[1], sys.argv[2], vocab_size=300, progress=lambda *call: calls.append(call))\n"
        "print(bool(calls), folder)"
    )
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0].split() for process in processes]
    assert sorted(made for made, _ in outputs) == ["False", "False", "True"]
    assert len({folder for _, folder in outputs}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    TokenShards.open(outputs[0][1], "train")


def test_without_locks_the_second_to_finish_uses_what_the_first_made(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt.data.atomic.acquire", lambda _: False)
    winners: list[Path] = []
    arguments: dict[str, Any] = {"tokenizer": tokenizer_folder, "vocab_size": 300}

    def overtake(*_: object) -> None:
        if not winners:
            winners.append(tmp_path)
            winners.append(prepare_cached(corpus, tmp_path / "cache", **arguments))

    folder = prepare_cached(corpus, tmp_path / "cache", progress=overtake, **arguments)
    assert winners[1] == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    TokenShards.open(folder, "train")


def test_a_folder_of_shards_is_used_as_it_is_where_it_fits(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    out = tmp_path / "out"
    prepare(corpus, out, tokenizer=tokenizer_folder, vocab_size=300, workers=1)
    assert prepare_cached(out, tmp_path / "cache", vocab_size=270) == out
    assert prepare_cached(str(out), tmp_path / "cache", tokenizer=tokenizer_folder, vocab_size=5000) == out
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="has 270 entries, more than vocab_size 269"):
        prepare_cached(out, tmp_path / "cache", vocab_size=269)
    train_tokenizer(iter(["other words"] * 9), 265).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"were not made by the tokenizer in .*other; prepare the text again"):
        prepare_cached(out, tmp_path / "cache", tokenizer=tmp_path / "other", vocab_size=300)
    (out / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest.json: format is missing"):
        prepare_cached(out, tmp_path / "cache", vocab_size=300)
