"""The ensembles of `beyond_rmt`: simulated, told apart, and fitted to a measured bulk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from claims import Claims
from misfit import Misfit, kolmogorov, measured, nearest
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from lightning_rmt.laws import (
    Law,
    MarchenkoPastur,
    PercolatedWigner,
    ProductWigner,
    ProductWishart,
    Semicircle,
    SparseWigner,
    rank_laws,
)
from lightning_rmt.laws.ranking import QUICK
from lightning_rmt.spectra.bulk import Bulk


@dataclass(frozen=True)
class PercolatedWishart(Law):
    """The law of ``D X X' D``, D a diagonal of zeros and ones: a Marchenko-Pastur law beside an atom of ``1 - p``."""

    p: float
    ratio: float
    scale: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p is a share above 0 and at most 1, got {self.p}")

    @property
    def kept(self) -> MarchenkoPastur:
        """Of the rows that stay."""
        return MarchenkoPastur(self.ratio, self.scale)

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        return self.kept.support

    @property
    def atom(self) -> float:
        return 1 - self.p + self.p * self.kept.atom

    @property
    def _stretch(self) -> float:
        return self.kept._stretch

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        return self.p * self.kept.density(x)

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        kept = round(self.p * size)
        return np.sort(np.concatenate([np.zeros(size - kept), self.kept.rvs(kept, rng)]))


# --- atoms and densities ----------------------------------------------------------------------------------------------


def products(claims: Claims, seed: int = 0) -> None:
    """Products of Wishart factors, ``J J'``, and of Wigner and Wishart factors, ``X W X'``."""
    for dims, atom, before in (
        ((1000, 500, 2000), 0.5, 0.0027),
        ((1000, 2000, 400), 0.6, 0.0032),
        ((800, 800, 1600), 0.0, 0.0035),
    ):
        law = ProductWishart(dims)
        levels = law.rvs(dims[0], np.random.default_rng(seed))
        told = f"product Wishart {dims[0]} x {dims[1]} x {dims[2]}"
        claims.near("products", f"zeros, {told}: 1 - min N_i / N_0", float(np.mean(levels == 0)), atom, within=1e-12)
        claims.near("products", "its atom in the law", law.atom, atom, within=1e-12)
        claims.between("products", "its KS distance", kolmogorov(levels, law), high=0.006, source=f"before: {before}")
    for ratio, before in ((0.3, 0.009), (1.0, 0.009), (2.0, 0.0034)):
        law_of = ProductWigner(ratio)
        levels = law_of.rvs(1000, np.random.default_rng(seed))
        told = f"product Wigner, c = {ratio:g}"
        zeros = float(np.mean(np.abs(levels) < 1e-12))
        claims.near("products", f"zeros, {told}: max(0, 1 - c)", zeros, max(0.0, 1 - ratio), within=1e-12)
        claims.near("products", "mass of its density", mass(law_of), 1 - law_of.atom, within=0.01)
        claims.between(
            "products", "its KS distance", kolmogorov(levels, law_of), high=0.012, source=f"before: {before}"
        )


def mass(law: Law) -> float:
    """Integral of the density, in the root of x, since the density may diverge at zero."""
    total = 0.0
    for low, high in law.support:
        root = np.linspace(-math.sqrt(max(-low, 0.0)), math.sqrt(max(high, 0.0)), 20001)
        middle = (root[1:] + root[:-1]) / 2
        total += float((law.density(np.sign(middle) * middle**2) * 2 * np.abs(middle) * np.diff(root)).sum())
    return total


