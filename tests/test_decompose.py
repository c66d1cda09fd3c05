"""The mathematics of magnitude and direction, checked where float32 is thin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dora_lab import decompose
from dora_lab.decompose import delta_d, delta_m, direction, magnitude


def reference(W0: Tensor, W: Tensor) -> tuple[float, float]:
    """Equations 3 and 4 as the textbook writes them, in float64."""
    W0, W = W0.double(), W.double()
    norm0, norm = W0.pow(2).sum(1).sqrt(), W.pow(2).sum(1).sqrt()
    cosine = (W0 * W).sum(1) / (norm0 * norm)
    return (norm - norm0).abs().mean().item(), (1 - cosine).mean().item()


def pair(change: float, shape: tuple[int, int] = (96, 256), scale: float = 0.02) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(shape, generator=generator) * scale
    return W0, W0 + torch.randn(shape, generator=generator) * scale * change


def test_one_magnitude_per_output_feature() -> None:
    W = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])  # two outputs, three inputs
    assert magnitude(W).tolist() == [5.0, 2.0]
    assert torch.equal(direction(W), torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))
    assert magnitude(W.bfloat16()).dtype == torch.float32
    assert magnitude(W.double()).dtype == torch.float64


def test_a_case_by_hand() -> None:
    W0 = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    W = torch.tensor([[0.0, 3.0], [0.0, 1.0]])  # turned by 90 degrees and 2 longer; only 1 shorter
    assert delta_m(W0, W) == pytest.approx(1.5)
    assert delta_d(W0, W) == pytest.approx(0.5)


@pytest.mark.parametrize("change", [1e-4, 1e-3, 1e-2, 0.3])
def test_small_changes_are_right_to_one_percent(change: float) -> None:
    W0, W = pair(change)
    expected_m, expected_d = reference(W0, W)
    assert delta_d(W0, W) == pytest.approx(expected_d, rel=0.01)
    assert delta_m(W0, W) == pytest.approx(expected_m, rel=0.01)


def test_the_textbook_formula_would_not_do() -> None:
    W0, W = pair(1e-4)
    naive = (1 - torch.nn.functional.cosine_similarity(W, W0, dim=1)).mean().item()
    assert abs(naive / reference(W0, W)[1] - 1) > 0.01


def test_no_change_is_exactly_zero_and_scale_is_no_direction() -> None:
    W0, _ = pair(0.0)
    assert (delta_m(W0, W0), delta_d(W0, W0)) == (0.0, 0.0)
    assert delta_d(W0, 3 * W0) == pytest.approx(0.0, abs=1e-13)
    assert delta_d(W0, -W0) == pytest.approx(2.0)
    assert delta_m(W0, 3 * W0) == pytest.approx(2 * magnitude(W0).mean().item(), rel=1e-6)


def test_rows_of_zeros_have_no_direction() -> None:
    W0, W = pair(0.1)
    _, expected = reference(W0[1:], W[1:])
    W0[0] = 0
    assert delta_d(W0, W) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(direction(W0)[0], torch.zeros(256))
    assert delta_m(torch.zeros(2, 2), torch.eye(2)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no row with a direction"):
        delta_d(torch.zeros(2, 2), torch.eye(2))


def test_shapes_must_agree() -> None:
    for measure in (delta_m, delta_d):
        with pytest.raises(ValueError, match="two matrices of one shape"):
            measure(torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_growth_is_radial_and_rotation_by_brute_force(size: float, kind: str) -> None:
    """Row by row in float64; from 1e-6 of the weight to changes that turn rows round."""
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(24, 40, generator=generator)
    A, B = torch.randn(4, 40, generator=generator), torch.randn(24, 4, generator=generator)
    E = size * (B @ A) / 4 if kind != "full" else size * torch.randn(24, 40, generator=generator)
    m = W0.norm(dim=1) * (1 + 0.3 * size / (1 + size) * torch.randn(24, generator=generator))
    exact = W0.double()
    if kind == "full":
        after = (W0 + E).double()
        found = decompose.change(W0, W0 + E)
    else:
        V = exact + size * (B.double() @ A.double()) / 4
        after = V if kind == "lora" else m.abs().double()[:, None] * V / V.norm(dim=1, keepdim=True)
        found = decompose.factored_change(W0, A, B, size / 4, m.abs() if kind == "dora" else None)
    told = decompose.row("x", found, "out", None)
    p, cos, growth = [], [], []
    for w0, w in zip(exact, after, strict=True):
        p.append(1 + ((w - w0) @ w0 / (w0 @ w0)).item())
        cos.append((w @ w0 / (w.norm() * w0.norm())).item())
        growth.append((w.norm() / w0.norm()).item() - 1)
    p, cos, growth = map(np.array, (p, cos, growth))
    scale = float(np.abs(growth).max())
    assert told["growth"] == pytest.approx(growth.mean(), abs=2e-5 * scale + 1e-12)
    assert told["radial"] == pytest.approx((p - 1).mean(), abs=2e-5 * scale + 1e-12)
    assert told["radial_sd"] == pytest.approx(p.std(), abs=2e-5 * scale + 1e-12)
    assert told["rotation"] == pytest.approx((p * (1 - cos) / cos).mean(), rel=1e-4, abs=1e-13)
    assert told["growth"] == pytest.approx(told["radial"] + told["rotation"], abs=1e-12)
