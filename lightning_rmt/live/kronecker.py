"""A measurement of the Kronecker factors of a live module's gradients, over some steps of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rmt.curvature.gradient_factors import GradientFactors
from lightning_rmt.curvature.weight_matrices import matrix_shape, weight_matrices
from lightning_rmt.live.gradients import all_finite, own_scale
from lightning_rmt.local_law.kronecker import KroneckerReading, MatrixReading, read_matrix

PATIENCE = 2
"""A measurement waits so many times the steps that it needs, for layers that don't get a gradient in every step."""


@dataclass(frozen=True)
class FactorSettings:
    """What is measured; the arguments of `KroneckerDiagnostics` of the same names."""

    factor_steps: int
    held_out_steps: int
    beta: float
    parameters: list[str] | None
    max_dim: int
    max_memory_mib: float


class FactorWindow:
    """One measurement. Reads gradients and changes nothing.

    Args:
        module: the LightningModule.
        settings: what is measured.
        begin: step at which it begins.
        name: of the reading.
    """

    def __init__(self, module: nn.Module, settings: FactorSettings, begin: int, name: str) -> None:
        matrices, self._skipped = weight_matrices(
            module,
            settings.parameters,
            settings.max_dim,
            settings.max_memory_mib * 2**20,
            GradientFactors.bytes_needed,
        )
        self._name = name
        self._needed = settings.factor_steps + settings.held_out_steps
        self._layers = {id(parameter): layer for layer, parameter in matrices.items()}
        self._factors = {
            layer: GradientFactors(
                matrix_shape(parameter),
                factor_steps=settings.factor_steps,
                held_out_steps=settings.held_out_steps,
                beta=settings.beta,
                device=parameter.device,
            )
            for layer, parameter in matrices.items()
        }
        self._seen: dict[int, int] = {}  # an optimizer's last step
        self._steps: set[int] = set()
        self._last = begin
        self._not_finite = 0

    @property
    def over(self) -> bool:
        """Whether every layer has its gradients, or too many steps went by."""
        return self._all_done or len(self._steps) >= PATIENCE * self._needed

    @property
    def _all_done(self) -> bool:
        return all(factors.done for factors in self._factors.values())

    @property
    def complete(self) -> bool:
        """Whether any layer has its gradients."""
        return any(factors.done for factors in self._factors.values()) or not self._factors

    def take(self, trainer: Any, optimizer: Any, step: int) -> None:
        """Takes the gradients that an optimizer is about to use.

        Only the first ones in a step: LBFGS asks for the same batch again and again.
        """
        if self._seen.get(id(optimizer)) == step:
            return
        self._seen[id(optimizer)] = step
        gradients = self._gradients(optimizer)
        scale = own_scale(trainer, optimizer)
        if not all_finite(list(gradients.values())):
            self._not_finite += 1
            return
        for layer, gradient in gradients.items():
            self._factors[layer].add(gradient.reshape(self._factors[layer].shape), scale)
        self._steps.add(step)
        self._last = step

    def _gradients(self, optimizer: Any) -> dict[str, Tensor]:
        """Of this optimizer's matrices; a layer with a sparse one is left out for good."""
        found: dict[str, Tensor] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                layer = self._layers.get(id(parameter))
                if layer is None or parameter.grad is None or layer not in self._factors:
                    continue
                if parameter.grad.layout is not torch.strided:
                    self._skipped[layer] = "its gradient is sparse"
                    del self._factors[layer]
                elif not self._factors[layer].done:
                    found[layer] = parameter.grad
        return found

    def finish(self, notes: tuple[str, ...] = ()) -> KroneckerReading:
        """What was found; frees what was collected."""
        layers: dict[str, MatrixReading] = {}
        for layer in list(self._factors):
            factors = self._factors.pop(layer)
            try:
                layers[layer] = read_matrix(factors.moments())
            except ValueError as error:
                self._skipped[layer] = str(error) if factors.steps else "no gradient reached it"
        return KroneckerReading(self._last, self._name, layers, self._skipped, self._not_finite, notes)
