"""One probe: an operator goes in, a spectrum or a whole reading comes out. Knows no Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_rmt.krylov.collectives import OtherRankFailedError
from lightning_rmt.krylov.lanczos import (
    Basis,
    SymmetricOperator,
    basis_bytes,
    lanczos_lockstep,
    nowhere,
    product_noise,
    shards_of,
    start_vector,
)
from lightning_rmt.krylov.tridiagonal import NonFiniteError, Tridiagonal
from lightning_rmt.spectra.spectrum import Spectrum

CHECK_PRODUCTS = 3
#: Steps from one look to the next whether the whole spectrum has been seen: a look is a collective where there are ranks.
LOOK_EVERY = 8


class Until(Protocol):
    """A rule that ends probes early; see ``spectra/stopping.py``."""

    @property
    def every(self) -> int:
        """Steps from one look to the next."""

    def __call__(self, runs: tuple[Tridiagonal, ...], /) -> bool:
        """Whether the runs may end here."""


class ProductCheck(NamedTuple):
    """How far an operator is from being symmetric and repeatable.

    Attributes:
        symmetry: ``|u'Hv - v'Hu| / |Hu|`` with random u and v along Hu, so that a symmetric H gives ``u'Hv = |Hu|``.
        repeat: ``|Hu - Hu again| / |Hu|``.
        tolerance: the most that either may be: 40 times the operator's noise (1e-4 in float32), at least 1e-9. Correct
            products show 1e-8 to 1e-6 in float32. A dropout mask that changes between products shows 1e-2 to 1; the wrong
            third derivatives of PyTorch's normalisation layers, which a gradient penalty needs, 6e-4 to 1e-2.
    """

    symmetry: float
    repeat: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both are small enough for Lanczos (NaN is not)."""
        return self.symmetry <= self.tolerance and self.repeat <= self.tolerance


def check_product(operator: SymmetricOperator, seed: int = 0) -> ProductCheck:
    """Takes three products to see whether the operator is symmetric and gives the same product twice.

    Raises:
        OtherRankFailedError: there are several processes, and something went wrong on another one.
        Exception: whatever went wrong on this one.
    """
    shards, failed = shards_of(operator), nowhere(operator)
    agree: Callable[[bool], bool] = getattr(operator, "agree", bool)
    u = start_vector(operator, seed)
    Hu = operator.matmat(u[None])[0]
    length = shards.norm(Hu)
    v = shards.attempt(lambda: (Hu / torch.where(length > 0, length, 1.0)).to(operator.dtype), failed)
    Hv, again = operator.matmat(v[None])[0], operator.matmat(u[None])[0]
    difference = shards.attempt(
        lambda: torch.dot(u.double(), Hv.double()) - torch.dot(v.double(), Hu.double()), length.new_full((), math.nan)
    )
    asymmetry = shards.total(difference[None])[0].abs()
    drift = shards.norm(shards.attempt(lambda: again - Hu, failed))
    if not agree(True):
        shards.settle()
        raise OtherRankFailedError("a product failed on another rank. All ranks skip this probe")
    found = torch.stack([asymmetry, drift, length]).tolist()
    scale = found[2] if found[2] != 0.0 else 1.0  # H = 0 is symmetric
    return ProductCheck(found[0] / scale, found[1] / scale, max(40 * product_noise(operator), 1e-9))


