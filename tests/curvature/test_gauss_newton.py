"""The Gauss-Newton operator against the dense J' H_L J."""

from __future__ import annotations

import curvature_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from lightning_rmt.curvature.errors import SecondDerivativeError
from lightning_rmt.curvature.gauss_newton import GaussNewton
from lightning_rmt.curvature.hessian import Hessian


def cross_entropy(outputs, batch):
    return F.cross_entropy(outputs, batch[1])


def squared(outputs, batch):
    return F.mse_loss(outputs, F.one_hot(batch[1], outputs.shape[-1]).to(outputs))


def bent(outputs, batch):
    """Not convex in the outputs."""
    return outputs.sin().mul(outputs.roll(1, dims=1)).mean()


def dense(made, loss):
    """J' H_L J by torch.func: Jacobians by reverse mode, the loss's Hessian by reverse over reverse."""
    named = {name: p.detach() for name, p in made.model.named_parameters()}
    total = 0
    for n, batch in zip(made.counts, made.batches, strict=True):
        outputs = functional_call(made.model, named, (batch[0],)).detach()
        parts = jacrev(lambda values, b=batch: functional_call(made.model, values, (b[0],)))(named)
        J = torch.cat([parts[name].reshape(outputs.numel(), -1) for name in named], dim=1)
        H = jacrev(jacrev(lambda out, b=batch: loss(out, b)))(outputs).reshape(outputs.numel(), -1)
        total = total + n / sum(made.counts) * J.T @ H @ J
    return total


def operator(made, loss):
    return GaussNewton(lambda b: made.model(b[0]), loss, made.model.named_parameters(), made.batches)


