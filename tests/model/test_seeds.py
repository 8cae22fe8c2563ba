from hypothesis import given
from hypothesis import strategies as st

from fastgpt.model.seeds import _splitmix64, fold

integers = st.integers(-(2**70), 2**70)


@given(integers, st.lists(integers))
def test_a_folded_seed_is_a_non_negative_63_bit_integer(seed: int, data: list[int]) -> None:
    assert 0 <= fold(seed, *data) < 2**63


def test_splitmix64_gives_the_sequence_that_its_authors_publish_for_1234567() -> None:
    golden = 0x9E3779B97F4A7C15
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [_splitmix64(1234567 + i * golden) for i in range(5)] == expected


def test_every_argument_its_place_and_their_number_change_the_seed() -> None:
    calls = [(seed, *data) for seed in range(10) for data in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]]
    assert len({fold(*call) for call in calls}) == len(calls)


def test_neighbouring_arguments_give_unrelated_bits() -> None:
    seeds = [fold(0, layer, site) for layer in range(40) for site in range(5)]
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert 60 <= ones <= 140  # 200 fair coins leave this range once in 10^7 times
