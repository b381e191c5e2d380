"""Kronecker factors of one weight matrix's gradient, and the gradient's second moments in their eigenvectors. Torch only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_rmt.local_law.kronecker import MatrixMoments

GROUPS = 8
"""Groups of consecutive held-out steps, for the jackknife."""


class GradientFactors:
    """Collects the gradients of one matrix, one a step, and forgets them.

    The first ``factor_steps`` go into moving averages of ``GG'`` and ``G'G``; then these are diagonalised, and the squares
    of the ``held_out_steps`` that follow are summed in both bases. A basis thus never sees the gradients that judge it: in
    its own, even one gradient of pure noise is diagonal.

    Factors are in float64 where the device has it. The gradient is only read. `bytes_needed` says what is kept.

    Args:
        shape: (m, n) of the gradient.
        factor_steps: at least 2.
        held_out_steps: at least `GROUPS`.
        beta: decay of the moving averages per step, above 0 and below 1.
        device: of the gradients.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        factor_steps: int,
        held_out_steps: int,
        beta: float,
        device: torch.device | str = "cpu",
    ) -> None:
        if factor_steps < 2 or held_out_steps < GROUPS or not 0 < beta < 1:
            raise ValueError(
                f"factor_steps must be at least 2, held_out_steps at least {GROUPS} and beta between 0 and 1, got "
                f"{factor_steps}, {held_out_steps} and {beta}"
            )
        self.shape = shape
        self.steps = 0
        self._factor_steps, self._held_out_steps, self._beta = factor_steps, held_out_steps, beta
        self._device = torch.device(device)
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        m, n = shape
        self._left = torch.zeros(m, m, dtype=self._dtype, device=self._device)  # factors, then their eigenvectors
        self._right = torch.zeros(n, n, dtype=self._dtype, device=self._device)
        self._levels: tuple[Tensor, Tensor] | None = None
        self._dead: tuple[Tensor, Tensor] | None = None
        self._scale = 1.0
        self._plain: Tensor | None = None
        self._rotated: Tensor | None = None

    @staticmethod
    def bytes_needed(shape: tuple[int, int]) -> int:
        """Bytes kept between two steps, at most."""
        m, n = shape
        return 8 * (m * m + n * n) + 2 * 4 * GROUPS * m * n

    @property
    def needed(self) -> int:
        """Gradients that it takes in all."""
        return self._factor_steps + self._held_out_steps

    @property
    def done(self) -> bool:
        """Whether it has them."""
        return self.steps >= self.needed

    @torch.no_grad()
    def add(self, gradient: Tensor, scale: float = 1.0) -> None:
        """Takes the next step's gradient, times ``scale``; a finite one.

        Raises:
            ValueError: it has another shape.
        """
        if gradient.shape != self.shape:
            raise ValueError(f"expected a gradient of shape {self.shape}, got {tuple(gradient.shape)}")
        if self.done:
            return
        G = gradient.detach().to(self._dtype) * scale
        if self._levels is None:
            # sums of b^age; divided by their weights' sum below
            self._left.mul_(self._beta).addmm_(G, G.T)
            self._right.mul_(self._beta).addmm_(G.T, G)
        else:
            assert self._plain is not None
            assert self._rotated is not None
            group = (self.steps - self._factor_steps) * GROUPS // self._held_out_steps
            G = G / self._scale  # so that float32 holds the squares of any gradient
            self._plain[group] += G.square()
            self._rotated[group] += (self._left.T @ G @ self._right).square()
        self.steps += 1
        if self.steps == self._factor_steps:
            self._diagonalise()

    def _diagonalise(self) -> None:
        m, n = self.shape
        share = (1 - self._beta) / (1 - self._beta**self._factor_steps)
        self._dead = self._left.diagonal() == 0, self._right.diagonal() == 0
        left, self._left = torch.linalg.eigh(self._left * share)
        right, self._right = torch.linalg.eigh(self._right * share)
        self._levels = left, right
        self._scale = float((left.sum() / (m * n)).clamp_min(0).sqrt()) or 1.0
        self._plain = torch.zeros(GROUPS, m, n, dtype=torch.float32, device=self._device)
        self._rotated = torch.zeros_like(self._plain)

    @torch.no_grad()
    def moments(self) -> MatrixMoments:
        """What was collected, as float64 arrays.

        Raises:
            ValueError: it isn't `done`.
        """
        if not self.done or self._levels is None or self._plain is None or self._rotated is None:
            raise ValueError(f"only {self.steps} of {self.needed} gradients came")
        counts = [0] * GROUPS
        for step in range(self._held_out_steps):
            counts[step * GROUPS // self._held_out_steps] += 1
        plain, rotated, rows, columns = [], [], [], []
        for without in (None, *range(GROUPS)):
            kept = [group for group in range(GROUPS) if group != without]
            steps = sum(counts[group] for group in kept)
            mean = self._rotated[kept].sum(0, dtype=self._dtype) / steps * self._scale**2
            rows.append(mean.sum(1))
            columns.append(mean.sum(0))
            rotated.append(mean.sqrt().sum())
            plain.append((self._plain[kept].sum(0, dtype=self._dtype) / steps).sqrt().sum() * self._scale)
        assert self._dead is not None
        squares = self._plain.sum(0, dtype=self._dtype)
        shares = (squares.sum(1) / squares.sum(), squares.sum(0) / squares.sum())
        dead_left, dead_right = (
            (int(dead.sum()), float(share[dead].sum())) for dead, share in zip(self._dead, shares, strict=True)
        )
        return MatrixMoments(
            shape=self.shape,
            factor_steps=self._factor_steps,
            held_out_steps=self._held_out_steps,
            beta=self._beta,
            left=_array(self._levels[0]),
            right=_array(self._levels[1]),
            held_left=_array(torch.stack(rows)),
            held_right=_array(torch.stack(columns)),
            plain=_array(torch.stack(plain)),
            rotated=_array(torch.stack(rotated)),
            dead_left=dead_left,
            dead_right=dead_right,
        )


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.float64)
