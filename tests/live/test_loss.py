from __future__ import annotations

import pytest
import torch

from lightning_rmt.live.batches import BatchCollector, CapturedBatch, copy_batch
from lightning_rmt.live.loss import curvature_loss, refuse_unusable_loss
from lightning_rmt.live.namespaces import MisconfigurationException


class Module:
    """Only what the loss looks at."""

    automatic_optimization = True

    def training_step(self, batch, batch_idx):
        return batch.pop() * 2 + batch_idx


def captured():
    return CapturedBatch([torch.tensor(3.0)], 5)


def test_training_step_gets_a_fresh_copy_and_its_index_every_time():
    loss, batch = curvature_loss(Module(), None), captured()
    assert [float(loss(batch)), float(loss(batch))] == [11.0, 11.0]
    assert len(batch.batch) == 1


def test_order_of_precedence():
    class WithOwn(Module):
        def curvature_loss(self, batch):
            return batch[0] * 10

    assert float(curvature_loss(WithOwn(), None)(captured())) == 30.0
    value, weight = curvature_loss(WithOwn(), lambda module, batch: (batch[0], 7))(captured())
    assert (float(value), weight) == (3.0, 7)


@pytest.mark.parametrize(
    "step",
    [
        lambda batch: batch[0],
        lambda batch, batch_idx: batch[0],
        lambda batch, index: batch[0],
        lambda *args: args[0][0] if args[1] == 5 else None,
        lambda batch, batch_idx=None: {"loss": batch[0], "extra": 1},
    ],
)
def test_signatures_and_return_types(step):
    module = Module()
    module.training_step = step
    assert float(curvature_loss(module, None)(captured())) == 3.0


def test_what_a_training_step_may_not_return():
    module = Module()
    module.training_step = lambda batch: {"logits": batch}
    with pytest.raises(MisconfigurationException, match=r"without a 'loss'.*logits"):
        curvature_loss(module, None)(captured())
    module.training_step = lambda batch: None
    with pytest.raises(ValueError, match="returned None"):
        curvature_loss(module, None)(captured())
    module.training_step = lambda batch: 3.0
    with pytest.raises(MisconfigurationException, match="float"):
        curvature_loss(module, None)(captured())


def test_manual_optimization_and_dataloader_iter_need_a_loss():
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"manual optimization.*loss_fn"):
        refuse_unusable_loss(module, None)
    refuse_unusable_loss(module, lambda module, batch: batch)
    module.curvature_loss = lambda batch: batch
    refuse_unusable_loss(module, None)

    class Iterating(Module):
        def training_step(self, dataloader_iter):
            return next(dataloader_iter)

    with pytest.raises(MisconfigurationException, match="dataloader_iter"):
        refuse_unusable_loss(Iterating(), None)


def test_exception_is_that_of_both_namespaces():
    from lightning.fabric.utilities.exceptions import MisconfigurationException as OfLightning
    from lightning_fabric.utilities.exceptions import MisconfigurationException as OfPytorchLightning

    assert issubclass(MisconfigurationException, OfLightning)
    assert issubclass(MisconfigurationException, OfPytorchLightning)


def test_copies_are_independent_and_keep_sharing():
    x = torch.ones(3)
    copied = copy_batch({"a": x, "b": [x, "text"]})
    copied["a"].zero_()
    assert x.sum() == 3
    assert copied["b"][0] is copied["a"]

    class Stubborn:
        def __deepcopy__(self, memo):
            raise RuntimeError("no")

    with pytest.raises(TypeError, match="Stubborn"):
        copy_batch(Stubborn())


def test_collector_keeps_the_last_ones():
    collector = BatchCollector(2)
    for i in range(4):
        collector.add(torch.full((1,), float(i)), i)
    assert [c.batch_idx for c in collector.take()] == [2, 3]
    assert len(collector) == 0
