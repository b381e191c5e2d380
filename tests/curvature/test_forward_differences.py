"""Forward differences: one gradient a product, an error that is what it says, and no kinks."""

from __future__ import annotations

import curvature_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rmt.curvature import finite_difference
from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian
from lightning_rmt.curvature.hessian import Hessian

SMOOTH = [name for name in cases.CASES if name not in ("linear in all",) and cases.build(name).smooth]


def forward(made, **options):
    return FiniteDifferenceHessian(made.loss, made.parameters, made.batches, scheme="forward", **options)


def relative(found, exact):
    return float((found - exact).norm() / exact.norm())


def dot(a, b):
    return a.double() @ b.double()


@pytest.mark.parametrize("name", SMOOTH)
def test_against_dense_hessians_in_float64(name):
    made = cases.build(name)
    H = forward(made)
    assert H.measured.ok
    assert (H.measured.method, H.doubts, H.checked) == ("double backward", "", None)
    cases.reseed()
    dense = cases.dense_hessian(made)
    V = torch.randn(3, H.size, dtype=H.dtype)
    for found, exact in zip(H.matmat(V), V @ dense, strict=True):
        assert relative(found, exact) < 1e-5
    cases.reseed()
    assert torch.allclose(H.gradient, cases.dense_gradient(made), rtol=1e-11, atol=1e-13)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in self.inputs(self.norms[0](x)).chunk(3, dim=2))
        x = x + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.feedforward(self.norms[1](x))


class Last(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


def gpt():
    model = nn.Sequential(nn.Embedding(32, 64), Block(64), Block(64), nn.LayerNorm(64), nn.Linear(64, 32))
    tokens = torch.randint(32, (8, 33))
    return model, (tokens[:, :-1], tokens[:, 1:]), lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten())


def images(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)), (torch.randn(32, 3, 12, 12), torch.arange(32) % 10)


def vectors(activation):
    layers = nn.Linear(100, 128), activation, nn.Linear(128, 128), activation, nn.Linear(128, 10)
    return nn.Sequential(*layers), (torch.randn(64, 100), torch.arange(64) % 10)


NETWORKS = {
    "gpt": gpt,
    "tanh mlp": lambda: vectors(nn.Tanh()),
    "gelu cnn": lambda: images(nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.GELU(), nn.Conv2d(32, 32, 3, 2), nn.GELU()),
    "lstm": lambda: (
        nn.Sequential(nn.LSTM(16, 32, batch_first=True), Last(), nn.Linear(32, 10)),
        (torch.randn(32, 12, 16), torch.arange(32) % 10),
    ),
    "relu mlp": lambda: vectors(nn.ReLU()),
    "relu batchnorm cnn": lambda: images(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU()
    ),
    "max pooling cnn": lambda: images(nn.Conv2d(3, 32, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3), nn.Tanh()),
}


def network(name, steps, seed=0):
    """A network of the size that people train, in float32, after some steps of Adam."""
    torch.manual_seed(seed)
    model, batch, *criterion = NETWORKS[name]()
    criterion = criterion[0] if criterion else F.cross_entropy
    loss = lambda batch: criterion(model(batch[0]), batch[1])  # noqa: E731
    loss(batch)  # sizes the lazy layers
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return cases.Case(model, loss, [batch], [len(batch[0])])


@pytest.mark.parametrize("steps", [0, 15])
@pytest.mark.parametrize("name", ["gpt", "tanh mlp", "gelu cnn", "lstm"])
def test_the_measured_error_is_the_error(name, steps):
    made = network(name, steps)
    H = forward(made)
    exact = Hessian(made.loss, made.parameters, made.batches)
    u = torch.randn(H.size, generator=torch.Generator().manual_seed(0))
    Hu, Du = exact.matvec(u), H.matvec(u)
    assert H.measured.random == pytest.approx(relative(Du, Hu), rel=0.2)
    # rounding errors are random: as much of them as of any random vector lies along u
    noise = relative(Du, Hu) / float(abs(dot(u, Hu)) / u.norm() / Hu.norm()) / H.size**0.5
    assert H.measured.quadratic == pytest.approx(float(abs(dot(u, Du - Hu) / dot(u, Hu))), rel=0.2, abs=noise)
    w = torch.randn(H.size, generator=torch.Generator().manual_seed(1))
    assert relative(H.matvec(w), exact.matvec(w)) < 2 * H.measured.product
    assert H.product_error == H.measured.product < 2e-2
    assert exact.noise < H.noise == 2 * H.product_error
    assert (exact.exact, exact.product_error, H.exact) == (True, None, False)


