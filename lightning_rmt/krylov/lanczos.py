"""Lanczos on any symmetric operator, with or without a stored basis, and without host synchronisation inside a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_rmt.krylov.coefficients import Coefficients
from lightning_rmt.krylov.collectives import all_or_nobody
from lightning_rmt.krylov.reductions import inner_products, norm, subtract_combination
from lightning_rmt.krylov.shards import Shards, Unsharded
from lightning_rmt.krylov.tridiagonal import Tridiagonal

#: What a run keeps of its basis: every vector in the operator's dtype, on its device or in the host's memory; in bfloat16;
#: or none but the last two.
Basis = Literal["full", "host", "half", "none"]
BASES: tuple[Basis, ...] = ("full", "host", "half", "none")

#: Those with which Ritz values at the ends become eigenvalues.
EXACT_BASES: tuple[Basis, ...] = ("full", "host")

#: A residual must be so many times longer than what the last pass took out of it, or it is the products' error.
ERROR_MARGIN = 4.0

#: Whether a run may end, from the tridiagonal matrices so far, one for each start vector.
StopRule = Callable[[tuple[Tridiagonal, ...]], bool]


#: Mixed into seeds: the stream of the seed itself may have made the weights. An embedding that is a module's first layer is
#: the first n normal numbers of `seed_everything`'s seed, and would be the start vector of the same seed.
_SALT = 0x4C616E637A6F73
#: Normal numbers drawn at once for a start vector: more would need a whole vector on the host.
DRAWN_AT_ONCE = 2**24


class SymmetricOperator(Protocol):
    """What Lanczos needs to know of an operator; every class in ``curvature/`` has it, and so may yours.

    An operator over several processes may also have ``shards`` (see `Shards`): its ``matmat`` then takes and gives this
    process's parts of the vectors, shape (k, local_size).
    """

    @property
    def size(self) -> int:
        """Dimension n."""

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors: float32 or float64."""

    def matmat(self, V: Tensor, /) -> Tensor:
        """Product with k vectors: ``V`` of shape (k, n) to the same shape; must not synchronise with the host."""


def shards_of(operator: SymmetricOperator) -> Shards:
    """How an operator's vectors are spread; whole in this process, unless it says otherwise."""
    shards: Shards | None = getattr(operator, "shards", None)
    return Unsharded(operator.size) if shards is None else shards


def basis_bytes(basis: Basis, size: int, steps: int, dtype: torch.dtype, local_size: int | None = None) -> int:
    """Memory of the basis of one run with vectors of ``dtype``, of which this process holds ``local_size`` entries."""
    kept = {"full": dtype.itemsize, "host": dtype.itemsize, "half": torch.bfloat16.itemsize, "none": 0}[basis]
    return kept * min(steps, size) * (size if local_size is None else local_size)


def rounding_noise(dtype: torch.dtype) -> float:
    """Relative error to expect of a product in ``dtype``: 2.4e-6 in float32, 4.4e-15 in float64, 0.05 in bfloat16.

    Twenty times the machine epsilon, and at most 0.05: the upper end of the errors measured for Hessian products of small
    networks, 1e-7 to 2.5e-6 of the operator's norm in float32 and 3e-3 to 5e-2 in bfloat16.
    """
    return min(20 * torch.finfo(dtype).eps, 0.05)


def product_noise(operator: SymmetricOperator) -> float:
    """Relative error of the operator's products: its own ``noise`` attribute, or rounding in its dtype."""
    return float(getattr(operator, "noise", rounding_noise(operator.dtype)))


def start_vector(operator: SymmetricOperator, seed: int) -> Tensor:
    """Random unit vector, uniform on the sphere: this process's part of it, all of shape (n,) without ``shards``.

    Drawn on the CPU in float32 from its own generator, so that it is the same on every rank, device and dtype, however it
    is spread, and no global random state is touched. Normalised in float64: a norm taken in float32 costs orthogonality.
    """
    shards = shards_of(operator)
    failed = nowhere(operator)
    vector = shards.attempt(lambda: _drawn(operator, shards, seed), failed)
    length = shards.norm(vector)
    return shards.attempt(lambda: vector.div_(length), failed)


def nowhere(operator: SymmetricOperator) -> Tensor:
    """A vector of NaN, as long as this process's part of a whole one, that takes no memory."""
    nan = torch.full((1,), float("nan"), dtype=operator.dtype, device=operator.device)
    return nan.expand(shards_of(operator).local_size)


def _drawn(operator: SymmetricOperator, shards: Shards, seed: int) -> Tensor:
    """This process's part of a vector of normal numbers."""
    generator = torch.Generator().manual_seed((seed ^ _SALT) % 2**63)
    vector = torch.zeros(shards.local_size, dtype=operator.dtype, device=operator.device)
    for first in range(0, operator.size, DRAWN_AT_ONCE):
        drawn = torch.randn(min(DRAWN_AT_ONCE, operator.size - first), generator=generator)
        place = 0
        for start, stop in shards.segments:
            low, high = max(start, first), min(stop, first + drawn.numel())
            if low < high:
                vector[place + low - start : place + high - start] = drawn[low - first : high - first]
            place += stop - start
    return vector


