"""Which of several laws a measured bulk can be told from, and which it can't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rmt.laws.bulk import NoFitError
from lightning_rmt.laws.fit import Fit
from lightning_rmt.laws.fitting import Measured, fit_law
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.product_wigner import ProductWigner
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.refined_wishart_plus_wigner import RefinedWishartPlusWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.sparse_wigner import SparseWigner
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner
from lightning_rmt.spectra.spectrum import Spectrum

#: Families of which a fit takes some hundredths of a second.
QUICK: tuple[type[Law], ...] = (
    Semicircle,
    MarchenkoPastur,
    WishartPlusWigner,
    ProductWishart,
    ProductWigner,
    PercolatedWigner,
)
#: All families with a fit. The refined sum follows a quartic's root point by point, which takes a third of a second; the
#: sparse one simulates matrices for every degree, which takes seconds.
FAMILIES: tuple[type[Law], ...] = (*QUICK, RefinedWishartPlusWigner, SparseWigner)


@dataclass(frozen=True)
class Ranking:
    """Fits of several families to one bulk.

    Attributes:
        fits: nearest first.
        refused: family name and reason, for the families that have no member to fit.
    """

    fits: tuple[Fit, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def simplest(self) -> Fit | None:
        """The law with the fewest parameters among those that the bulk can't be told from; the nearest of them in a tie.

        Those are counted that the bulk decides, and zeros that were taken out count as one more: a law that explains them
        says more with as many numbers.

        Where one of its parameters can't be told from zero (`Fit.vanishing`) and the family that it becomes there isn't
        rejected, it is that family, be it a weak misfit: the bulk shows nothing of what it lacks.

        None where every law is told from the bulk: the first of the fits is then only the nearest. Families are
        nested (a sum of covariance and Wigner matrix comes as near as one likes to either alone), so that a richer one is
        nearer by a little whatever the truth; distances below the floor don't count.
        """
        fitting = [fit for fit in self.fits if fit.word == "indistinguishable"]
        first = min(fitting, key=lambda fit: (_numbers(fit), fit.distance), default=None)
        limits = first.vanishing.values() if first else ()
        simpler = [fit for fit in self.fits if type(fit.law).__name__ in limits and fit.word != "rejected"]
        return min(simpler, key=lambda fit: (_numbers(fit), fit.distance), default=first)

    def __str__(self) -> str:
        """A table."""
        rows = [("law", "distance", "/ floor", "bounds z", "verdict")]
        simplest = self.simplest
        for fit in self.fits:
            told = ", ".join(f"{k} {e.mean:.3g} +- {e.stderr:.1g}" for k, e in fit.parameters.items())
            rows.append(
                (
                    f"{type(fit.law).__name__}({told})",
                    f"{fit.distance:.4f} +- {fit.stderr:.4f}",
                    f"{fit.relative:.2f}",
                    f"{fit.exclusion_z:.1f}",
                    ", ".join(
                        [fit.word]
                        + ["simplest such"] * (fit is simplest)
                        + [f"{name} not told from 0: see {family}" for name, family in fit.vanishing.items()]
                    ),
                )
            )
        rows += [(name, "", "", "", f"no fit: {reason}") for name, reason in self.refused]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows]
        if self.fits:
            fit = self.fits[0]
            lines.append(
                f"resolution 1/{fit.steps}, n = {fit.size}, probes {fit.probes}, outliers {fit.removed_outliers}"
            )
        return "\n".join(lines)


def _numbers(fit: Fit) -> int:
    """How many numbers of the bulk a fit needed."""
    return sum(estimate.stderr != 0 for estimate in fit.parameters.values()) + (fit.removed_zero_mass > 0)


def rank_laws(spectrum: Spectrum, families: Sequence[type[Law]] = QUICK) -> Ranking:
    """Fits every family to the bulk of a spectrum.

    Within the floor no distance means anything, so `Ranking.simplest` goes by the number of parameters there. Measured with
    8 simulated matrices of 1500 eigenvalues each, 100 steps and one probe, the simplest law, or the nearest where none is
    indistinguishable, was the true one in

    - 16 of 16 semicircles, 39 of 40 Marchenko-Pastur laws (ratios 0.2 to 4; 56 of 60 others of ratio 0.5);
    - 16 of 16 sums with a plain Wigner matrix at phi 1 and 2, 24 of 24 refined sums at phi 1 to 2 (energies 0.25 and 0.5,
      1 to 4);
    - 30 of 32 products of two Wishart factors, 24 of 24 products X W X' (without sparse matrices among the families);
    - 22 of 24 percolated Wigner matrices (p from 0.3 to 0.9), 16 of 16 sparse ones of degree 2 and 4.

    The true law's own distance exceeds 1.3 floors in one of six to four cases there. It exceeds 2 floors in about one of ten
    for laws that are centered at zero, whose distance is mostly the sampling error of the mean. With 10,000 eigenvalues it
    was below 1.45 floors in all of 24 cases.

    A density can't tell these apart, whatever the number of steps:

    - a sum of a covariance and a Wigner matrix from a semicircle as phi goes to 0 (0 of 8 at phi 0.02, energy 0.5), from a
      Marchenko-Pastur law as the energy does (1 of 8 at phi 0.5, energy 0.01). Above phi = 1 the smeared zeros rule out a
      Marchenko-Pastur law, but an energy below its error is often refused or off by floors: with 1000 eigenvalues 5 of 8
      were right at phi 2 and energy 0.02, 1 of 8 at 0.005;
    - the refined sum from the plain one at phi 0.5 and less: the true one of the two was picked in 15 of 24 plain and 7 of 8
      refined sums there, and in 2 of 5 other refined ones;
    - a Marchenko-Pastur law of ratio 1.25 from one of ratio 0.5 beside zeros;
    - a product of two Wishart factors from a Marchenko-Pastur law, where one of its ratios is small;
    - a percolated Wigner matrix from a semicircle beside zeros, which is the same law with a free center: the percolated one
      counts as simpler. Fewer zeros than some 5 % aren't seen, and what is left then is a semicircle;
    - a product X W X' from a sparse Wigner matrix of the same kurtosis, where neither has many zeros, and a sparse matrix
      of degree 1 (5 of 8), whose zeros and kurtosis the noise of a probe moves across families.

    Args:
        spectrum: the measured spectrum.
        families: classes of laws; `FAMILIES` are all that have a fit, some of which take seconds.
    """
    measured = Measured(spectrum)
    fits: list[Fit] = []
    refused: list[tuple[str, str]] = []
    for family in families:
        try:
            fits.append(fit_law(family, measured))
        except NoFitError as error:
            refused.append((family.__name__, str(error)))
    return Ranking(tuple(sorted(fits, key=lambda fit: fit.distance)), tuple(refused))