@pytest.mark.parametrize("steps", [0, 15])
@pytest.mark.parametrize("name", ["relu mlp", "relu batchnorm cnn", "max pooling cnn"])
def test_kinks_are_refused(name, steps):
    made = network(name, steps)
    with pytest.raises(CurvatureError, match=r"finite differences can't be trusted here: the loss has kinks") as caught:
        forward(made)
    assert "Use Hessian" in str(caught.value)
    # the control: what was refused is wrong by factors, at the step that serves a GPT best
    H = forward(made, step=0.03, tolerance=float("inf"))
    u = torch.randn(H.size)
    assert relative(H.matvec(u), Hessian(made.loss, made.parameters, made.batches).matvec(u)) > 1.0
    assert H.measured is H.checked is None


def test_no_step_serves_memorised_data():
    made = network("tanh mlp", 300)
    assert made.loss(made.batches[0]).item() < 1e-3
    with pytest.raises(CurvatureError, match="double backward"):
        forward(made)


@pytest.mark.parametrize("counts", [(6,), (7, 1, 3)])
def test_one_gradient_a_product(counts):
    made, calls = cases.case(cases.mlp(), counts=counts), []

    def loss(batch):
        calls.append(len(batch[0]))
        return cases.classify(made.model, batch)

    H = FiniteDifferenceHessian(loss, made.parameters, made.batches, scheme="forward")
    exact = 1 if len(counts) == 1 else 3  # a graph that is kept, or built for each of two products as well
    assert len(calls) == len(counts) * (1 + exact + 6)
    calls.clear()
    V = torch.randn(4, H.size, dtype=H.dtype)
    H.matmat(V)
    assert calls == 4 * list(counts)


def test_the_exact_graph_is_dropped_at_once(monkeypatch):
    made, operators = cases.build("mlp tanh"), []
    monkeypatch.setattr(
        finite_difference, "Hessian", lambda *a, **k: operators.append(Hessian(*a, **k)) or operators[0]
    )
    forward(made)
    assert operators[0]._released
    assert operators[0]._graphs == []


class Waits(TorchDispatchMode):
    """What makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.calls, self.all = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        self.all.add(name)
        if name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_products_never_wait_for_the_device(scheme):
    made = cases.build("mlp tanh")
    H = FiniteDifferenceHessian(made.loss, made.parameters, made.batches, scheme=scheme)
    with Waits() as waits:
        H.matmat(torch.randn(2, H.size, dtype=H.dtype))
    assert waits.all
    assert waits.calls == []
    with Waits() as waits:  # the counter counts
        H.check()
    assert waits.calls


def test_attention_takes_the_kernel_of_training():
    made = network("gpt", 0)
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    with Waits() as training:
        made.loss(made.batches[0])
    if fused not in training.all:
        pytest.skip("no fused attention kernel on this CPU")
    H = forward(made)
    assert H.measured.method == "double backward"  # which has kernels of its own
    with Waits() as differences:
        H.matvec(torch.randn(H.size))
    assert {fused, fused + "_backward"} <= differences.all
    with Hessian(made.loss, made.parameters, made.batches) as exact, Waits() as waits:
        exact.matvec(torch.randn(H.size))
    assert fused + "_backward" not in waits.all


def test_compiled_code_stays_compiled():
    made, ran = network("tanh mlp", 0), []

    def backend(graph, inputs):
        def run(*values):
            ran.append(torch.is_grad_enabled())
            return graph.forward(*values)

        return run

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests' graphs
    compiled = torch.compile(made.loss, backend=backend)
    H = FiniteDifferenceHessian(compiled, made.parameters, made.batches, scheme="forward")
    assert H.measured.method == "double backward"
    assert len(ran) == 7
    v = torch.randn(H.size)
    exact = Hessian(made.loss, made.parameters, made.batches).matvec(v)
    assert relative(H.matvec(v), exact) < 1e-2
    assert len(ran) == 8
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- where double backward can't be had, or is another matter ---------------------------------------------------------


def test_what_has_no_second_derivative():
    """EmbeddingBag, against the same function written with an Embedding."""
    torch.manual_seed(0)
    table, head = nn.Parameter(torch.randn(6, 3, dtype=torch.float64)), nn.Linear(3, 3).double()
    batches = [(torch.randint(6, (n, 4)), torch.randint(3, (n,))) for n in (5, 2)]

    def bag(batch):
        return F.cross_entropy(head(F.embedding_bag(batch[0], table, mode="sum").tanh()), batch[1])

    def plain(batch):
        return F.cross_entropy(head(F.embedding(batch[0], table).sum(1).tanh()), batch[1])

    parameters = [table, *head.parameters()]
    H = FiniteDifferenceHessian(bag, parameters, batches, scheme="forward")
    assert H.measured.method == "central differences"
    assert H.checked.ok
    assert "no second derivative of `_embedding_bag" in H.doubts
    V = torch.randn(3, H.size, dtype=H.dtype)
    assert torch.allclose(H.matmat(V), Hessian(plain, parameters, batches).matmat(V), rtol=1e-5, atol=1e-6)


def test_double_backward_of_another_function():
    """Fused kernels may draw other dropout masks than the composed ones."""
    made = cases.build("mlp tanh")
    loss = lambda batch: made.loss(batch) * (1.0 if torch.backends.cuda.flash_sdp_enabled() else 1.5)  # noqa: E731
    H = FiniteDifferenceHessian(loss, made.parameters, made.batches, scheme="forward")
    assert H.measured.method == "central differences"
    assert "another function" in H.doubts
    V = torch.randn(3, H.size, dtype=H.dtype)
    assert relative(H.matmat(V), V @ cases.dense_hessian(made)) < 1e-5


class Detached(torch.autograd.Function):
    """tanh, with a backward pass that autograd takes for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.detach().tanh() ** 2)


