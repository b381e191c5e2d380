"""The coefficients of running Lanczos runs: kept on the device, looked at on the host without making the device wait."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

#: Steps that a GPU stays ahead of the host's look: enough queued work that it never runs dry.
LAG_ON_GPU = 2


class Coefficients:
    """alpha and beta of k runs of at most m steps, and what the host has seen of them.

    On a CPU the host reads the very same memory. On a GPU every step queues a copy to pinned memory with an event behind
    it, and the host waits for the event of `LAG_ON_GPU` steps ago while the device works on what was queued since. So a
    rule that ends a run sees every step, a little late, and the device never waits for the host.

    Attributes:
        values: shape (2, k, m), float64, on the device: alpha and beta, in units of ``scale``.
        scale: shape (k,), float64, on the device.
    """

    def __init__(self, runs: int, steps: int, device: torch.device) -> None:
        self.values = torch.zeros(2, runs, steps, dtype=torch.float64, device=device)
        self.scale = torch.ones(runs, dtype=torch.float64, device=device)
        self._copies: deque[tuple[int, torch.Tensor, torch.Tensor, torch.Event]] = deque()
        self._seen: NDArray[np.float64] = np.empty((2, runs, 0))

    def look(self, step: int) -> NDArray[np.float64]:
        """What the host knows once ``step`` steps are queued, shape (2, k, steps known), in the operator's units.

        Only those who look pay for it: a few microseconds on a CPU, two small copies on a GPU.
        """
        if self.values.device.type != "cuda":
            self._seen = self._in_units(self.values[:, :, :step].cpu().numpy(), self.scale.cpu().numpy())
            return self._seen
        event = torch.Event(self.values.device)
        pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in (self.values, self.scale)]
        pinned[0].copy_(self.values, non_blocking=True)
        pinned[1].copy_(self.scale, non_blocking=True)
        event.record()
        self._copies.append((step, pinned[0], pinned[1], event))
        while self._copies and self._copies[0][0] <= step - LAG_ON_GPU:
            steps, values, scale, event = self._copies.popleft()
            event.synchronize()
            self._seen = self._in_units(values[:, :, :steps].numpy(), scale.numpy())
        return self._seen

    def all(self) -> NDArray[np.float64]:
        """All coefficients in the operator's units, shape (2, k, m); waits for the device, the only time in a run."""
        return self._in_units(self.values.cpu().numpy(), self.scale.cpu().numpy())

    @staticmethod
    def _in_units(values: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(values * scale[:, None])
