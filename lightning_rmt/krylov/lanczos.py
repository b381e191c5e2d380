"""Lanczos on any symmetric operator, with or without a stored basis, and without host synchronisation inside a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lightning_rmt.krylov.reductions import inner_products, norm
from lightning_rmt.krylov.tridiagonal import Tridiagonal


class SymmetricOperator(Protocol):
    """What Lanczos needs to know of an operator; every class in ``curvature/`` has it, and so may yours."""

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


def rounding_noise(dtype: torch.dtype) -> float:
    """Relative error to expect of a product in ``dtype``: 2.4e-6 in float32, 4.4e-15 in float64, 0.05 in bfloat16.

    Twenty times the machine epsilon, and at most 0.05: the upper end of the errors measured for Hessian products of small
    networks, 1e-7 to 2.5e-6 of the operator's norm in float32 and 3e-3 to 5e-2 in bfloat16.
    """
    return min(20 * torch.finfo(dtype).eps, 0.05)


def start_vector(operator: SymmetricOperator, seed: int) -> Tensor:
    """Random unit vector of shape (n,), uniform on the sphere.

    Drawn on the CPU in float32 from its own generator, so that it is the same on every rank, device and dtype, and no
    global random state is touched. Normalised in float64: a norm taken in float32 costs orthogonality.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(operator.size, generator=generator).to(operator.device, operator.dtype)
    return (vector / norm(vector)).to(operator.dtype)


def lanczos(
    operator: SymmetricOperator,
    start: Tensor,
    steps: int,
    *,
    reorthogonalise: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> Tridiagonal:
    """Runs Lanczos from ``start`` (Golub and Van Loan, 4th ed., section 10.1).

    With ``reorthogonalise`` every new vector is orthogonalised against the whole basis by classical Gram-Schmidt, twice
    (CGS2; Giraud et al. 2005): two matrix products a pass, and no copies of converged eigenvalues. Memory: steps * n
    elements. Without, three vectors are kept; the quadrature stays right, but the Ritz values may hold copies.

    Coefficients stay on the operator's device until the end, so nothing in the loop waits for it. An invariant subspace
    (residual at rounding level) can therefore not stop the loop: from there on the vectors are zero, and the
    coefficients are cut off afterwards. Vectors are rescaled by a power of two, found in the first product, so the run
    for c*H is that for H exactly as long as c is one, and to rounding for any other c, whatever its size.

    Args:
        operator: see `SymmetricOperator`.
        start: shape (n,), unit norm, the operator's dtype and device. It is not modified.
        steps: number of products, at least 1; at most n are made.
        reorthogonalise: keep the basis and orthogonalise against all of it.
        on_step: called on the host with the number of steps queued so far (for a progress bar).

    Returns:
        The tridiagonal matrix, shorter than ``steps`` where an invariant subspace was met.

    Raises:
        ValueError: ``steps`` or the shape of ``start`` is wrong, or the operator returned NaN or infinity.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if start.shape != (operator.size,):
        raise ValueError(f"start must have shape ({operator.size},), got {tuple(start.shape)}")
    steps = min(steps, operator.size)
    device, dtype = operator.device, operator.dtype
    alpha = torch.zeros(steps, dtype=torch.float64, device=device)
    beta = torch.zeros(steps, dtype=torch.float64, device=device)
    largest = torch.zeros((), dtype=torch.float64, device=device)
    basis = torch.empty(steps if reorthogonalise else 0, operator.size, dtype=dtype, device=device)
    scale = torch.ones((), dtype=dtype, device=device)

    q, previous = start, torch.zeros_like(start)
    for j in range(steps):
        w = operator.matmat(q[None])[0]
        if j == 0:
            scale = _power_of_two(w)
        w = w / scale
        if reorthogonalise:
            basis[j] = q
            w, alpha[j] = _orthogonalise(w, basis[: j + 1])
        else:
            alpha[j] = inner_products(q[None], w)[0]
            w = w - alpha[j].to(dtype) * q
            if j:
                w = w - beta[j - 1].to(dtype) * previous
        residual = norm(w)
        largest = torch.maximum(largest, torch.maximum(alpha[j].abs(), residual))
        # NaN compares false, so it is carried on and refused at the end.
        invariant = residual <= rounding_noise(dtype) * largest
        beta[j] = torch.where(invariant, 0.0, residual)
        previous, q = q, torch.where(invariant, 0.0, w / residual).to(dtype)
        if on_step is not None:
            on_step(j + 1)

    coefficients = (torch.stack([alpha, beta]) * scale.double()).cpu().numpy()  # the run's only synchronisation
    ends = (coefficients[1] == 0.0).nonzero()[0]
    used = int(ends[0]) + 1 if ends.size else steps
    return Tridiagonal(coefficients[0, :used], coefficients[1, :used], reorthogonalise)


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Removes the basis from ``w`` twice; also returns the total coefficient on the last basis vector (alpha)."""
    first = inner_products(basis, w)
    w = torch.addmv(w, basis.T, first.to(w.dtype), alpha=-1)
    second = inner_products(basis, w)
    w = torch.addmv(w, basis.T, second.to(w.dtype), alpha=-1)
    return w, first[-1] + second[-1]


def _power_of_two(w: Tensor) -> Tensor:
    """The power of two just above the largest entry of ``w``, as a scalar tensor; 1 where ``w`` is zero."""
    exponent = torch.frexp(w.abs().amax()).exponent
    return torch.ldexp(torch.ones((), dtype=w.dtype, device=w.device), exponent)