def lanczos(
    operator: SymmetricOperator,
    start: Tensor,
    steps: int,
    *,
    reorthogonalise: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Tridiagonal:
    """Runs Lanczos from one start vector: `lanczos_lockstep` with a full basis, or with none.

    Args:
        operator: see `SymmetricOperator`.
        start: shape (n,), or this process's part of it; unit norm, the operator's dtype and device. It is not modified.
        steps: number of products, at least 1; at most n are made.
        reorthogonalise: keep the basis and orthogonalise against all of it.
        on_step: called on the host with the number of steps queued so far (for a progress bar).

    Returns:
        The tridiagonal matrix, shorter than ``steps`` where an invariant subspace was met.

    Raises:
        ValueError: ``steps`` or the shape of ``start`` is wrong, or the operator returned NaN or infinity.
    """
    local_size = shards_of(operator).local_size
    if start.shape != (local_size,):
        raise ValueError(f"start must have shape ({local_size},), got {tuple(start.shape)}")
    bases: tuple[Basis] = ("full" if reorthogonalise else "none",)
    return lanczos_lockstep(operator, [start], steps, bases=bases, on_step=on_step)[0]


def lanczos_lockstep(
    operator: SymmetricOperator,
    starts: Sequence[Tensor],
    steps: int,
    *,
    bases: Sequence[Basis],
    stop: StopRule | None = None,
    look_every: int = 1,
    on_step: Callable[[int], None] | None = None,
    on_basis: Callable[[Tensor], None] | None = None,
) -> tuple[Tridiagonal, ...]:
    """Runs Lanczos from k start vectors side by side, so that each step is one ``matmat`` (Golub and Van Loan, 10.1).

    The three-term recurrence makes a new vector orthogonal to the last two, and for a symmetric operator to all before
    them up to rounding. With a basis one pass of classical Gram-Schmidt against the whole of it then removes what rounding
    left (two matrix products), and no copies of converged eigenvalues appear. The recurrence stands for the first of the
    two passes that are enough (Giraud et al. 2005): on spectra over up to twelve decades both orders leave the basis
    orthogonal to the same digit. A product that isn't symmetric to rounding (``noise``) gets a second pass, since there the
    recurrence leaves more than rounding behind; and a run ends where the pass took out as much as it left, since from there
    on errors would grow from step to step. Without a basis the quadrature stays right, but Ritz values may hold copies;
    with one in bfloat16 they come late, but can come. A basis in the host's memory is as good as one on the device, and
    slower: every pass copies it over.

    Nothing in the loop waits for the device (see `Coefficients` for how ``stop`` looks). An invariant subspace (residual at
    rounding level) can therefore not end the loop: from there on the vectors are zero, and the coefficients are cut off
    afterwards. Products are rescaled by a power of two, found in the first one, so a run for c*H is that for H exactly as
    long as c is one, and to rounding for any other c, whatever its size.

    Over several processes (``shards``) each keeps its part of every vector: sums over entries are one all-reduce each, three
    a step besides the product's: alpha, all coefficients of a Gram-Schmidt pass together, and the residual's norm.

    Args:
        operator: see `SymmetricOperator`.
        starts: k vectors of shape (n,), or this process's parts of them; unit norm, the operator's dtype and device. They
            are not modified.
        steps: products per start, at least 1; at most n are made.
        bases: what each run keeps. Memory: steps * n elements for a basis, and some five vectors for a run.
        stop: whether to end the run. Over several processes, one that says so ends it on all of them.
        look_every: steps from one look of ``stop`` to the next; on a GPU it sees the coefficients of the look before.
        on_step: called on the host with the number of steps queued so far.
        on_basis: called at the end with the first run's basis, shape (steps, n) or this process's part of it, which the
            run doesn't need any more; with no rows where it kept none.

    Returns:
        One tridiagonal matrix per start.

    Raises:
        ValueError: ``steps`` is below 1, or the operator returned NaN or infinity.
        OtherRankFailedError: there are several processes, and one has no memory for its basis.
        Exception: whatever went wrong in this process; the others see NaN.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    steps = min(steps, operator.size)
    coefficients = Coefficients(len(starts), steps, operator.device)
    passes = 1 if product_noise(operator) <= rounding_noise(operator.dtype) else 2
    shards = shards_of(operator)
    agree: Callable[[bool], bool] = getattr(operator, "agree", bool)
    if (reserve := getattr(operator, "reserve", None)) is not None:
        reserve(len(starts))
    runs = all_or_nobody(
        agree,
        lambda: [_Run(*each, steps, passes, shards) for each in zip(starts, bases, strict=True)],
        "memory for its Lanczos basis",
    )
    nan = coefficients.values.new_full((), float("nan"))
    failed = nowhere(operator).expand(len(runs), -1)

    def goes_on() -> bool:
        seen = coefficients.look(taken)
        return not seen.shape[2] or bool(np.isfinite(seen).all() and stop and not stop(_tridiagonals(seen, bases)))

    taken = 0
    while taken < steps:
        products = operator.matmat(shards.attempt(lambda: _stacked(runs), failed))
        for i, (run, product) in enumerate(zip(runs, products, strict=True)):
            if taken == 0:
                coefficients.scale[i] = run.rescale(product)
            advance = partial(run.advance, product, taken)
            found = shards.attempt(advance, (nan, nan), run.sums(taken))
            coefficients.values[0, i, taken], coefficients.values[1, i, taken] = found
        del products, product, advance  # before the next ones need the memory
        taken += 1
        if on_step is not None:
            shards.attempt(partial(on_step, taken), None)
        if stop is not None and taken % look_every == 0 and taken < steps and not agree(shards.attempt(goes_on, False)):
            break
    shards.settle()
    if on_basis is not None:
        on_basis(runs[0].basis)
    return _tridiagonals(coefficients.all()[:, :, :taken], bases)


def _stacked(runs: Sequence[_Run]) -> Tensor:
    """The runs' newest vectors, shape (k, local size)."""
    return runs[0].q[None] if len(runs) == 1 else torch.stack([run.q for run in runs])


class _Run:
    """One run's vectors: the newest one (q), the one before, and the basis they belong to."""

    def __init__(self, start: Tensor, basis: Basis, steps: int, passes: int, shards: Shards) -> None:
        dtype = torch.bfloat16 if basis == "half" else start.dtype
        self.q, self._previous, self._w = start.clone(), torch.zeros_like(start), torch.empty_like(start)
        rows = 0 if basis == "none" else steps
        where = torch.device("cpu") if basis == "host" else start.device
        pinned = basis == "host" and start.is_cuda  # or copies would wait
        self.basis = torch.empty(rows, start.numel(), dtype=dtype, device=where, pin_memory=pinned)
        self._passes, self._shards = passes, shards
        self._beta = start.new_zeros((), dtype=torch.float64)
        self._largest = self._beta
        self._scale = start.new_ones(())

    def rescale(self, product: Tensor) -> Tensor:
        """Makes the power of two just above the largest entry of the first product the unit; 1 where that is zero."""
        largest = torch.linalg.vector_norm(product, float("inf"))  # without a vector of absolute values
        exponent = torch.frexp(self._shards.largest(largest)).exponent
        self._scale = torch.ldexp(torch.ones_like(self._scale), exponent)
        return self._scale

    def sums(self, step: int) -> list[Callable[[], object]]:
        """The collectives of `advance`, with NaN: alpha, the passes' coefficients, the norm."""
        sizes = [1, *(self._passes * [step + 1] if self.basis.shape[0] else []), 1]
        return [partial(self._sum_of_nan, size) for size in sizes]

    def _sum_of_nan(self, size: int) -> Tensor:
        return self._shards.total(torch.full((size,), float("nan"), dtype=torch.float64, device=self._beta.device))

    def advance(self, product: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Takes the next step from the product with q; returns alpha and beta, float64 scalars on the device."""
        q, w, total = self.q, self._w, self._shards.total
        torch.div(product, self._scale, out=w)
        alpha = total(inner_products(q[None], w))[0]
        w.addcmul_(q, alpha.to(w.dtype), value=-1).addcmul_(self._previous, self._beta.to(w.dtype), value=-1)
        removed = torch.zeros_like(alpha)
        if self.basis.shape[0]:
            self.basis[step].copy_(q, non_blocking=True)
            rows = self.basis[: step + 1]
            for _ in range(self._passes):
                left = total(inner_products(rows, w))
                subtract_combination(w, rows, left)
                alpha = alpha + left[-1]
                removed = norm(left)
        residual = self._shards.norm(w)
        self._largest = torch.maximum(self._largest, torch.maximum(alpha.abs(), residual))
        # NaN compares false, so it is carried on and refused at the end.
        invariant = residual <= torch.maximum(rounding_noise(w.dtype) * self._largest, ERROR_MARGIN * removed)
        self._beta = torch.where(invariant, 0.0, residual)
        torch.mul(w, torch.where(invariant, 0.0, residual.reciprocal()), out=self._previous)
        self.q, self._previous = self._previous, q
        return alpha, self._beta


def _tridiagonals(coefficients: NDArray[np.float64], bases: Sequence[Basis]) -> tuple[Tridiagonal, ...]:
    """The runs so far, each up to its first vanishing beta."""
    found = []
    for i, basis in enumerate(bases):
        alpha, beta = coefficients[:, i]
        ends = np.flatnonzero(beta == 0.0)
        used = int(ends[0]) + 1 if ends.size else alpha.size
        found.append(Tridiagonal(alpha[:used], beta[:used], basis in EXACT_BASES))
    return tuple(found)