@pytest.mark.parametrize("loss", [cross_entropy, squared, bent])
@pytest.mark.parametrize(
    "name", ["mlp tanh", "mlp relu", "cnn batchnorm eval", "cnn maxpool", "gru", "tied", "uneven batches"]
)
def test_equals_the_dense_matrix(name, loss):
    made = cases.build(name)
    made.model.eval()  # torch.func can't run batch normalisation in training mode
    G = operator(made, loss)
    expected = dense(made, loss)
    found = G.matmat(torch.eye(G.size, dtype=G.dtype))
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    V = torch.randn(3, G.size, dtype=G.dtype)
    assert torch.allclose(G.matmat(V), V @ expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(G.matvec(V[0]), V[0] @ expected, rtol=1e-10, atol=1e-12)
    made.loss = lambda batch: loss(made.model(batch[0]), batch)
    assert torch.allclose(G.gradient, cases.dense_gradient(made), rtol=1e-11, atol=1e-13)
    assert G.loss_value == pytest.approx(float(cases.mean_loss(made).detach()), rel=1e-12)
    assert G.samples == sum(made.counts)


def test_positive_semidefinite_for_a_convex_loss_only():
    made = cases.build("mlp relu")
    eye = torch.eye(cases.flat_parameters(made).numel(), dtype=torch.float64)
    convex = torch.linalg.eigvalsh(operator(made, cross_entropy).matmat(eye))
    assert convex[0] > -1e-14 * convex[-1]
    assert torch.linalg.eigvalsh(operator(made, bent).matmat(eye))[0] < -1e-3
    hessian = torch.linalg.eigvalsh(Hessian(made.loss, made.parameters, made.batches).matmat(eye))
    assert hessian[0] < -1e-3 * hessian[-1]  # what the Hessian itself is not


def test_equals_the_hessian_of_a_linear_model():
    made = cases.case(nn.Linear(4, 3), counts=(5, 2))
    eye = torch.eye(15, dtype=torch.float64)
    H = Hessian(made.loss, made.parameters, made.batches)
    assert torch.allclose(operator(made, cross_entropy).matmat(eye), H.matmat(eye), rtol=1e-11, atol=1e-13)


def test_cross_entropy_gives_the_fisher_information():
    """1/N sum_n sum_k p_nk g_nk g_nk', with the gradient g_nk of -log p_nk, by the definition."""
    made = cases.build("mlp tanh")
    logp = F.log_softmax(made.model(made.batches[0][0]), dim=1)
    fisher = torch.zeros(cases.flat_parameters(made).numel(), dtype=torch.float64)
    fisher = torch.outer(fisher, fisher)
    for row in logp:
        for entry in row:
            g = cases.flatten(made, torch.autograd.grad(entry, made.parameters, retain_graph=True))
            fisher += entry.exp().detach() * torch.outer(g, g) / logp.shape[0]
    found = operator(made, cross_entropy).matmat(torch.eye(fisher.shape[0], dtype=torch.float64))
    assert torch.allclose(found, fisher, rtol=1e-11, atol=1e-14)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.idle = nn.Linear(2, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.a(h), self.b(h).squeeze(1), self.b(h) * 2, x


@pytest.mark.parametrize("container", [tuple, list, lambda out: cases.namedtuple("Heads", "a b c d")(*out)])
def test_several_outputs_one_of_them_without_graph_and_one_that_the_loss_ignores(container):
    made = cases.case(TwoHeads())

    def loss(out, batch):
        logits, value, _, x = out
        return F.cross_entropy(logits, batch[1]) + (value * x[:, 0] - 1).pow(2).mean()

    G = GaussNewton(lambda b: container(made.model(b[0])), loss, made.model.named_parameters(), made.batches)
    assert G.unused == ("idle.weight", "idle.bias")
    inputs = made.batches[0][0]
    joined = cases.Case(made.model, None, made.batches, made.counts)
    joined.model = Joined(made.model)
    expected = dense(joined, lambda out, batch: loss((out[:, :3], out[:, 3], None, inputs), batch))
    found = G.matmat(torch.eye(G.size, dtype=G.dtype))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-13)


class Joined(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        logits, value, *_ = self.inner(x)
        return torch.cat([logits, value.unsqueeze(1)], dim=1)


def test_linear_loss_gives_zero():
    made = cases.build("mlp tanh")
    G = operator(made, lambda out, batch: out.mean())
    assert torch.equal(G.matmat(torch.ones(1, G.size, dtype=G.dtype)), torch.zeros(1, G.size, dtype=G.dtype))


def test_loss_may_return_a_weight():
    made = cases.build("uneven batches")
    weights = iter([1.0, 5.0, 2.0])
    G = operator(made, lambda out, batch: (cross_entropy(out, batch), next(weights)))
    made.counts = [1.0, 5.0, 2.0]
    expected = dense(made, cross_entropy)
    assert torch.allclose(G.matmat(torch.eye(G.size, dtype=G.dtype)), expected, rtol=1e-10, atol=1e-13)
    assert G.samples == 8.0


def test_gradients_and_versions_are_left_alone():
    made = cases.build("mlp tanh")
    versions = [p._version for p in made.parameters]
    operator(made, cross_entropy).matvec(torch.ones(cases.flat_parameters(made).numel(), dtype=torch.float64))
    assert [p._version for p in made.parameters] == versions
    assert all(p.grad is None for p in made.parameters)


def test_dropout_masks_stay():
    made = cases.build("mlp dropout")
    G = operator(made, cross_entropy)
    v = torch.randn(G.size, dtype=G.dtype)
    assert torch.equal(G.matvec(v), G.matvec(v))
    assert G.matvec(v) @ v > 0


def test_fused_attention_and_checkpoints():
    for name in ("sdpa", "checkpoint", "encoder gelu"):
        made = cases.build(name)
        G = operator(made, cross_entropy)
        u, v = torch.randn(2, G.size, dtype=G.dtype)
        assert float(u @ G.matvec(v)) == pytest.approx(float(v @ G.matvec(u)), rel=1e-9)


def test_errors():
    made = cases.build("mlp tanh")
    arguments = made.parameters, made.batches
    with pytest.raises(TypeError, match="got dict"):
        GaussNewton(lambda b: {"logits": made.model(b[0])}, cross_entropy, *arguments)
    with pytest.raises(ValueError, match="outputs of batch 0 have no graph"):
        GaussNewton(lambda b: made.model(b[0]).detach(), cross_entropy, *arguments)
    with pytest.raises(ValueError, match="no graph"):
        GaussNewton(lambda b: made.model(b[0]), lambda out, b: out.detach().sum(), *arguments)
    with pytest.raises(ValueError, match="does not depend on the outputs"):
        GaussNewton(lambda b: made.model(b[0]), lambda out, b: made.model(b[0]).sum(), *arguments)
    with pytest.raises(ValueError, match="batch 0 is nan"):
        GaussNewton(lambda b: made.model(b[0]), lambda out, b: out.sum() * float("nan"), *arguments)
    bag = nn.EmbeddingBag(6, 3)
    with pytest.raises(SecondDerivativeError, match="embedding_bag"):
        GaussNewton(bag, lambda out, b: out.pow(2).mean(), bag.parameters(), [torch.randint(6, (4, 2))]).matvec(
            torch.randn(18)
        )
