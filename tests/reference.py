"""Slow literal float64 references, written from the papers' formulas and from nothing in the package."""

from __future__ import annotations

import torch
from torch import Tensor


def centring(n: int) -> Tensor:
    """H = I - 1 1' / n."""
    return torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)


def hsic(k: Tensor, ell: Tensor) -> Tensor:
    """Biased HSIC, tr(K H L H) / (n - 1)^2 (Gretton et al. 2005)."""
    n = len(k)
    h = centring(n)
    return torch.trace(k @ h @ ell @ h) / (n - 1) ** 2


def unbiased_hsic(k: Tensor, ell: Tensor) -> Tensor:
    """Unbiased HSIC of Song et al. 2012, eq. 5, from kernels with zeroed diagonals."""
    n = len(k)
    k, ell = k - torch.diag(k.diagonal()), ell - torch.diag(ell.diagonal())
    one = torch.ones(n, dtype=torch.float64)
    middle = (one @ k @ one) * (one @ ell @ one) / ((n - 1) * (n - 2))
    return (torch.trace(k @ ell) + middle - 2 / (n - 2) * (one @ k @ ell @ one)) / (n * (n - 3))


def cka(x: Tensor, y: Tensor, estimator: str = "biased") -> Tensor:
    """Linear CKA of rows x [n, p] and y [n, q]."""
    measure = hsic if estimator == "biased" else unbiased_hsic
    # Both estimators ignore the mean; removing it first keeps the reference exact far from zero.
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    k, ell = x @ x.T, y @ y.T
    return measure(k, ell) / torch.sqrt(measure(k, k) * measure(ell, ell))


def related_rows(n: int, p: int, q: int, *, seed: int = 0, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows x [n, p] and y [n, q] that share four hidden factors, so that CKA is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    factors = draw(n, 4)
    return factors @ draw(4, p) + draw(n, p) + mean, factors @ draw(4, q) + draw(n, q) - mean
