"""The corpus of a run: its bytes are read while the model is built."""

import threading
from pathlib import Path

import pytest

from fastgpt.data.shards import TokenShards
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import UserError
from fastgpt.settings import load_config
from fastgpt.train.corpus import prepare_corpus
from fastgpt.train.display import SilentDisplay


def test_nobody_waits_for_the_bytes_until_he_asks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, read = threading.Event(), []

    def verify(shards: TokenShards) -> None:
        assert may_end.wait(60)
        read.append(shards.split)

    monkeypatch.setattr(TokenShards, "verify", verify)
    corpus = prepare_corpus(load_config(tiny), Ranks(), SilentDisplay())
    assert read == []
    may_end.set()
    corpus.verified()
    assert read == ["train", "validation"]


def test_bytes_that_have_changed_are_told_to_whoever_waits(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(shards: TokenShards) -> None:
        raise UserError("its bytes have changed")

    monkeypatch.setattr(TokenShards, "verify", verify)
    corpus = prepare_corpus(load_config(tiny), Ranks(), SilentDisplay())
    with pytest.raises(UserError, match="its bytes have changed"):
        corpus.verified()
    unasked = prepare_corpus(load_config(tiny, ["data.verify=false"]), Ranks(), SilentDisplay())
    unasked.verified()
    assert unasked[:2] == corpus[:2]
