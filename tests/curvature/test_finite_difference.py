"""Finite differences: accurate where the loss is smooth, refused where it has kinks, and nothing left
behind."""

from __future__ import annotations

import random

import curvature_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.finite_difference import FiniteDifferenceCheck, FiniteDifferenceHessian
from lightning_rmt.curvature.hessian import Hessian

SMOOTH = [name for name in cases.CASES if name not in ("linear in all",) and cases.build(name).smooth]
KINKED = [name for name in cases.CASES if not cases.build(name).smooth]


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_losses_in_float64(name):
    made = cases.build(name)
    H = FiniteDifferenceHessian(made.loss, made.parameters, made.batches)
    assert H.checked is not None
    assert H.checked.ok
    cases.reseed()
    dense = cases.dense_hessian(made)
    V = torch.randn(3, H.size, dtype=H.dtype)
    for found, exact in zip(H.matmat(V), V @ dense, strict=True):
        assert float((found - exact).norm() / exact.norm()) < 1e-6
    cases.reseed()
    assert torch.allclose(H.gradient, cases.dense_gradient(made), rtol=1e-11, atol=1e-13)


def single(name, seed=0):
    made = cases.build(name, seed)
    made.model.float()
    made.batches = [tuple(t.float() if t.is_floating_point() else t for t in b) for b in made.batches]
    return made


@pytest.mark.parametrize("name", ["mlp tanh", "cnn groupnorm gelu", "encoder gelu", "lstm", "mlp dropout"])
@pytest.mark.parametrize("seed", [0, 1])
def test_smooth_losses_in_float32(name, seed):
    made = single(name, seed)
    H = FiniteDifferenceHessian(made.loss, made.parameters, made.batches)
    cases.reseed(seed)
    exact = Hessian(made.loss, made.parameters, made.batches)
    u = torch.randn(H.size)
    for v in (u, exact.matvec(u), 1e-6 * u, 1e6 * u):
        assert float((H.matvec(v) - exact.matvec(v)).norm() / exact.matvec(v).norm()) < 2e-3
    assert exact.noise < H.noise == H.checked.error < 2e-3


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kinks_are_refused(name, seed, dtype):
    """Wider networks than the other cases: the more kinks, the surer they are met."""
    torch.manual_seed(seed)
    wide = {
        "mlp relu": lambda: cases.case(cases.mlp(nn.ReLU(), 60)),
        "mlp inplace relu": lambda: cases.case(cases.mlp(nn.ReLU(inplace=True), 60)),
        "cnn batchnorm relu": lambda: cases.image_case(activation=nn.ReLU()),
        "cnn maxpool": lambda: cases.image_case(pool=nn.MaxPool2d(2)),
        "encoder relu": lambda: cases.case(Encoder(), shape=(5, 16), counts=(16,)),
    }[name]()
    if dtype == "float32":
        wide.model.float()
        wide.batches = [(x.float(), y) for x, y in wide.batches]
    with pytest.raises(CurvatureError, match=r"finite differences can't be trusted here: the loss has kinks") as caught:
        FiniteDifferenceHessian(wide.loss, wide.parameters, wide.batches)
    assert "Use Hessian" in str(caught.value)
    accepted = FiniteDifferenceHessian(wide.loss, wide.parameters, wide.batches, tolerance=float("inf"))
    assert accepted.checked is None
    assert accepted.noise == 0.02
    assert not accepted.check().ok


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


def test_the_check_earns_its_place():
    """The control: without it, a network with kinks gives products that are wrong by more than themselves."""
    made = cases.image_case(activation=nn.ReLU())
    made.model.float()
    made.batches = [(x.float(), y) for x, y in made.batches]
    H = FiniteDifferenceHessian(made.loss, made.parameters, made.batches, tolerance=float("inf"))
    exact = Hessian(made.loss, made.parameters, made.batches)
    errors = []
    for _ in range(5):
        v = torch.randn(H.size)
        errors.append(float((H.matvec(v) - exact.matvec(v)).norm() / exact.matvec(v).norm()))
    assert max(errors) > 0.5


