"""The gradient covariance against dense per-sample gradients."""

from __future__ import annotations

import itertools

import curvature_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from lightning_rmt.curvature.gradient_covariance import GradientCovariance


def per_sample_gradients(made):
    """Shape (N, n), over all batches, by torch.func."""
    named = {name: p.detach() for name, p in made.model.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(functional_call(made.model, values, (x.unsqueeze(0),)), y.unsqueeze(0))

    rows = []
    for x, y in made.batches:
        found = vmap(grad(loss), in_dims=(None, 0, 0))(named, x, y)
        rows.append(torch.cat([found[name].reshape(len(x), -1) for name in named], dim=1))
    return torch.cat(rows)


def population_covariance(G):
    centred = G - G.mean(dim=0)
    return centred.T @ centred / len(G)


def matrix(operator):
    return operator.matmat(torch.eye(operator.size, dtype=operator.dtype))


@pytest.mark.parametrize("name", ["mlp tanh", "mlp relu", "cnn groupnorm gelu", "cnn batchnorm eval", "uneven batches"])
def test_one_sample_each_gives_the_population_covariance(name):
    made = cases.build(name)
    C = GradientCovariance(made.loss, made.parameters, made.batches)
    G = per_sample_gradients(made)
    expected = population_covariance(G)
    assert float((matrix(C) - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    v = torch.randn(C.size, dtype=C.dtype)
    assert torch.allclose(C.matvec(v), expected @ v, rtol=1e-9, atol=1e-13)
    assert torch.allclose(C.gradient, G.mean(dim=0), rtol=1e-11, atol=1e-14)
    assert (C.samples, C.parts) == (len(G), len(G))


@pytest.mark.parametrize(("count", "size"), [(4, 2), (5, 2), (5, 4), (5, 3)])
def test_micro_batches_average_to_the_same_matrix(count, size):
    """Exactly: over all ways to deal the samples, uneven last parts included."""
    made = cases.case(cases.mlp(width=2), counts=(count,))
    x, y = made.batches[0]
    expected = population_covariance(per_sample_gradients(made))
    orders = list(itertools.permutations(range(count)))
    total = torch.zeros_like(expected)
    for order in orders:
        batch = (x[list(order)], y[list(order)])
        total += matrix(GradientCovariance(made.loss, made.parameters, [batch], microbatch=size))
    assert torch.allclose(total / len(orders), expected, rtol=1e-10, atol=1e-14)


def test_weights_of_a_loss_count_as_samples():
    """Each sample given twice, with weight 2 in place of repetition."""
    made = cases.build("mlp tanh")
    x, y = made.batches[0]
    weighted = GradientCovariance(lambda b: (made.loss(b), 2.0), made.parameters, [(x, y)], microbatch=1)
    twice = (x.repeat_interleave(2, dim=0), y.repeat_interleave(2, dim=0))
    paired = GradientCovariance(made.loss, made.parameters, [twice], microbatch=2)
    assert weighted.samples == paired.samples == 2 * len(x)
    assert torch.allclose(matrix(weighted), matrix(paired), rtol=1e-10, atol=1e-14)


def test_weights_that_are_no_numbers_of_samples_are_refused():
    # Shares that sum to one would give a covariance of exactly zero, smaller ones the root of a negative number.
    made = cases.build("mlp tanh")
    (x, y), *_ = made.batches
    for weight in (1 / len(x), 0.01):
        operator = GradientCovariance(lambda b, w=weight: (made.loss(b), w), made.parameters, [(x, y)], microbatch=1)
        with pytest.raises(ValueError, match="number of samples"):
            matrix(operator)


def test_does_not_need_a_second_derivative():
    bag = torch.nn.EmbeddingBag(6, 3).double()
    x = torch.randint(6, (5, 2))
    C = GradientCovariance(lambda b: bag(b).tanh().pow(2).mean(), bag.parameters(), [x])
    rows = []
    for sample in x:
        (g,) = torch.autograd.grad(bag(sample[None]).tanh().pow(2).mean(), bag.parameters())
        rows.append(g.reshape(-1))
    assert torch.allclose(matrix(C), population_covariance(torch.stack(rows)), rtol=1e-10, atol=1e-16)


def test_sparse_gradients_work():
    embedding = torch.nn.Embedding(5, 2, sparse=True).double()
    x = torch.tensor([0, 3, 3, 1])
    C = GradientCovariance(lambda b: embedding(b).pow(2).mean(), embedding.parameters(), [x])
    rows = torch.zeros(4, 5, 2, dtype=torch.float64)
    for i, token in enumerate(x):
        rows[i, token] = embedding.weight.detach()[token]  # d mean(e^2) / de = 2 e / 2
    assert torch.allclose(matrix(C), population_covariance(rows.reshape(4, -1)), rtol=1e-10, atol=1e-16)


def test_products_repeat_and_gradients_are_left_alone():
    made = cases.build("mlp tanh")
    C = GradientCovariance(made.loss, made.parameters, made.batches)
    v = torch.randn(C.size, dtype=C.dtype)
    assert torch.equal(C.matvec(v), C.matvec(v))
    assert all(p.grad is None for p in made.parameters)
    C.release()
    with pytest.raises(RuntimeError, match="released"):
        C.matvec(v)


def test_errors():
    made = cases.build("mlp tanh")
    single = GradientCovariance(made.loss, made.parameters, made.batches, microbatch=6)
    with pytest.raises(ValueError, match="at least two micro-batches, got 1"):
        single.matvec(torch.ones(single.size, dtype=single.dtype))
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        GradientCovariance(made.loss, made.parameters, made.batches, microbatch=0)
    C = GradientCovariance(made.loss, made.parameters, made.batches)
    C.matvec(torch.ones(C.size, dtype=C.dtype))
    with pytest.raises(RuntimeError, match="pool before the first product"):
        C.pool(C.gradient, C.samples, C.parts)
