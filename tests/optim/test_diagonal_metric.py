"""P and the edge of stability of torch's optimizers, against what their own steps do."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.optim import diagonal_metric as module
from lightning_rmt.optim.diagonal_metric import diagonal_metric, plain_limit, rule_of

MEMORY = {"betas": (0.9, 1 - 1e-6)}  # a second moment that stays what it is for the 80 steps of a test
LATE = 3e7  # steps after which it is no longer corrected
FROZEN = {
    "sgd": (optim.SGD, {}, {}),
    "momentum": (optim.SGD, {"momentum": 0.9}, {}),
    "dampened": (optim.SGD, {"momentum": 0.8, "dampening": 0.3}, {}),
    "nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}, {}),
    "adam": (optim.Adam, MEMORY, {"exp_avg_sq": 1.0}),
    "adamw": (optim.AdamW, {"betas": (0.5, 1 - 1e-6), "weight_decay": 0.0}, {"exp_avg_sq": 1.0}),
    "amsgrad": (optim.Adam, {**MEMORY, "amsgrad": True}, {"exp_avg_sq": 0.2, "max_exp_avg_sq": 1.0}),
    "nadam": (optim.NAdam, MEMORY, {"exp_avg_sq": 1.0, "mu_product": 0.0}),
    "radam": (optim.RAdam, MEMORY, {"exp_avg_sq": 1.0}),
    "adamax": (optim.Adamax, MEMORY, {"exp_inf": 1.0}),
    "rmsprop": (optim.RMSprop, {"alpha": 1 - 1e-6}, {"square_avg": 1.0}),
    "rmsprop, momentum": (optim.RMSprop, {"alpha": 1 - 1e-6, "momentum": 0.9}, {"square_avg": 1.0}),
    "adagrad": (optim.Adagrad, {}, {"sum": 1.0}),
}


def prepared(kind, groups, options, state):
    """An optimizer long after its start, with second moments (per parameter) that don't change any more."""
    optimizer = kind(groups, **options)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in parameters:
        for key, value in state.items():
            root = float(getattr(p, "root", 1.0))
            optimizer.state[p][key].fill_(value * (root if key == "exp_inf" else root**2))
        if "step" in optimizer.state[p] and kind is not optim.Adagrad:
            optimizer.state[p]["step"].fill_(LATE)
    return optimizer


def growth(optimizer, parameters, hessian, steps=80):
    """By how much an iterate on the quadratic grows; gradients are so small that no second moment feels them."""
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.data = 1e-15 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    before = torch.cat([p.detach() for p in parameters]).norm()
    for _ in range(steps):
        gradient = hessian @ torch.cat([p.detach() for p in parameters])
        for p, g in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.clone()
        optimizer.step()
    return float(torch.cat([p.detach() for p in parameters]).norm() / before)


@pytest.mark.parametrize("name", FROZEN)
def test_iterates_diverge_just_above_the_limit(name):
    kind, options, state = FROZEN[name]
    base = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    for side, share in (("below", 0.97), ("above", 1.03)):
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        p.root = 0.7
        optimizer = prepared(kind, [p], {"lr": 1e-2, **options}, state)
        metric = diagonal_metric([optimizer], ParameterBlock([p]))
        scale = torch.ones(2, dtype=torch.float64) if metric.scale is None else metric.scale
        hessian = base * share * metric.limit / torch.linalg.eigvalsh(scale[:, None] * base * scale)[-1]
        found = growth(optimizer, [p], hessian)
        assert (found > 10) if side == "above" else (found < 0.1), (side, found)


def test_groups_of_their_own_share_one_limit():
    """Other rates, other momenta, other second moments, even other optimizers: one matrix decides."""
    base = torch.tensor([[2.0, 0.8, 0.3], [0.8, 1.0, 0.4], [0.3, 0.4, 1.5]], dtype=torch.float64)
    for share in (0.97, 1.03):
        ps = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3)]
        ps[0].root, ps[1].root = 0.5, 2.0
        groups = [{"params": [ps[0]]}, {"params": [ps[1]], "lr": 0.07, "betas": (0.6, 1 - 1e-6)}]
        adam = prepared(optim.Adam, groups, {"lr": 0.1, **MEMORY}, {"exp_avg_sq": 1.0})
        sgd = optim.SGD([ps[2]], lr=3e-3, momentum=0.5)
        metric = diagonal_metric([adam, sgd], ParameterBlock(ps))
        assert metric.optimizers == ("Adam", "SGD")
        hessian = base * share * metric.limit / torch.linalg.eigvalsh(metric.scale[:, None] * base * metric.scale)[-1]

        class Both:
            def step(self, adam=adam, sgd=sgd):
                adam.step()
                sgd.step()

        found = growth(Both(), ps, hessian)
        assert (found > 10) if share > 1 else (found < 0.1), (share, found)


