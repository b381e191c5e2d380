"""A measured spectrum: a few Lanczos runs, and everything that can be said from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra import band, density, masses, moments, outliers
from lightning_rmt.spectra.archive import read_arrays
from lightning_rmt.spectra.bulk import Bulk, bulk_of
from lightning_rmt.spectra.bulk_edge import coefficient_edge
from lightning_rmt.spectra.density import Atom
from lightning_rmt.spectra.levels import Level, RitzLevels, ritz_levels
from lightning_rmt.spectra.moments import Estimate, FreeCumulants
from lightning_rmt.spectra.outliers import BulkEdges, Outliers
from lightning_rmt.spectra.quadrature import Quadrature, exact_weight_quadrature, with_node_at_zero

#: Version of the saved format. Raised when the meaning of a member changes; new members don't need it.
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The spectrum of a symmetric operator as Lanczos sees it.

    Only the measurement is stored: the coefficients of the runs. Everything else is computed from them on first use, so a
    saved spectrum profits from better statistics later. All numbers are in the operator's units unless said otherwise,
    float64.

    Nodes (Ritz values) are quadrature nodes, not eigenvalues: spacings between them mean nothing. Eigenvalues are in `top`,
    `bottom`, `lambda_max` and `lambda_min`, each with its certificate.

    Attributes:
        runs: one `Tridiagonal` per probe. The first reorthogonalised one gives the levels; without any there are no levels,
            only the density and what follows from it.
        size: n, the dimension of the operator.
        products: operator products that were spent.
        noise: relative rounding error of a product: 2.4e-6 for float32, 4.4e-15 for float64. An upper end of what was
            measured, not a bound; residuals and certificates hold as far as it does.
    """

    runs: tuple[Tridiagonal, ...]
    size: int
    products: int
    noise: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))
        if not self.runs:
            raise ValueError("a spectrum needs at least one Lanczos run")
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if not 0 <= self.noise < 0.25:
            raise ValueError(f"noise is a relative error between 0 and 0.25, got {self.noise}")

    # --- the quadrature -------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> NDArray[np.float64]:
        """Ritz values per probe, ascending, shape (probes, steps); a shorter run is padded with its last node."""
        return self._padded([run.nodes for run in self.runs], edge=True)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Quadrature weights as measured, shape (probes, steps), each row summing to 1; padding weighs 0."""
        return self._padded([run.weights for run in self.runs], edge=False)

    def _padded(self, rows: list[NDArray[np.float64]], edge: bool) -> NDArray[np.float64]:
        steps = max(row.size for row in rows)
        return np.stack([np.pad(row, (0, steps - row.size), constant_values=row[-1] if edge else 0.0) for row in rows])

    @cached_property
    def _judged(self) -> tuple[tuple[Tridiagonal, RitzLevels], ...]:
        """Reorthogonalised runs with their levels: in the others copies pass for levels."""
        return tuple((run, ritz_levels(run, self.noise)) for run in self.runs if run.reorthogonalised)

    @property
    def _levels(self) -> RitzLevels | None:
        return self._judged[0][1] if self._judged else None

    @cached_property
    def _quadrature(self) -> Quadrature:
        return exact_weight_quadrature(self.runs, self._levels, self.size, self.noise)

    @cached_property
    def _zeroed(self) -> tuple[Quadrature, masses.ZeroMass]:
        """The quadrature with a node at zero where there is an atom, and that atom."""
        fixed = with_node_at_zero(self._quadrature, self.runs)
        zero = masses.zero_mass(fixed)
        return fixed if zero.found else self._quadrature, zero

    # --- levels ---------------------------------------------------------------------------------------------------

    @property
    def lambda_max(self) -> Level:
        """Largest Ritz value; without a certificate it is a lower bound on the largest eigenvalue."""
        return self._extreme(-1)

    @property
    def lambda_min(self) -> Level:
        """Smallest Ritz value; without a certificate it is an upper bound on the smallest eigenvalue."""
        return self._extreme(0)

    def converged(self, level: Level) -> bool:
        """Whether one of these levels is as exact as the products are; one that is zero is, though it isn't certified.

        A certificate is about relative accuracy, which a value within rounding of zero has none of.
        """
        scale = max(abs(self.lambda_max.value), abs(self.lambda_min.value))
        return level.certified or level.residual <= 2 * self.noise * scale

    def _extreme(self, index: int) -> Level:
        if self._levels is not None and self._levels.level(index).certified:
            return self._levels.level(index)
        # The Ritz value itself, rather than a level that may stand for several within the products' error.
        trusted = [run for run, _ in self._judged[:1]] or self.runs
        run = max(trusted, key=lambda run: run.nodes[index] if index else -run.nodes[index])
        rounding = self.noise * float(np.abs(run.nodes).max())
        return Level(float(run.nodes[index]), float(run.residuals[index]) + rounding, False)

    @cached_property
    def top(self) -> tuple[Level, ...]:
        """Certified positive eigenvalues, largest first, up to the first that isn't certified; a degenerate one once."""
        return _certified_prefix(self._levels)

    @cached_property
    def bottom(self) -> tuple[Level, ...]:
        """Certified negative eigenvalues, lowest first, up to the first that isn't certified; a degenerate one once."""
        mirrored = None if self._levels is None else self._levels.mirrored()
        return tuple(Level(-v.value, v.residual, v.certified) for v in _certified_prefix(mirrored))

    def spacing_run(self, side: Literal["high", "low"]) -> NDArray[np.float64]:
        """Consecutive eigenvalues from one end, outermost first, known to 0.02 of their spacing; outliers among them.

        The only Ritz values whose spacings mean something: see ``lightning_rmt.levels.edge_statistics``.
        """
        if side not in ("high", "low"):
            raise ValueError(f"side is 'high' or 'low', got {side!r}")
        if self._levels is None:
            return np.empty(0)
        levels = self._levels if side == "high" else self._levels.mirrored()
        found = levels.values[::-1][: levels.spacing_run()]
        return found.copy() if side == "high" else -found

    # --- what stands apart ----------------------------------------------------------------------------------------

    @cached_property
    def outliers(self) -> Outliers:
        """Outliers at both ends, or why there is no count."""
        if not self._judged:
            return outliers.refused("no run was reorthogonalised, so copies can't be told from levels")
        edges = [coefficient_edge(run, self.size) for run, _ in self._judged]
        return outliers.find_outliers([levels for _, levels in self._judged], self.size, edges)

    @property
    def bulk_edges(self) -> BulkEdges:
        """Where the bulk ends, as far as the outlier rule can say."""
        return outliers.bulk_edges(self.outliers)

    # --- numbers --------------------------------------------------------------------------------------------------

    @cached_property
    def trace(self) -> Estimate:
        """Trace, with its standard error over start vectors and the rounding of products."""
        return moments.trace_estimate(self._quadrature)

    @cached_property
    def frobenius(self) -> Estimate:
        """Frobenius norm, with its standard error over start vectors and the rounding of products."""
        return moments.frobenius_estimate(self._quadrature)

    def moment(self, k: int) -> float:
        """``(1/n) tr H^k``, exact for what the start vectors see.

        Raises:
            ValueError: k is negative or larger than 2m - 1, up to which the quadrature is exact.
        """
        largest = min(2 * run.steps - 1 for run in self.runs)
        if k < 0 or (k > largest and not all(run.exhausted for run in self.runs)):
            raise ValueError(f"the quadrature is exact for moments 0 to {largest}, got {k}; take more Lanczos steps")
        return float(moments.raw_moments(self._quadrature, [k])[0][0])

    def free_cumulants(self) -> FreeCumulants:
        """Free cumulants of the bulk; outliers are removed where they could be counted."""
        apart = np.concatenate([self.outliers.high.values, self.outliers.low.values])
        return moments.free_cumulants(self._quadrature, apart)

    @cached_property
    def bulk(self) -> Bulk:
        """What is left without the outliers, where they could be counted."""
        quadrature, zero = self._zeroed
        return bulk_of(quadrature, self.outliers, zero)

    # --- the distribution -----------------------------------------------------------------------------------------

    @cached_property
    def _pieces(self) -> density.Pieces:
        apart = [*self.outliers.high.values, *self.outliers.low.values]
        quadrature, zero = self._zeroed
        return density.pieces(quadrature, self._levels, apart, zero)

    @cached_property
    def _distribution(self) -> density.Distribution:
        return density.distribution(self._zeroed[0], self._pieces)

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """Point masses, ascending: counted outliers and degenerate levels. Drawn as stems, not part of the density."""
        return self._pieces.atoms

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density at x without the atoms, shape of x; integrates to one minus their mass."""
        return density.density(self._pieces, x)

    def density_band(self, x: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper limit of the density at x: two standard errors of sampling plus the resolution."""
        return density.density_band(self._pieces, x, self.size)

    def cdf(self, x: ArrayLike) -> NDArray[np.float64]:
        """Share of eigenvalues at or below x, shape of x."""
        return self._distribution.at(x)

    def cdf_band(self, x: ArrayLike, z: float = 2.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bounds on the share of eigenvalues at or below x: rigorous for what a probe sees, widened by z standard errors.

        Measured over many spectra they miss the truth in less than 6 % of the cases at z=2.
        """
        return band.cdf_bounds(self.runs, self._quadrature, x, z)

    def quantile(self, p: float) -> float:
        """The p-quantile of the spectrum, 0 <= p <= 1."""
        bounds = self.quantile_bounds(p)
        return float(np.clip(self._distribution.quantile(p), *bounds))

    def quantile_bounds(self, p: float, z: float = 2.0) -> tuple[float, float]:
        """Interval for the p-quantile, from `cdf_band`, perhaps infinite; ``z=0`` leaves the sampling error out."""
        if not 0 <= p <= 1:
            raise ValueError(f"a quantile needs a probability between 0 and 1, got {p}")
        if (p, z) not in self._known_quantiles:  # some 20 ms each
            self._known_quantiles[p, z] = band.quantile_bounds(self.runs, self._quadrature, p, z)
        return self._known_quantiles[p, z]

    @cached_property
    def _known_quantiles(self) -> dict[tuple[float, float], tuple[float, float]]:
        return {}

    # --- masses ---------------------------------------------------------------------------------------------------

    @property
    def _zero(self) -> masses.ZeroMass:
        return self._zeroed[1]

    @property
    def zero_mass(self) -> float:
        """Share of eigenvalues within `zero_width` of zero, where an atom there stands out; otherwise 0."""
        return self._zero.mass

    @property
    def zero_width(self) -> float:
        """What "zero" means in `zero_mass`: half the distance to the next node."""
        return self._zero.width

    @cached_property
    def zero_mass_bounds(self) -> tuple[float, float]:
        """Bounds on the share of eigenvalues within `zero_width` of zero (at zero, without an atom), from `cdf_band`."""
        lower, upper = self.cdf_band(np.array([self._below_zero, self.zero_width]))
        return max(0.0, float(lower[1] - upper[0])), min(1.0, float(upper[1] - lower[0]))

    @property
    def _below_zero(self) -> float:
        return -max(self.zero_width, np.finfo(np.float64).tiny)

    @property
    def negative_mass(self) -> float:
        """Share of eigenvalues below zero; below minus `zero_width` where there is an atom at zero."""
        return float(np.clip(self.cdf(self._below_zero), *self.negative_mass_bounds))

    @cached_property
    def negative_mass_bounds(self) -> tuple[float, float]:
        """Bounds on `negative_mass`, from `cdf_band`."""
        lower, upper = self.cdf_band(self._below_zero)
        return float(lower), float(upper)

    @cached_property
    def negative_mass_stderr(self) -> float:
        """Standard error of `negative_mass`: over start vectors, and what the resolution leaves open."""
        return band.share_stderr(self.runs, self._quadrature, self._below_zero)

    # --- files ----------------------------------------------------------------------------------------------------

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The measurement as plain arrays, for one .npz file."""
        return {
            "spectrum_format": np.array(FORMAT_VERSION),
            "size": np.array(self.size),
            "products": np.array(self.products),
            "noise": np.array(self.noise),
            "steps": np.array([run.steps for run in self.runs]),
            "reorthogonalised": np.array([run.reorthogonalised for run in self.runs]),
            "alpha": np.concatenate([run.alpha for run in self.runs]),
            "beta": np.concatenate([run.beta for run in self.runs]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike]) -> Spectrum:
        """Builds a spectrum from what `to_arrays` gave; other members are ignored.

        Raises:
            ValueError: members are missing or don't fit together, or come from a newer format.
        """
        if "spectrum_format" not in arrays:
            raise ValueError("this is not a saved spectrum: it has no member 'spectrum_format'")
        try:
            version = int(np.asarray(arrays["spectrum_format"]))
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"this spectrum has format {version}, newer than {FORMAT_VERSION}: read it with a newer lightning_rmt"
                )
            steps = np.asarray(arrays["steps"]).astype(int)
            alpha, beta = (np.asarray(arrays[name], dtype=np.float64) for name in ("alpha", "beta"))
            flags = np.asarray(arrays["reorthogonalised"]).astype(bool)
            if steps.ndim != 1 or flags.shape != steps.shape or not steps.sum() == alpha.size == beta.size:
                raise ValueError("this saved spectrum is damaged: its coefficients don't match its number of steps")
            cuts = np.cumsum(steps)[:-1]
            runs = [
                Tridiagonal(a, b, bool(flag))
                for a, b, flag in zip(np.split(alpha, cuts), np.split(beta, cuts), flags, strict=True)
            ]
            return cls(
                runs=tuple(runs),
                size=int(np.asarray(arrays["size"])),
                products=int(np.asarray(arrays["products"])),
                noise=float(np.asarray(arrays["noise"])),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this saved spectrum is damaged: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the measurement to ``path`` as .npz: plain arrays, no pickle."""
        arrays: dict[str, Any] = dict(self.to_arrays())
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Spectrum:
        """Reads what `save` wrote, or the spectrum in a saved `Reading`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds something else, or comes from a newer version.
        """
        return cls.from_arrays(read_arrays(path))


def _certified_prefix(levels: RitzLevels | None) -> tuple[Level, ...]:
    """Positive certified levels from the largest down."""
    if levels is None:
        return ()
    found = []
    for index in range(levels.values.size - 1, -1, -1):
        level = levels.level(index)
        if not level.certified or level.value <= levels.floor:
            break
        found.append(level)
    return tuple(found)
