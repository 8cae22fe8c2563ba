import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.sampler import Sampler


@given(windows=st.integers(1, 500), seed=st.integers(), first_epoch=st.integers(0, 10**9))
def test_every_epoch_visits_every_window_once(windows: int, seed: int, first_epoch: int) -> None:
    samples = first_epoch * windows + np.arange(3 * windows)
    epochs = np.sort(Sampler(windows, seed).index(samples).reshape(3, windows))
    assert (epochs == np.arange(windows)).all()


@given(windows=st.integers(1, 2**40), seed=st.integers(), samples=st.lists(st.integers(0, 2**62), max_size=9))
def test_each_sample_is_found_alone_as_in_a_crowd(windows: int, seed: int, samples: list[int]) -> None:
    sampler = Sampler(windows, seed)
    together = sampler.index(np.array(samples, np.int64))
    assert ((together >= 0) & (together < windows)).all()
    assert [int(sampler.index(np.array([sample]))[0]) for sample in samples] == together.tolist()


def test_shape_is_kept() -> None:
    samples = np.arange(24).reshape(2, 3, 4)
    windows = Sampler(1000, 1).index(samples)
    assert windows.shape == (2, 3, 4) and windows.dtype == np.int64
    assert (windows.ravel() == Sampler(1000, 1).index(samples.ravel())).all()


@pytest.mark.parametrize("windows", [50, 1000, 4097])
def test_epochs_and_seeds_differ(windows: int) -> None:
    orders = [Sampler(windows, seed).index(np.arange(5 * windows)).reshape(5, windows) for seed in (0, 1, -1)]
    distinct = np.unique(np.concatenate(orders), axis=0)
    assert len(distinct) == 15


def test_small_epochs_take_every_order() -> None:
    orders = Sampler(4, 7).index(np.arange(4 * 2000)).reshape(2000, 4)
    assert len(np.unique(orders, axis=0)) == 24


def test_windows_are_spread_evenly_over_places() -> None:
    # 63 * 63 degrees of freedom: mean 3969, standard deviation 89; six deviations would be a chance of 1e-9
    epochs, windows = 4000, 64
    orders = Sampler(windows, 3).index(np.arange(windows * epochs)).reshape(epochs, windows)
    counts = np.zeros((windows, windows))
    np.add.at(counts, (np.broadcast_to(np.arange(windows), orders.shape), orders), 1)
    expected = epochs / windows
    assert abs(((counts - expected) ** 2 / expected).sum() - 3969) < 6 * 89


def test_neighbours_are_not_sampled_together() -> None:
    order = Sampler(10_000, 0).index(np.arange(10_000))
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 6 / np.sqrt(10_000)  # six standard deviations
    assert np.count_nonzero(np.diff(order) == 1) < 10


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    # a change here would change the data of a run that is resumed
    expected = [6, 0, 7, 4, 9, 8, 1, 2, 3, 5, 0, 5, 1, 3, 9, 4, 2, 6, 8, 7]
    assert Sampler(10, 42).index(np.arange(20)).tolist() == expected


def test_no_windows_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one window"):
        Sampler(0, 1)
