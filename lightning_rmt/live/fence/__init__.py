"""The fence: inside it a `training_step` can be run again and differentiated twice, and training never notices.

```python
with fence(trainer, module, seed=0):
    loss = module.training_step(batch, batch_idx)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)   # never .backward()
```

After the block, also after an exception or Ctrl-C inside it, training goes on bitwise as if the block had not been.
Each of `PARTS` guards one thing; tests/live/test_bitwise.py takes them away one at a time and sees training change.

| part | guards |
|---|---|
| `randomness` | the global generators of torch, NumPy and Python; seeded inside |
| `gradient_mode` | gradients are recorded inside, whatever mode surrounds the fence |
| `buffers` | running statistics and the like: copies inside, the original tensor objects back afterwards |
| `parameters` | `grad`, `requires_grad`, gradient hooks; values that the step overwrites (momentum encoders) |
| `metrics` | torchmetrics states, which are no buffers |
| `attributes` | the Python attributes of every submodule: counters, lists, stored losses, own generators |
| `trainer_state` | `should_stop`, learning rates, schedulers, what the logger connector remembers |
| `logging` | `self.log`, `self.print`, the loggers and the profiler are silent inside |
| `training_flags` | `module.training` of every submodule |
| `twice_differentiable` | eager code, kernels with a second derivative (not `first_order`); dense embedding gradients |
| `precision` | autocast off, or as trained |

What no fence can take back: files and prints of the user's own, messages to services (a `wandb.log` that bypasses the
Trainer's loggers), iterators that `training_step` advances, state that lives in other processes, in closures or in
objects of foreign packages. For such a module give the loss on its own (`loss_fn`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_rmt.live.fence.enclosure import Enclosure, enclose
from lightning_rmt.live.fence.generators import randomness
from lightning_rmt.live.fence.modes import gradient_mode, precision, training_flags, twice_differentiable
from lightning_rmt.live.fence.python_state import attributes, metrics, trainer_state
from lightning_rmt.live.fence.silence import logging
from lightning_rmt.live.fence.tensors import buffers, parameters

__all__ = ["PARTS", "fence"]

# In the order of entering; left in reverse. `gradient_mode` comes early because a copy that is made under
# inference_mode could never be differentiated, `randomness` first so that nothing after it can draw unnoticed.
PARTS: tuple[Callable[[Enclosure, ExitStack], None], ...] = (
    randomness,
    gradient_mode,
    buffers,
    parameters,
    metrics,
    attributes,
    trainer_state,
    logging,
    training_flags,
    twice_differentiable,
    precision,
)


@contextmanager
def fence(
    trainer: Any, module: nn.Module, *, seed: int, autocast: bool = False, first_order: bool = False
) -> Iterator[None]:
    """Guard training against whatever the block does with the module.

    Costs about a millisecond for a network of the size of a ResNet-18 and copies the buffers, but no trained parameter;
    only the first fence around a module keeps a copy of its parameters, to learn which ones its step overwrites.

    Args:
        trainer: the Trainer (of `pytorch_lightning` or `lightning.pytorch`) that trains the module, or None.
        module: the LightningModule itself, never the wrapper that a strategy put around it.
        seed: what torch, NumPy and Python draw from inside. Derive it from a fixed seed, the step and the rank, and the
            masks of dropout are the same when a run is resumed.
        autocast: False computes in the parameters' own precision; True as the Trainer's `precision` computes, which
            under "bf16-mixed" costs two to three digits of a Hessian-vector product.
        first_order: the loss is differentiated once only: fused and compiled code runs as it does in training, and
            nothing is compiled that isn't yet.

    Yields:
        Nothing. Everything is restored on leaving, whichever way the block is left, and a step of the restoration that
        fails doesn't keep the others from running.
    """
    enclosure = enclose(trainer, module, seed=seed, autocast=autocast, first_order=first_order)
    with ExitStack() as undo:
        for part in PARTS:
            part(enclosure, undo)
        yield