def test_noise_is_refused():
    """A loss that draws from a generator of its own differs between evaluations."""
    made = cases.build("mlp tanh")
    own = torch.Generator().manual_seed(0)

    def loss(batch):
        x, y = batch
        return F.cross_entropy(made.model(x + 0.1 * torch.randn(x.shape, generator=own, dtype=x.dtype)), y)

    with pytest.raises(CurvatureError, match="noisy"):
        FiniteDifferenceHessian(loss, made.parameters, made.batches)


def test_what_has_no_second_derivative():
    """EmbeddingBag, against the same function written with an Embedding."""
    table = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    head = nn.Linear(3, 3).double()
    batches = [(torch.randint(6, (n, 4)), torch.randint(3, (n,))) for n in (5, 2)]

    def bag(batch):
        return F.cross_entropy(head(F.embedding_bag(batch[0], table, mode="sum").tanh()), batch[1])

    def plain(batch):
        return F.cross_entropy(head(F.embedding(batch[0], table).sum(1).tanh()), batch[1])

    parameters = [table, *head.parameters()]
    H = FiniteDifferenceHessian(bag, parameters, batches)
    exact = Hessian(plain, parameters, batches)
    V = torch.randn(3, H.size, dtype=H.dtype)
    assert torch.allclose(H.matmat(V), exact.matmat(V), rtol=1e-6, atol=1e-8)


def test_sparse_gradients_work():
    embedding = nn.Embedding(5, 3, sparse=True).double()
    loss = lambda batch: embedding(batch).tanh().pow(2).sum()  # noqa: E731
    batch = torch.tensor([0, 3, 3])
    H = FiniteDifferenceHessian(loss, embedding.parameters(), [batch])
    embedding.sparse = False
    exact = Hessian(loss, embedding.parameters(), [batch])
    v = torch.randn(15, dtype=torch.float64)
    assert torch.allclose(H.matvec(v), exact.matvec(v), rtol=1e-6, atol=1e-8)


def snapshot(made):
    return [(p.data_ptr(), p._version, p.grad, p.detach().clone()) for p in made.parameters]


def assert_untouched(made, before):
    for p, (pointer, version, grad, value) in zip(made.parameters, before, strict=True):
        assert (p.data_ptr(), p._version) == (pointer, version)
        assert p.grad is grad
        assert torch.equal(p.detach(), value)


