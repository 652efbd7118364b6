"""Slow literal float64 references, written from the papers' formulas and from nothing in the package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations

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


def pearson(u: Tensor, v: Tensor) -> Tensor:
    """Pearson's correlation of two vectors."""
    u, v = u - u.mean(), v - v.mean()
    return (u * v).sum() / torch.sqrt((u * u).sum() * (v * v).sum())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / torch.sqrt((a @ a) * (b @ b))


def rsa(x: Tensor, y: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Correlation of the two representational dissimilarity matrices over i < j (Kriegeskorte et al. 2008)."""
    pairs = list(combinations(range(len(x)), 2))
    return pearson(*(torch.stack([distance(rows[i], rows[j]) for i, j in pairs]) for rows in (x, y)))


def rsa_cosine(x: Tensor, y: Tensor) -> Tensor:
    return rsa(x.double(), y.double(), lambda a, b: 1 - cosine(a, b))


def rsa_euclidean(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return rsa(x, y, lambda a, b: torch.sqrt(((a - b) ** 2).sum()))


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Ridge with an intercept, refitted without each row in turn, against the mean of the other rows."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    n = len(x)
    penalty = 0.1 * (x * x).sum() / n
    unexplained, total = 0.0, 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i]
        x_mean, y_mean = x[others].mean(0), y[others].mean(0)
        a, b = x[others] - x_mean, y[others] - y_mean
        slope = torch.linalg.solve(a.T @ a + penalty * torch.eye(x.shape[1], dtype=x.dtype), a.T @ b)
        unexplained = unexplained + ((y[i] - y_mean - (x[i] - x_mean) @ slope) ** 2).sum()
        total = total + ((y[i] - y_mean) ** 2).sum()
    return 1 - unexplained / total


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """Nuclear norm of X'Y over both lengths; squared singular values below 1e-6 of the largest left out."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    values = torch.linalg.svdvals(x.T @ y)
    return values[values**2 > 1e-6 * values[0] ** 2].sum() / torch.sqrt((x * x).sum() * (y * y).sum())


def soft_neighbours(x: Tensor) -> Tensor:
    """p_ij = sigmoid((s_ij - t_i) / (0.1 std_j s_ij)), s = cosine, t_i between the k-th and the (k+1)-th nearest."""
    n = len(x)
    k = min(10, (n - 1) // 2)
    table = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        s = torch.stack([cosine(x[i], x[j]) for j in others])
        nearest = sorted(s, key=Tensor.item, reverse=True)
        threshold = (nearest[k - 1] + nearest[k]) / 2
        width = 0.1 * torch.sqrt(((s - s.mean()) ** 2).mean())
        table.append(1 / (1 + torch.exp(-(s - threshold) / width)))
    return torch.stack(table)


def mutual_knn(x: Tensor, y: Tensor) -> Tensor:
    p, q = soft_neighbours(x.double()), soft_neighbours(y.double())
    return (p * q).sum() / torch.sqrt((p * p).sum() * (q * q).sum())


def gaussian(x: Tensor) -> Tensor:
    """exp(-d^2 / (2 (0.8 median d)^2)), the median over i < j being the lower of two."""
    n = len(x)
    squared = torch.stack([torch.stack([((x[i] - x[j]) ** 2).sum() for j in range(n)]) for i in range(n)])
    in_order = sorted((squared[i, j] for i, j in combinations(range(n), 2)), key=Tensor.item)
    return torch.exp(-squared / (2 * 0.8**2 * in_order[(len(in_order) - 1) // 2]))


def rbf_cka(x: Tensor, y: Tensor) -> Tensor:
    """CKA of Gaussian kernels (Kornblith et al. 2019)."""
    k, ell = gaussian(x.double()), gaussian(y.double())
    return hsic(k, ell) / torch.sqrt(hsic(k, k) * hsic(ell, ell))


SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cka": cka,
    "debiased_cka": partial(cka, estimator="debiased"),
    "mutual_knn": mutual_knn,
    "procrustes": procrustes,
    "rbf_cka": rbf_cka,
    "ridge": ridge,
    "rsa_cosine": rsa_cosine,
    "rsa_euclidean": rsa_euclidean,
}
