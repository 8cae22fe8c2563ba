import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data.encoding import Encoded
from fastgpt.data.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_FOLDER, Manifest, dtype_for
from fastgpt.data.shards import TokenShards
from fastgpt.data.writer import SplitWriter
from fastgpt.tokenizer import Tokenizer, train_tokenizer

WriteShards = Callable[..., TokenShards]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, or a skip."""
    folder = Path(os.environ.get("FASTGPT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}; set FASTGPT_DATA")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["some words to learn; words of some text\n" * 9]), 270)


@pytest.fixture
def write_shards(tmp_path: Path, tokenizer: Tokenizer) -> WriteShards:
    """Write lists of ids (one a document) as both splits of a folder, and open one of them."""

    def write(
        *documents: Sequence[int],
        split: str = "train",
        shard_tokens: int = 1 << 20,
        vocab_size: int = tokenizer.vocab_size,
        folder: Path = tmp_path / "shards",
    ) -> TokenShards:
        folder.mkdir()
        tokenizer.save(folder / TOKENIZER_FOLDER)
        dtype = dtype_for(vocab_size)
        splits = {}
        for name in SPLITS:
            writer = SplitWriter(folder, name, shard_tokens)
            for ids in documents:
                array = np.array(ids, dtype)
                writer.add(Encoded(array, np.array([len(ids)], np.int64), len(tokenizer.decode_bytes(ids))))
            splits[name] = writer.finish()
        manifest = Manifest(dtype, vocab_size, tokenizer.fingerprint(), splits)
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        return TokenShards.open(folder, split)

    return write
