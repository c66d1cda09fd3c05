"""The rate that a sweep chooses, against numpy's own parabola."""

from __future__ import annotations

import numpy as np
import pytest

from dora_lab.report.rates import choose

GRID = [1e-3 * 2**step for step in range(7)]


def test_a_parabola_is_found_between_the_rates_of_the_grid():
    vertex = np.log2(GRID[3]) + 0.3
    choice = choose({rate: [1 + (np.log2(rate) - vertex) ** 2 + noise for noise in (-0.1, 0.1)] for rate in GRID}, 2)
    assert choice is not None and choice.lowest == GRID[3] and not choice.at_end
    assert choice.rate == float(f"{2**vertex:.1e}")


@pytest.mark.parametrize("values", [(3.0, 1.0, 1.2), (1.05, 1.0, 5.0), (2.0, 1.0, 1.0)])
def test_the_vertex_is_that_of_three_points(values: tuple[float, float, float]):
    a, b, _ = np.polyfit(np.log2(GRID[2:5]), values, 2)
    losses = {rate: [9.0] for rate in GRID} | {rate: [value] for rate, value in zip(GRID[2:5], values, strict=True)}
    choice = choose(losses, 1)
    assert choice is not None and choice.rate == float(f"{2 ** (-b / (2 * a)):.1e}")
    assert abs(np.log2(choice.rate / GRID[3])) <= 0.55


def test_an_end_and_a_missing_neighbour_give_the_rate_of_the_grid_and_are_said():
    falling = choose({rate: [-i] for i, rate in enumerate(GRID)}, 1)
    assert falling is not None and falling.at_end and falling.rate == float(f"{GRID[-1]:.1e}")
    losses = {rate: [abs(i - 3.0), abs(i - 3.2)] for i, rate in enumerate(GRID)}
    losses[GRID[4]] = [float("nan"), 0.8]
    lame = choose(losses, 2)
    assert lame is not None and lame.lowest == GRID[3] and lame.losses[GRID[4]] is None
    assert lame.rate == float(f"{GRID[3]:.1e}")
    assert choose({rate: [1.0] for rate in GRID}, 2) is None  # one seed of two


def test_an_uneven_grid_is_refused():
    with pytest.raises(ValueError, match="equally far apart"):
        choose({1e-3: [1.0], 2e-3: [1.0], 5e-3: [1.0]}, 1)