def test_a_wrong_second_derivative_is_not_taken_for_kinks():
    made = cases.build("mlp tanh")

    def loss(batch):
        hidden = Detached.apply(made.model[0](batch[0]))
        return F.cross_entropy(made.model[2](hidden), batch[1])

    H = FiniteDifferenceHessian(loss, made.parameters, made.batches, scheme="forward")
    assert H.measured.method == "central differences"
    assert H.doubts.startswith("double backward disagrees: ")
    V = torch.randn(3, H.size, dtype=H.dtype)
    exact = V @ cases.dense_hessian(made)
    assert relative(H.matmat(V), exact) < 1e-5
    assert relative(Hessian(loss, made.parameters, made.batches).matmat(V), exact) > 0.01


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, RuntimeError, KeyboardInterrupt])
def test_parameters_come_back_as_the_same_tensors(kind):
    made = cases.build("frozen and unused")
    first, seen, failing = made.parameters[0], [], []

    def loss(batch):
        seen.append(first.data_ptr())
        if failing:
            raise kind("stop")
        return made.loss(batch)

    before = [(p.data_ptr(), p._version, p.grad, p.detach().clone()) for p in made.parameters]
    state = torch.get_rng_state()
    H = FiniteDifferenceHessian(loss, made.parameters, made.batches, scheme="forward")
    seen.clear()
    V = torch.randn(3, H.size, dtype=H.dtype, generator=torch.Generator().manual_seed(0))
    if kind is None:
        H.matmat(V)
        assert len(set(seen)) == 1  # one place for all displacements
    else:
        failing.append(True)
        with pytest.raises(kind, match="stop"):
            H.matmat(V)
    assert seen[0] != first.data_ptr()
    for p, (pointer, version, grad, value) in zip(made.parameters, before, strict=True):
        assert (p.data_ptr(), p._version) == (pointer, version)
        assert p.grad is grad
        assert torch.equal(p.detach(), value)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stale_gradient_is_never_subtracted():
    made = cases.build("mlp tanh")
    H = forward(made)
    with torch.no_grad():
        made.parameters[0].add_(1.0)
    with pytest.raises(CurvatureError, match="parameters have changed since the operator was made"):
        H.matvec(torch.ones(H.size, dtype=H.dtype))


def test_zero_scales_and_a_linear_loss():
    made = cases.build("mlp tanh")
    H = forward(made)
    zero = torch.zeros(2, H.size, dtype=H.dtype)
    assert torch.equal(H.matmat(zero), zero)
    v = torch.randn(H.size, dtype=H.dtype)
    for scale in (2.0**-40, 2.0**40):
        assert relative(H.matvec(scale * v) / scale, H.matvec(v)) < 1e-6
    x = torch.ones(3, requires_grad=True)
    linear = FiniteDifferenceHessian(lambda _: 2 * x.sum(), [x], [None], scheme="forward")
    assert torch.equal(linear.matvec(torch.ones(3)), torch.zeros(3))


def test_a_given_step_is_used_and_measured():
    made = cases.build("mlp tanh")
    H = forward(made, step=1e-6)
    assert H.step == H.measured.step == 1e-6
    longer = forward(made, step=1e-4)
    assert longer.measured.product == pytest.approx(100 * H.measured.product, rel=0.1)
    with pytest.raises(CurvatureError, match=r"forward differences differ from .* central differences"):
        forward(made, step=1.0)
    with pytest.raises(ValueError, match="scheme must be"):
        FiniteDifferenceHessian(made.loss, made.parameters, made.batches, scheme="backward")