def percolated(claims: Claims, n: int, seed: int = 0) -> None:
    """Site percolation, dense and sparse bond percolation of a Wigner matrix, sparse percolation of a Wishart one."""
    rng = np.random.default_rng(seed)
    wigner = rng.standard_normal((n, n))
    wigner = (wigner + wigner.T) / math.sqrt(2 * n)
    kept = rng.permutation(n) < round(0.3 * n)
    levels = np.linalg.eigvalsh(wigner * np.outer(kept, kept))
    site = PercolatedWigner(0.3)
    claims.near(
        "percolation", "zeros, sites with p = 0.3: 1 - p", np.mean(np.abs(levels) < 1e-12), site.atom, within=1e-9
    )
    claims.near(
        "percolation",
        "its largest eigenvalue",
        levels[-1],
        site.edges[1],
        relative=0.03,
        source="2 √p",
    )
    bonds = np.triu(rng.random((n, n)) < 0.3)
    levels = np.linalg.eigvalsh(wigner * (bonds | bonds.T)) / math.sqrt(0.3)
    claims.near("percolation", "zeros, dense bonds with p = 0.3", np.mean(np.abs(levels) < 1e-12), 0.0, within=0.0)
    claims.near("percolation", "its largest eigenvalue, rescaled", levels[-1], 2.0, relative=0.03)
    for degree, known in ((0.5, 0.6544), (1.0, 0.4559), (2.0, 0.2161), (3.0, 0.0723), (5.0, 0.0074)):
        law = SparseWigner(degree)
        draws = [float(np.mean(law.rvs(n // 2, rng) == 0)) for _ in range(10)]
        told = f"sparse bonds, c = {degree:g}"
        claims.near("percolation", f"atom in the law, {told}", law.atom, known, within=1e-4)
        error = float(np.std(draws, ddof=1) / math.sqrt(len(draws)))
        claims.near(
            "percolation", "zeros, simulated", float(np.mean(draws)), known, within=0.7 / math.sqrt(n), stderr=error
        )
        if degree in (1.0, 5.0):
            kurtosis = float(np.mean([_kurtosis(law.rvs(n, rng)) for _ in range(3)]))
            claims.near("percolation", "its m4 / m2²: 2 + 3/c", kurtosis, 2 + 3 / degree, relative=0.1)
    for rows, columns, entries in ((n, n, 2), (n, n, 1), (n, n // 2, 3)):
        places = np.concatenate([rng.choice(columns, entries, replace=False) for _ in range(rows)])
        x = csr_array(
            (rng.standard_normal(rows * entries), (np.repeat(np.arange(rows), entries), places)), (rows, columns)
        )
        matched = np.mean(maximum_bipartite_matching(x, perm_type="column") >= 0)
        zeros = 1 - np.linalg.matrix_rank(x.toarray()) / rows
        told = f"sparse Wishart, {rows} x {columns}, {entries} entries a row"
        claims.near("percolation", f"zeros, {told}: 1 - matching / n", float(zeros), float(1 - matched), within=1e-9)


def _kurtosis(levels: np.ndarray) -> float:
    return float(np.mean(levels**4) / np.mean(levels**2) ** 2)


# --- is each ensemble found again? ------------------------------------------------------------------------------------

#: A member of each family, and whether sparse matrices, of which a fit takes a second, are among the candidates.
MEMBERS: tuple[tuple[Law, bool], ...] = (
    (Semicircle(2.0), False),
    (MarchenkoPastur(0.5), False),
    (ProductWishart((1.0, 0.5, 2.0)), False),
    (ProductWigner(0.4), False),
    (PercolatedWigner(0.5), False),
    (SparseWigner(2.0), True),
)


def selection(claims: Claims, draws: int, n: int = 1500) -> None:
    """Which family `rank_laws` names for samples of each; sparse ones, which take long, only half as often."""
    right = total = 0
    for member, sparse in MEMBERS:
        names, atoms = [], []
        if sparse and draws < 2:
            continue
        for seed in range(draws // 2 if sparse else draws):
            spectrum = measured(member.rvs(n, np.random.default_rng(seed)), seed=seed)
            ranking = rank_laws(spectrum, (*QUICK, SparseWigner) if sparse else QUICK)
            names.append(type((ranking.simplest or ranking.fits[0]).law).__name__)
            atoms.append(spectrum.zero_mass)
        name = type(member).__name__
        right, total = right + names.count(name), total + len(names)
        claims.show("best ensemble", f"samples of {name} that are found", f"{len(names)}", f"{names.count(name)}")
        if member.atom > 0.3:
            stderr = float(np.std(atoms, ddof=1) / math.sqrt(len(atoms))) if len(atoms) > 1 else None
            claims.near(
                "zero peak",
                f"its mass at zero by Lanczos, {name}",
                float(np.mean(atoms)),
                member.atom,
                within=0.06,
                stderr=stderr,
            )
    claims.between("best ensemble", "share of all samples that are found", right / total, low=0.9)


# --- the nearest member of each family -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A family of laws with free parameters, positive ones by their logarithm.

    Attributes:
        name: for tables.
        new: whether it is one of the two classes that the paper proposes.
        make: the law with these parameters.
        starts: of the fit, for a bulk of standard deviation 1.
    """

    name: str
    new: bool
    make: Callable[..., Law]
    starts: Iterable[Sequence[float]]

    def fit(self, bulk: Bulk, evaluations: int = 350) -> Misfit:
        """The member nearest to the bulk."""
        mean, square = bulk.mean(lambda x: np.stack([x, x**2]))
        unit = math.sqrt(float(square - mean**2))
        return nearest(lambda *free: self.make(unit, *free), list(self.starts), bulk, evaluations=evaluations)


def _grid(*axes: Sequence[float]) -> list[tuple[float, ...]]:
    return list(product(*(np.log(axis) for axis in axes)))


NARROW, SCALES = np.geomspace(0.003, 1, 6), np.geomspace(0.01, 2, 6)
FAMILIES = (
    Family(
        "semicircle", False, lambda u, r, c: Semicircle(u * math.exp(r), u * c), [(r, 0.0) for (r,) in _grid(SCALES)]
    ),
    Family(
        "Marchenko-Pastur",
        False,
        lambda u, q, s: MarchenkoPastur(math.exp(q), u * math.exp(s)),
        _grid((0.5, 3, 30), NARROW),
    ),
    Family(
        "product Wishart",
        True,
        lambda u, q, r, s: ProductWishart((1.0, math.exp(-q), math.exp(-r)), u * math.exp(s)),
        _grid((1, 3, 30), (1, 10), NARROW),
    ),
    Family(
        "product Wigner",
        True,
        lambda u, c, s: ProductWigner(math.exp(c), u * math.exp(s)),
        _grid((0.1, 0.5, 2), SCALES),
    ),
    Family(
        "percolated Wishart",
        True,
        lambda u, p, q, s: PercolatedWishart(math.exp(p), math.exp(q), u * math.exp(s)),
        _grid((0.1, 0.3, 0.6), (0.5, 3), NARROW),
    ),
    Family(
        "percolated Wigner",
        True,
        lambda u, p, s: PercolatedWigner(math.exp(p), u * math.exp(s)),
        _grid((0.2, 0.5, 0.8), SCALES),
    ),
)
#: A sample of each of the paper's ensembles, for the fits' own check.
SAMPLES: dict[str, Law] = {
    "product Wishart": ProductWishart((1.0, 0.5, 0.4)),
    "product Wigner": ProductWigner(0.3),
    "percolated Wishart": PercolatedWishart(0.4, 0.5, 1.0),
    "percolated Wigner": PercolatedWigner(0.4),
}


def own_samples(claims: Claims, n: int, evaluations: int) -> None:
    """The nearest member against samples whose family is known: what the distances of a network are to be held against."""
    for name, law in SAMPLES.items():
        spectrum = measured(law.rvs(n, np.random.default_rng(0)))
        found = {
            family.name: family.fit(spectrum.bulk, evaluations).relative
            for family in FAMILIES
            if family.name == name or not family.new
        }
        claims.between("control", f"W1 in floors: {name}, a sample of it", found[name], high=1.5)
        claims.between("control", "the same sample: semicircle", found["semicircle"], low=2.0)
        claims.show("control", "the same sample: Marchenko-Pastur", "", f"{found['Marchenko-Pastur']:.3g}")