def test_parameters_come_back_as_the_same_tensors():
    made = cases.build("frozen and unused")
    graph = made.loss(made.batches[0])  # a live graph, as in the middle of a training step
    before = snapshot(made)
    H = FiniteDifferenceHessian(made.loss, made.parameters, made.batches)
    H.matmat(torch.randn(2, H.size, dtype=H.dtype))
    assert_untouched(made, before)
    expected = torch.autograd.grad(made.loss(made.batches[0]), made.model.head.weight)[0]
    assert torch.equal(torch.autograd.grad(graph, made.model.head.weight)[0], expected)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_parameters_come_back_after_an_exception(kind):
    made = cases.build("mlp tanh")
    failing = []

    def loss(batch):
        if failing:
            assert not torch.equal(made.parameters[0].detach(), original)  # they are displaced at this moment
            raise kind("stop")
        return made.loss(batch)

    original = made.parameters[0].detach().clone()
    before, state = snapshot(made), torch.get_rng_state()
    H = FiniteDifferenceHessian(loss, made.parameters, made.batches)
    failing.append(True)
    with pytest.raises(kind, match="stop"):
        H.matvec(torch.ones(H.size, dtype=H.dtype))
    assert_untouched(made, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_evaluation_draws_the_same_random_numbers_and_none_is_used_up():
    made = cases.build("mlp dropout")

    def loss(batch):
        x, y = batch
        scale = 1.0 + 0.5 * np.random.rand() + 0.5 * random.random()
        return scale * F.cross_entropy(made.model(x), y)

    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    H = FiniteDifferenceHessian(loss, made.parameters, made.batches)
    v = torch.randn(H.size, dtype=H.dtype, generator=torch.Generator().manual_seed(1))
    first = H.matvec(v)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    torch.randn(3), np.random.rand(), random.random()
    assert torch.equal(H.matvec(v), first)


def test_zero_vector_and_linear_loss():
    made = cases.build("mlp tanh")
    H = FiniteDifferenceHessian(made.loss, made.parameters, made.batches)
    zero = torch.zeros(2, H.size, dtype=H.dtype)
    assert torch.equal(H.matmat(zero), zero)
    assert H.matmat(zero[:0]).shape == (0, H.size)
    x = torch.ones(3, requires_grad=True)
    linear = FiniteDifferenceHessian(lambda _: 2 * x.sum(), [x], [None])
    assert torch.equal(linear.matvec(torch.ones(3)), torch.zeros(3))


def test_a_given_step_is_used_and_checked():
    made = cases.build("mlp tanh")
    H = FiniteDifferenceHessian(made.loss, made.parameters, made.batches, step=1e-4)
    assert H.step == H.checked.step == 1e-4
    with pytest.raises(CurvatureError, match=r"at the best step, 1\.0e\+01, two steps disagree by .* float64 copy"):
        FiniteDifferenceHessian(made.loss, made.parameters, made.batches, step=10.0)
    for step in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            FiniteDifferenceHessian(made.loss, made.parameters, made.batches, step=step)


def test_half_precision_is_refused():
    made = cases.build("mlp tanh")
    made.model.bfloat16()
    with pytest.raises(ValueError, match=r"'0' is torch.bfloat16.*float32 or float64"):
        FiniteDifferenceHessian(made.loss, made.parameters, made.batches)


def test_stale_casts_of_an_enclosing_autocast_region_are_not_used():
    """Autocast keeps casts of parameters, by identity: displaced data would go unseen and every product be
    zero."""
    made = single("mlp tanh")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        H = FiniteDifferenceHessian(made.loss, made.parameters, made.batches, step=0.5, tolerance=float("inf"))
        v = torch.randn(H.size)
        found = H.matvec(v)
    exact = Hessian(made.loss, made.parameters, made.batches).matvec(v)
    assert float(found @ exact / found.norm() / exact.norm()) > 0.9


def test_nan_never_passes_a_check():
    nan = float("nan")
    assert FiniteDifferenceCheck(0.01, 0.01, 0.01, 1.0, 0.02).ok
    assert not FiniteDifferenceCheck(nan, 0.01, 0.01, 1.0, 0.02).ok
    assert not FiniteDifferenceCheck(0.01, nan, 0.01, 1.0, 0.02).ok
    assert not FiniteDifferenceCheck(0.01, 0.01, nan, 1.0, 0.02).ok
    assert not FiniteDifferenceCheck(0.06, 0.01, 0.01, 1.0, 0.02).ok


def test_release():
    made = cases.build("mlp tanh")
    with FiniteDifferenceHessian(made.loss, made.parameters, made.batches) as H:
        pass
    with pytest.raises(RuntimeError, match="released"):
        H.matvec(torch.ones(H.size, dtype=H.dtype))


def test_where_exact_products_do_not_fit_central_differences_measure_the_error():
    made = cases.build("mlp tanh")
    roomy = FiniteDifferenceHessian(made.loss, made.parameters, made.batches, scheme="forward", memory_limit=2**40)
    tight = FiniteDifferenceHessian(made.loss, made.parameters, made.batches, scheme="forward", memory_limit=1)
    assert (roomy.measured.method, roomy.doubts) == ("double backward", "")
    assert tight.measured.method == "central differences"
    assert "second-order graphs take about" in tight.doubts
    assert tight.product_error == pytest.approx(roomy.product_error, rel=0.5)


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), nn.Hardtanh(), nn.ReLU6(), nn.Hardswish(), nn.MaxPool1d(2)],
    ids=str,
)
def test_kinks_that_can_be_seen_are_refused_whatever_a_few_vectors_meet(layer, scheme):
    """One vector may meet none of them, and the later ones of a run all: errors of a factor of 13 were certified."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), layer, nn.LazyLinear(2)).double()
    x, y = torch.randn(3, 4).double(), torch.randint(2, (3,))
    loss = lambda batch: F.cross_entropy(net(batch), y)  # noqa: E731
    loss(x)
    with pytest.raises(CurvatureError, match="the loss has kinks"):
        FiniteDifferenceHessian(loss, net.parameters(), [x], scheme=scheme)
    FiniteDifferenceHessian(loss, net.parameters(), [x], scheme=scheme, tolerance=float("inf"))  # as asked for
