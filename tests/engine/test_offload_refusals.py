"""What is asked for off the device, and cannot be on this machine; and which engine it takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgpt.config import Config
from fastgpt.engine.ranks import Ranks
from fastgpt.engine.zero import _swap_folder
from fastgpt.errors import SharedError
from fastgpt.launch import engine_kind
from fastgpt.settings import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "gpt2-124m.yaml"


def config(*words: str) -> Config:
    return load_config(CONFIG, [f"engine.{word}" for word in words])


def deepspeed(*, has_libaio: bool) -> Any:
    """As much of DeepSpeed as is asked whether it can read and write a disk."""
    builder = SimpleNamespace(is_compatible=lambda verbose: has_libaio)
    return SimpleNamespace(ops=SimpleNamespace(op_builder=SimpleNamespace(AsyncIOBuilder=lambda: builder)))


def test_a_machine_without_libaio_is_told_what_to_install(tmp_path: Path) -> None:
    asked = config("zero_stage=3", "offload_optimizer=nvme", f"nvme_folder={tmp_path}")
    with pytest.raises(SharedError, match=r"libaio.*apt install libaio-dev.*or offload to cpu") as caught:
        _swap_folder(asked, deepspeed(has_libaio=False), Ranks())
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    asked = config("zero_stage=3", "offload_parameters=nvme", f"nvme_folder={tmp_path / 'nothing'}")
    with pytest.raises(SharedError, match=r"engine.nvme_folder: .*nothing cannot be used: No such file or directory"):
        _swap_folder(asked, deepspeed(has_libaio=True), Ranks())


def test_nobody_who_asks_for_no_disk_is_asked_for_libaio() -> None:
    assert _swap_folder(config("zero_stage=3", "offload_optimizer=cpu"), deepspeed(has_libaio=False), Ranks()) is None


def test_one_process_takes_deepspeed_where_anything_is_offloaded() -> None:
    assert engine_kind(config(), None) == "single"
    assert engine_kind(config("offload_optimizer=cpu"), None) == "deepspeed"
    assert engine_kind(config("zero_stage=3", "offload_parameters=cpu"), None) == "deepspeed"
