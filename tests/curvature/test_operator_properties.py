"""What must hold of every curvature operator: random small networks, losses, batches and dtypes, against dense float64.

The dense matrices come from torch.func (forward over reverse, and reverse Jacobians) with the loss written as a function of
one flat vector: no code in common with the operators. Errors are in units of the operator's own `noise` times the size of
the matrix; a correct operator stays near one, a wrong one is off by many orders of magnitude in float64 (see the controls).
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_rmt.curvature.gauss_newton import GaussNewton
from lightning_rmt.curvature.gradient_covariance import GradientCovariance
from lightning_rmt.curvature.hessian import Hessian

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func's own

FUZZ = settings(derandomize=True, deadline=None, max_examples=40)
WITHIN = 2.0  # units of noise

SMOOTH = {"tanh": torch.tanh, "softplus": F.softplus, "gelu": F.gelu, "sin": torch.sin}
ACTIVATIONS = {**SMOOTH, "relu": torch.relu}
# losses of each sample; the first two are convex in the outputs
LOSSES = {
    "cross-entropy": lambda out, y: F.cross_entropy(out, y % out.shape[1], reduction="none"),
    "squared": lambda out, y: (out - y[:, None]).square().sum(1),
    "waves": lambda out, y: (out + y[:, None]).sin().sum(1),
}
CONVEX = ("cross-entropy", "squared")
LAYOUTS = {
    "tuple": (lambda x, y: (x, y), lambda batch: batch),
    "list": (lambda x, y: [x, y], tuple),
    "dict": (lambda x, y: {"name": "text", "x": x, "y": y}, lambda batch: (batch["x"], batch["y"])),
    "nested": (lambda x, y: {"scale": torch.tensor(1.0), "pair": [x, (y,)]}, lambda b: (b["pair"][0], b["pair"][1][0])),
}


class Net(nn.Module):
    def __init__(self, widths, activation, tied, frozen, idle):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        if tied:
            self.layers[-1].weight = self.layers[0].weight
        if frozen is not None:
            self.layers[frozen].requires_grad_(False)
        if idle:
            self.idle = nn.Linear(2, 1)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        x = x.to(self.layers[0].weight.dtype)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


@dataclass(frozen=True)
class Problem:
    """A network, a loss and batches, by what they are made from: the repr repeats a failure."""

    seed: int
    widths: tuple[int, ...]
    counts: tuple[int, ...]
    activation: str = "tanh"
    loss: str = "cross-entropy"
    dtype: torch.dtype = torch.float64
    tied: bool = False
    frozen: int | None = None
    idle: bool = False
    layout: str = "tuple"
    keep_graphs: bool = True
    microbatch: int = 1

    @cached_property
    def net(self):
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Net(self.widths, self.activation, self.tied, self.frozen, self.idle).to(self.dtype)

    @cached_property
    def data(self):
        """Inputs and targets of each batch, in what the network's own dtype keeps of them."""
        draw = torch.Generator().manual_seed(self.seed)
        inputs = [torch.randn(n, self.widths[0], generator=draw).to(self.dtype) for n in self.counts]
        return [(x, torch.randint(4, (len(x),), generator=draw)) for x in inputs]

    @property
    def batches(self):
        return [LAYOUTS[self.layout][0](*pair) for pair in self.data]

    def outputs(self, batch):
        return self.net(LAYOUTS[self.layout][1](batch)[0])

    def mean_loss(self, out, batch):
        wide = out if out.dtype == torch.float64 else out.float()
        return LOSSES[self.loss](wide, LAYOUTS[self.layout][1](batch)[1]).mean()

    def __call__(self, batch):
        return self.mean_loss(self.outputs(batch), batch)

    def operator(self, kind, batches=None, **options):
        named = self.net.named_parameters(remove_duplicate=False)  # tied ones twice
        batches = self.batches if batches is None else batches
        if kind == "hessian":
            return Hessian(options.get("loss", self), named, batches, keep_graphs=self.keep_graphs)
        if kind == "gauss newton":
            return GaussNewton(self.outputs, self.mean_loss, named, batches)
        return GradientCovariance(self, named, batches, microbatch=self.microbatch)

    # --- the same, dense and in float64 ------------------------------------------------------------------------------

    @cached_property
    def _double(self):
        return copy.deepcopy(self.net).double()

    @property
    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self._double.parameters()])

    @property
    def trainable(self):
        return torch.cat([torch.full((p.numel(),), float(p.requires_grad)).double() for p in self.net.parameters()])

    def _outputs_at(self, flat, x):
        named = dict(self._double.named_parameters())
        parts = flat.split([p.numel() for p in named.values()])
        values = {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
        return torch.func.functional_call(self._double, values, (x,))

    @property
    def _all_data(self):
        return torch.cat([x for x, _ in self.data]).double(), torch.cat([y for _, y in self.data])

    def losses_at(self, flat):
        """The loss of every sample, all batches together."""
        x, y = self._all_data
        return LOSSES[self.loss](self._outputs_at(flat, x), y)

    def _masked(self, matrix):
        return matrix.detach() * self.trainable[:, None] * self.trainable

    def dense(self, kind):
        if kind == "hessian":
            return self._masked(torch.func.hessian(lambda flat: self.losses_at(flat).mean())(self.flat))
        if kind == "gauss newton":
            x, y = self._all_data
            out = self._outputs_at(self.flat, x).detach()
            J = torch.func.jacrev(lambda flat: self._outputs_at(flat, x))(self.flat).flatten(0, 1)
            H = torch.func.hessian(lambda o: LOSSES[self.loss](o.view_as(out), y).mean())(out.flatten())
            return self._masked(J.mT @ H @ J)
        return self._masked(self._covariance())

    def _covariance(self):
        """As the class documents it."""
        gradients = torch.func.jacrev(self.losses_at)(self.flat).detach()
        parts = [part for batch in gradients.split(self.counts) for part in batch.split(self.microbatch)]
        N, K = len(gradients), len(parts)
        centred = [(len(part), part.mean(0) - gradients.mean(0)) for part in parts]
        return (N - 1) / (N * (K - 1)) * sum(m * torch.outer(d, d) for m, d in centred)


@st.composite
def problems(draw, dtypes=(torch.float64, torch.float32), losses=tuple(LOSSES), activations=tuple(ACTIVATIONS)):
    layers = draw(st.integers(1, 3))
    tied = layers > 1 and draw(st.booleans())
    width = st.integers(1, 6)
    widths = (draw(width),) * (layers + 1) if tied else tuple(draw(width) for _ in range(layers + 1))
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    microbatch = draw(st.integers(1, 3))
    if sum(-(-n // microbatch) for n in counts) < 2:  # a covariance needs two gradients
        counts, microbatch = [*counts, 1], 1
    return Problem(
        seed=draw(st.integers(0, 2**31)),
        widths=widths,
        counts=tuple(counts),
        activation=draw(st.sampled_from(activations)),
        loss=draw(st.sampled_from(losses)),
        dtype=draw(st.sampled_from(dtypes)),
        tied=tied,
        frozen=draw(st.none() | st.integers(0, layers - 1)) if layers > 1 and not tied else None,
        idle=draw(st.booleans()),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        keep_graphs=draw(st.booleans()),
        microbatch=microbatch,
    )


KINDS = pytest.mark.parametrize("kind", ["hessian", "gauss newton", "gradient covariance"])


def some_vectors(operator, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, operator.size, dtype=torch.float64, generator=draw).to(operator.dtype)


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix.double()))


def relative(error, operator, matrix):
    """In units of the operator's noise and of the size of a matrix; a matrix of zeros has to be met exactly."""
    return error / (operator.noise * norm(matrix)) if error else 0.0


def entries(operator):
    return operator.matmat(torch.eye(operator.size, dtype=operator.dtype)).double()


def asymmetry(operator):
    matrix = entries(operator)
    return relative(norm(matrix - matrix.mT), operator, matrix)


def nonlinearity(operator):
    matrix, (u, v) = entries(operator), some_vectors(operator, 2)
    a, b = 0.75, -2.0
    together, apart = operator.matvec(a * u + b * v), a * operator.matvec(u) + b * operator.matvec(v)
    return relative(float((together - apart).norm() / (u.norm() + v.norm())), operator, matrix)


def negativity(operator):
    matrix = entries(operator)
    return relative(max(0.0, -float(torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[0])), operator, matrix)


def difference(operator, dense):
    return relative(norm(entries(operator) - dense), operator, dense)


@KINDS
@FUZZ
@given(problems())
def test_equals_the_dense_matrix(kind, problem):
    operator = problem.operator(kind)
    assert difference(operator, problem.dense(kind)) <= WITHIN
    assert operator.dtype == problem.dtype
    assert operator.size == problem.flat.numel()
    assert operator.samples == sum(problem.counts)
    mean = lambda flat: problem.losses_at(flat).mean()  # noqa: E731
    gradient = torch.func.grad(mean)(problem.flat).detach() * problem.trainable
    assert float((operator.gradient - gradient).norm()) <= operator.noise * max(float(gradient.norm()), 1.0)
    assert operator.loss_value == pytest.approx(
        float(mean(problem.flat).detach()), rel=operator.noise, abs=operator.noise
    )
    assert operator.unused == (("idle.weight", "idle.bias") if problem.idle else ())


@KINDS
@FUZZ
@given(problems(dtypes=(torch.bfloat16,), activations=tuple(SMOOTH)))
def test_half_precision_parameters_err_by_no_more_than_their_noise(kind, problem):
    operator = problem.operator(kind)
    assert operator.dtype == torch.float32
    assert operator.noise == 0.05
    assert difference(operator, problem.dense(kind)) <= WITHIN


@KINDS
@FUZZ
@given(problems(), st.integers(1, 4))
def test_linear_and_symmetric_and_a_stack_is_its_rows(kind, problem, rows):
    operator = problem.operator(kind)
    assert asymmetry(operator) <= WITHIN
    assert nonlinearity(operator) <= WITHIN
    V = some_vectors(operator, rows)
    before, products = operator.products, operator.matmat(V)
    single = torch.stack([operator.matvec(v) for v in V])
    assert operator.products == before + 2 * rows
    assert products.shape == V.shape
    assert products.dtype == V.dtype
    assert relative(norm(products - single) / norm(V), operator, entries(operator)) <= 1
    assert torch.equal(products, operator.matmat(V))  # a product repeats to the last bit


@FUZZ
@given(problems(losses=CONVEX))
def test_gauss_newton_of_a_convex_loss_and_covariances_have_no_negative_eigenvalue(problem):
    for kind in ("gauss newton", "gradient covariance"):
        assert negativity(problem.operator(kind)) <= WITHIN


@KINDS
@FUZZ
@given(problems(), st.randoms(use_true_random=False))
def test_neither_the_order_of_batches_nor_the_cuts_between_them_matter(kind, problem, shuffle):
    whole = entries(problem.operator(kind))
    order = list(problem.batches)
    shuffle.shuffle(order)
    shuffled = problem.operator(kind, order)
    assert difference(shuffled, whole) <= WITHIN
    if kind == "gradient covariance" and problem.microbatch > 1:
        return  # which samples share a micro-batch depends on the cuts
    joined = [torch.cat(parts) for parts in zip(*problem.data, strict=True)]
    for batches in ([joined], list(zip(*(part.split(1) for part in joined), strict=True))):
        cut = problem.operator(kind, [LAYOUTS[problem.layout][0](*pair) for pair in batches])
        assert difference(cut, whole) <= WITHIN
        assert cut.loss_value == pytest.approx(shuffled.loss_value, rel=cut.noise, abs=cut.noise)


@KINDS
@FUZZ
@given(problems(dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_nothing_outside_is_touched(kind, problem):
    parameters = list(problem.net.parameters())
    batches = problem.batches
    for place, p in enumerate(parameters):
        p.grad = torch.full_like(p, 0.5) if place % 2 else None

    def state():
        generators = torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()
        grads = [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in parameters]
        values = [(p.tolist(), p._version, p.data_ptr(), p.requires_grad, p.grad_fn) for p in parameters]
        return generators, grads, values, [x.tolist() for x, _ in problem.data], torch.is_grad_enabled()

    before = state()
    with torch.no_grad(), problem.operator(kind, batches) as operator:
        V = some_vectors(operator, 2)
        kept = V.clone()
        product = operator.matmat(V)
        assert torch.equal(V, kept)
        assert not product.requires_grad
        assert product.data_ptr() != V.data_ptr()
    assert state() == before


@FUZZ
@given(problems())
def test_a_random_loss_is_the_same_one_in_every_product(problem):
    """Whether its graphs are kept or built anew, from the state of all three generators."""

    def loss(batch):
        return problem(batch) * (1 + torch.rand(()) + np.random.rand() + random.random())

    def seeded(keep_graphs):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(problem.seed)
        return Hessian(loss, problem.net.named_parameters(), problem.batches, keep_graphs=keep_graphs)

    kept, anew = seeded(True), seeded(False)
    states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    dense = entries(kept)
    for _ in range(2):
        assert difference(anew, dense) <= WITHIN
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (repr(np.random.get_state()), random.getstate()) == states[1:]


# --- controls: what the properties above would show of a wrong operator ----------------------------------------------------

CONTROL = Problem(seed=1, widths=(3, 4, 3), counts=(4, 1, 2))


class Wrong:
    """An operator whose products are changed afterwards."""

    def __init__(self, operator, change):
        self.operator, self.change = operator, change

    def __getattr__(self, name):
        return getattr(self.operator, name)

    def matmat(self, V):
        return self.change(self.operator.matmat(V), V)

    def matvec(self, v):
        return self.matmat(v[None])[0]


@KINDS
def test_control_an_operator_that_is_not_symmetric_is_seen(kind):
    operator = CONTROL.operator(kind)
    tilted = Wrong(operator, lambda product, V: product + 1e-6 * V.roll(1, dims=1))
    assert asymmetry(operator) <= WITHIN
    assert asymmetry(tilted) > 1e5
    assert difference(tilted, CONTROL.dense(kind)) > 1e5


@KINDS
def test_control_an_operator_that_is_not_linear_is_seen(kind):
    operator = CONTROL.operator(kind)
    assert nonlinearity(operator) <= WITHIN
    assert nonlinearity(Wrong(operator, lambda product, V: product + 1e-6 * V.abs())) > 1e5


def test_control_batches_that_all_weigh_the_same_are_seen():
    unweighted = CONTROL.operator("hessian", loss=lambda batch: (CONTROL(batch), 1.0))
    assert difference(CONTROL.operator("hessian"), CONTROL.dense("hessian")) <= WITHIN
    assert difference(unweighted, CONTROL.dense("hessian")) > 1e10


def test_control_the_hessian_is_neither_the_gauss_newton_matrix_nor_without_negative_eigenvalues():
    assert difference(CONTROL.operator("hessian"), CONTROL.dense("gauss newton")) > 1e10
    assert negativity(replace(CONTROL, loss="waves").operator("hessian")) > 1e10
    assert negativity(replace(CONTROL, loss="waves").operator("gauss newton")) > 1e10


def test_control_a_covariance_around_zero_is_seen():
    operator = CONTROL.operator("gradient covariance")
    raw = Wrong(operator, lambda product, V: product + torch.outer(V @ operator.gradient, operator.gradient))
    assert difference(raw, CONTROL.dense("gradient covariance")) > 1e10
