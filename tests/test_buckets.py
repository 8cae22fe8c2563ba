"""How much is communicated, gathered and swapped at once, for models of every size."""

from pathlib import Path

import pytest

from fastgpt import buckets
from fastgpt.config import Config
from fastgpt.settings import load_config
from fastgpt.sizes import block_parameters, largest_matrix, parameter_count

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def of(name: str, *words: str) -> Config:
    return load_config(CONFIGS[0].parent / f"{name}.yaml", words)


@pytest.mark.parametrize(
    ("name", "reduced"),
    [
        ("quickstart", 4_273_664),  # all of it
        ("gpt2-124m", 8_388_608),  # 32 MiB in fp32
        ("gpt2-355m", 22_176_448),  # a sixteenth
        ("gpt2-1558m", 97_350_700),
        ("gpt3-13b", 500_000_000),  # as much as DeepSpeed takes by itself
    ],
)
def test_a_reduction_takes_a_sixteenth_of_the_model_within_limits(name: str, reduced: int) -> None:
    assert buckets.reduced(of(name)) == reduced


def test_what_is_asked_for_is_reduced_but_no_more_than_there_is() -> None:
    assert buckets.reduced(of("gpt2-124m", "engine.reduce_bucket_size=1000")) == 1000
    assert buckets.reduced(of("gpt2-124m", "engine.reduce_bucket_size=1000000000")) == 124_439_808


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 8, 1024])
def test_every_model_has_room_for_what_it_uses_at_once(path: Path, ranks: int) -> None:
    model = load_config(path).model
    parameters = parameter_count(model)
    assert min(block_parameters(model), buckets.LARGEST_REDUCED) <= buckets.prefetched(model) <= parameters
    assert buckets.prefetched(model) <= buckets.live(model) <= parameters
    assert buckets.kept_for_reuse(model) < parameters
    assert buckets.swapped_weight(model, ranks) * ranks >= largest_matrix(model)
    # four buffers of a part: no more than half of what a rank has to swap, but for the smallest parts
    part = buckets.swapped(model, ranks)
    assert part == buckets.SMALLEST_PART or 4 * 4 * part <= 12 * parameters / ranks


def test_sizes_of_a_block_and_of_the_largest_matrix_are_those_of_the_model() -> None:
    from fastgpt_kernels import load_ops

    from fastgpt.model.gpt import GPT

    model = of("quickstart").model
    gpt = GPT(model, load_ops("torch"))
    assert block_parameters(model) == sum(p.numel() for p in gpt.blocks[0].parameters())
    assert largest_matrix(model) == max(p.numel() for p in gpt.parameters())