@pytest.mark.parametrize("name", ["sgd", "momentum", "dampened", "nesterov"])
def test_iterates_diverge_just_above_the_plain_limit(name):
    """Of the largest rate times lambda_max, also where another group of the optimizer is faster and not measured."""
    kind, options, state = FROZEN[name]
    base = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    for side, share in (("below", 0.97), ("above", 1.03)):
        p, faster = nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(2))
        groups = [{"params": [p]}, {"params": [faster], "lr": 0.05}]
        alone, both = (prepared(kind, some, {"lr": 1e-2, **options}, state) for some in ([p], groups))
        limit = plain_limit([alone], [p]) / 1e-2
        assert plain_limit([both], [p]) / 0.05 == pytest.approx(limit)
        found = growth(alone, [p], base * share * limit / torch.linalg.eigvalsh(base)[-1])
        assert (found > 10) if side == "above" else (found < 0.1), (side, found)


def test_the_plain_limit_where_the_step_is_not_known_sgd():
    p = nn.Parameter(torch.zeros(2))

    class Other(optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1, "momentum": 0.9})

    assert plain_limit([optim.SGD([p], lr=0.0, momentum=0.9)], [p]) == pytest.approx(3.8)  # a warm-up from 0
    assert plain_limit([Other([p])], [p]) == 2
    assert plain_limit([optim.SGD([p], lr=0.1, momentum=0.9)], [nn.Parameter(torch.zeros(2))]) == 2
    assert plain_limit([optim.AdamW([p], lr=0.1)], [p]) is None
    assert plain_limit([optim.SGD([p], lr=0.1, maximize=True)], [p]) is None


def test_the_published_threshold():
    """Cohen et al. 2022: 38 / lr for Adam with beta1 = 0.9, once the mean needs no correction any more."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = prepared(optim.Adam, [p], {"lr": 1e-3, **MEMORY}, {"exp_avg_sq": 4.0})
    metric = diagonal_metric([optimizer], ParameterBlock([p]))
    assert metric.limit == pytest.approx(38 / 1e-3)
    torch.testing.assert_close(metric.scale, torch.full((3,), 0.5**0.5))


def trained(p, **options):
    optimizer = optim.Adam([p], **options)
    for k in range(3):
        p.grad = torch.full_like(p, 0.5 + k)
        optimizer.step()
    return optimizer


def test_what_is_not_moved():
    moved, idle, outside = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = optim.Adam([moved, idle])
    block = ParameterBlock({"moved": moved, "idle": idle, "outside": outside})
    assert diagonal_metric([optimizer], block) is None  # no step yet
    moved.grad = torch.ones(2)
    optimizer.step()
    metric = diagonal_metric([optimizer], block)
    assert metric.unmoved == ("idle", "outside")
    assert (metric.scale[2:] == 0).all()
    assert (metric.scale[:2] > 0).all()


def test_a_rate_of_zero_has_no_limit():
    """As at the first step of a warm-up: the metric is there, the limit isn't."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = trained(p)
    same = diagonal_metric([optimizer], ParameterBlock([p])).scale
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    metric = diagonal_metric([optimizer], ParameterBlock([p]))
    assert metric.limit is None
    assert (metric.scale == same).all()


def test_a_fused_step_that_was_skipped_is_none():
    """A gradient scaler's overflow leaves zeros and a count of 0."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = optim.Adam([p], fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    p.grad = torch.ones(2)
    optimizer.step()
    assert "exp_avg_sq" in optimizer.state[p]
    assert diagonal_metric([optimizer], ParameterBlock([p])) is None


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"lr": torch.tensor(1e-3), "foreach": False}])
def test_implementations_agree(options):
    p, other = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    one = diagonal_metric([trained(p)], ParameterBlock([p]))
    found = diagonal_metric([trained(other, **options)], ParameterBlock([other]))
    torch.testing.assert_close(found.scale, one.scale)
    assert found.limit == pytest.approx(one.limit)


def test_state_is_only_read():
    p = nn.Parameter(torch.zeros(4))
    for kind, options, _ in FROZEN.values():
        optimizer = kind([p], lr=1e-2, **options)
        for _ in range(8):
            p.grad = torch.randn(4)
            optimizer.step()
        before = {key: value.clone() for key, value in optimizer.state[p].items() if torch.is_tensor(value)}
        diagonal_metric([optimizer], ParameterBlock([p]))
        assert all((optimizer.state[p][key] == value).all() for key, value in before.items())


class Renamed(optim.AdamW):
    pass


class Own(optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


def test_which_optimizers_are_known():
    p = nn.Parameter(torch.zeros(2))
    assert rule_of(Renamed([p])) is module._adam
    for unknown in (Own([p]), optim.LBFGS([p]), optim.Adadelta([p]), optim.Rprop([p])):
        assert rule_of(unknown) is None
        with pytest.raises(ValueError, match=type(unknown).__name__):
            diagonal_metric([unknown], ParameterBlock([p]))