def estimate_spectrum(
    operator: SymmetricOperator,
    *,
    steps: int = 100,
    probes: int = 1,
    seed: int = 0,
    basis: Basis = "full",
    until: Until | None = None,
    on_step: Callable[[int], None] | None = None,
    on_basis: Callable[[Spectrum, Tensor], None] | None = None,
) -> Spectrum:
    """Measures the spectrum of a symmetric operator by Lanczos from random start vectors.

    The first probe is reorthogonalised (its basis takes steps * n elements) and gives eigenvalues and counts; further
    probes keep three vectors only and sharpen what is a sum over the spectrum: density, trace, norm. All go in lockstep,
    so that every step is one ``matmat``.

    Args:
        operator: anything with ``size``, ``device``, ``dtype`` and ``matmat``; see ``curvature/``.
        steps: Lanczos steps of each probe, at most ``operator.size`` are made.
        probes: random start vectors.
        seed: of the start vectors; the same on all ranks.
        basis: what the first probe keeps. ``"half"`` (bfloat16) and ``"none"`` save memory and give no eigenvalues.
        until: ends the probes before ``steps``; see ``spectra/stopping.py``. None: they end early only where the operator's
            whole spectrum has been seen.
        on_step: called with the number of products queued so far.
        on_basis: called with the spectrum and the first probe's basis (see `ritz_vectors`) before this is freed; not where
            none was kept.

    Returns:
        The spectrum, with errors.

    Raises:
        ValueError: ``steps`` or ``probes`` is below 1, or a product was NaN or infinite.

    Example:
        >>> import torch
        >>> class Diagonal:
        ...     size, device, dtype = 3, torch.device("cpu"), torch.float64
        ...     def matmat(self, V):
        ...         return V * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
        >>> round(estimate_spectrum(Diagonal(), steps=3).lambda_max.value, 6)
        5.0
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    taken = 0

    def count(step: int) -> None:
        nonlocal taken
        taken = probes * step
        if on_step is not None:
            on_step(taken)

    def ended(runs: tuple[Tridiagonal, ...]) -> bool:
        return all(run.exhausted for run in runs) or (until is not None and until(runs))

    starts = [start_vector(operator, seed + 7919 * probe) for probe in range(probes)]
    others: list[Basis] = ["none"] * (probes - 1)
    every = LOOK_EVERY if until is None else until.every
    bases: list[Tensor] = []
    runs = lanczos_lockstep(
        operator,
        starts,
        steps,
        bases=[basis, *others],
        stop=ended,
        look_every=every,
        on_step=count,
        on_basis=None if on_basis is None else bases.append,
    )
    spectrum = Spectrum(runs, operator.size, products=taken, noise=product_noise(operator))
    if on_basis is not None and bases[0].shape[0]:
        on_basis(spectrum, bases[0])
    return spectrum


class Measurement(NamedTuple):
    """A spectrum with what it took.

    Attributes:
        spectrum: what was measured.
        check: None where the operator wasn't checked.
        seconds: wall-clock time of the products and of the analysis.
        forecast: what they were expected to cost, None where the operator wasn't checked.
    """

    spectrum: Spectrum
    check: ProductCheck | None
    seconds: float
    forecast: Forecast | None = None


class Forecast(NamedTuple):
    """What a probe will cost.

    Attributes:
        products: operator products, at most.
        seconds: from the time of a measured product.
        basis_bytes: memory of the Lanczos basis in this process, on the operator's device.
    """

    products: int
    seconds: float
    basis_bytes: int


def forecast(
    operator: SymmetricOperator, steps: int, probes: int, basis: Basis, seconds_per_product: float
) -> Forecast:
    """The cost of `estimate_spectrum` with these arguments."""
    products = probes * min(steps, operator.size)
    kept = basis_bytes(basis, operator.size, steps, operator.dtype, shards_of(operator).local_size)
    return Forecast(products, products * seconds_per_product, kept)


def measure(
    operator: SymmetricOperator,
    *,
    steps: int,
    probes: int,
    seed: int,
    check: bool,
    basis: Basis = "full",
    until: Until | None = None,
    on_forecast: Callable[[Forecast], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_basis: Callable[[Spectrum, Tensor], None] | None = None,
) -> Measurement:
    """`estimate_spectrum`, after a look at whether the operator can be trusted.

    Args:
        operator: as for `estimate_spectrum`, like ``steps``, ``probes``, ``seed`` and ``on_step``.
        steps: see there.
        probes: see there.
        seed: see there.
        check: take three products first, and refuse the operator if they aren't those of a symmetric matrix.
        basis: see there.
        until: see there.
        on_forecast: called after the check with what the rest will cost, from its products' time.
        on_step: see there.
        on_basis: see there.

    Raises:
        ValueError: as `estimate_spectrum`; or ``check`` is set and the products are not finite, symmetric and repeatable.
    """
    begin = time.perf_counter()
    checked = check_product(operator, seed) if check else None
    if checked is not None and not math.isfinite(checked.symmetry + checked.repeat):
        raise NonFiniteError(
            "a curvature product is NaN or infinite: an operation of the loss has no finite derivative at its inputs "
            "(sqrt or norm at zero, say), or the numbers overflow. Give a loss that avoids it with loss_fn="
        )
    if checked is not None and not checked.ok:
        if checked.repeat <= checked.tolerance:
            cause = (
                "The products repeat, so nothing random is at work: an operation of the loss has a wrong second derivative "
                "(an autograd.Function of your own; layer_norm, batch_norm or instance_norm where the loss itself contains "
                'a gradient, as a gradient penalty does). SpectrumMonitor(product="finite_difference") needs first '
                "derivatives only"
            )
        else:
            cause = (
                "Something in the loss changes from product to product (randomness from a generator of its own, running "
                "statistics, non-deterministic kernels), or a hook changes gradients. Make the loss a fixed function of the "
                "parameters with loss_fn="
            )
        raise ValueError(
            f"the curvature product is not a symmetric matrix's: asymmetry {checked.symmetry:.1e}, difference of the same "
            f"product taken twice {checked.repeat:.1e} (both should be below {checked.tolerance:.0e}). {cause}"
        )
    cost = None
    if checked is not None:
        cost = forecast(operator, steps, probes, basis, (time.perf_counter() - begin) / CHECK_PRODUCTS)
        if on_forecast is not None:
            shards_of(operator).attempt(lambda: on_forecast(cost), None)
    spectrum = estimate_spectrum(
        operator,
        steps=steps,
        probes=probes,
        seed=seed,
        basis=basis,
        until=until,
        on_step=on_step,
        on_basis=on_basis,
    )
    return Measurement(spectrum, checked, time.perf_counter() - begin, cost)
