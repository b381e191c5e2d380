"""The Hessian operator against the dense Hessian, and what it must leave alone."""

from __future__ import annotations

import gc
import weakref

import curvature_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rmt.curvature.errors import CurvatureError, SecondDerivativeError
from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian
from lightning_rmt.curvature.gauss_newton import GaussNewton
from lightning_rmt.curvature.gradient_covariance import GradientCovariance
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.parameters import hooked_parameters


def assert_equals_dense(operator, dense, rtol=1e-10):
    """All rows at once, a stack of random vectors, and one vector."""
    eye = torch.eye(operator.size, dtype=operator.dtype)
    scale = max(float(dense.abs().max()), 1e-30)
    found = operator.matmat(eye)
    assert found.dtype == operator.dtype
    assert float((found - dense).abs().max()) <= rtol * scale
    V = torch.randn(3, operator.size, dtype=operator.dtype)
    bound = rtol * max(float(torch.linalg.matrix_norm(dense, 2)), 1e-30) * float(V.norm())
    assert float((operator.matmat(V) - V @ dense).norm()) <= bound
    assert float((operator.matvec(V[0]) - V[0] @ dense).norm()) <= bound
    assert operator.matmat(V[:0]).shape == (0, operator.size)


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_the_dense_hessian(name):
    made = cases.build(name)
    with Hessian(made.loss, made.parameters, made.batches) as H:
        cases.reseed()
        dense = cases.dense_hessian(made)
        assert_equals_dense(H, dense)
        cases.reseed()
        assert torch.allclose(H.gradient, cases.dense_gradient(made), rtol=1e-12, atol=1e-14)
        cases.reseed()
        assert H.loss_value == pytest.approx(float(cases.mean_loss(made).detach()), rel=1e-12)
        assert H.samples == sum(made.counts)
        assert H.size == sum(p.numel() for p in made.parameters)


# What vmap can't do: compare_routes sees that by trying
NOT_AT_ONCE = ("cnn groupnorm gelu", "checkpoint dropout")


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in NOT_AT_ONCE])
def test_products_at_once_equal_the_dense_hessian(name):
    made = cases.build(name)
    with Hessian(made.loss, made.parameters, made.batches) as H:
        H.at_once = True
        cases.reseed()
        assert_equals_dense(H, cases.dense_hessian(made))


@pytest.mark.parametrize("name", cases.CASES)
def test_the_route_is_measured_and_right_whatever_it_is(name):
    made = cases.build(name)
    with Hessian(made.loss, made.parameters, made.batches) as H:
        H.at_once = H.compare_routes(3)
        assert H.products == 0
        cases.reseed()
        assert_equals_dense(H, cases.dense_hessian(made))


@pytest.mark.parametrize(("seconds", "faster"), [((1.0, 0.5), True), ((0.5, 1.0), False)])
def test_the_faster_route_is_taken(seconds, faster, monkeypatch):
    made, clock = cases.build("mlp tanh"), iter(seconds)
    monkeypatch.setattr("lightning_rmt.curvature.hessian._timed", lambda take, device: (next(clock), take()))
    with Hessian(made.loss, made.parameters, made.batches) as H:
        assert H.compare_routes(2) is faster
        assert H.at_once is False  # the caller sets it


def test_a_route_that_gives_other_numbers_or_fails_is_not_taken(monkeypatch):
    made, found = cases.build("mlp tanh"), []

    def timed(take, device):
        found.append(take())
        return 1.0 / len(found), found[-1] * (1.0 if len(found) == 1 else 1.001)

    monkeypatch.setattr("lightning_rmt.curvature.hessian._timed", timed)
    with Hessian(made.loss, made.parameters, made.batches) as H:
        assert not H.compare_routes(2)
    made = cases.build("checkpoint dropout")
    with Hessian(made.loss, made.parameters, made.batches) as H:
        assert not H.compare_routes(2)


@pytest.mark.parametrize("name", ["mlp dropout", "uneven batches", "cnn batchnorm train", "checkpoint dropout"])
def test_graphs_built_anew_give_the_same_products(name):
    made = cases.build(name)
    kept = Hessian(made.loss, made.parameters, made.batches)
    cases.reseed()
    anew = Hessian(made.loss, made.parameters, made.batches, keep_graphs=False)
    state = torch.get_rng_state()
    V = torch.randn(2, kept.size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        assert torch.allclose(kept.matmat(V), anew.matmat(V), rtol=1e-12, atol=1e-14)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch.func's own
@pytest.mark.parametrize("name", ["mlp tanh", "cnn batchnorm eval", "cnn groupnorm gelu", "uneven batches"])
def test_equals_torch_func(name):
    """A second ground truth, by forward over reverse: it shares no code path with double backward."""
    made = cases.build(name)
    dense = torch.func.hessian(cases.functional_loss(made))(cases.flat_parameters(made))
    assert_equals_dense(Hessian(made.loss, made.parameters, made.batches), dense)


@pytest.mark.parametrize("name", ["mlp tanh", "cnn groupnorm gelu", "encoder gelu", "lstm"])
def test_float32_is_as_accurate_as_its_rounding(name):
    made = cases.build(name)
    dense = cases.dense_hessian(made)
    made.model.float()
    single = [tuple(t.float() if t.is_floating_point() else t for t in batch) for batch in made.batches]
    H = Hessian(made.loss, made.parameters, single)
    assert H.dtype == torch.float32
    found = H.matmat(torch.eye(H.size)).double()
    assert float((found - dense).norm() / dense.norm()) < 100 * torch.finfo(torch.float32).eps


def test_bf16_parameters_run_with_float32_vectors():
    made = cases.build("mlp tanh")
    made.model.bfloat16()
    made.batches = [(x.bfloat16(), y) for x, y in made.batches]
    made.loss = lambda batch: F.cross_entropy(made.model(batch[0]).float(), batch[1])
    H = Hessian(made.loss, made.parameters, made.batches)
    assert H.dtype == torch.float32
    found = H.matmat(torch.eye(H.size))
    assert found.dtype == torch.float32
    made.model.double()
    made.batches = [(x.double(), y) for x, y in made.batches]
    made.loss = lambda batch: F.cross_entropy(made.model(batch[0]), batch[1])
    dense = cases.dense_hessian(made)
    error = float((found.double() - dense).norm() / dense.norm())
    assert 1e-5 < error < 0.03  # 8 bits of mantissa, and float32 vectors do not lose more


def test_mixed_precisions_take_the_widest():
    a = torch.randn(3, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    H = Hessian(lambda _: (a.double() * b).sum(), [a, b], [None])
    expected = torch.zeros(6, 6, dtype=torch.float64)
    expected[:3, 3:] = expected[3:, :3] = torch.eye(3)
    assert torch.equal(H.matmat(torch.eye(6, dtype=torch.float64)), expected)


def test_frozen_and_unused_parameters_have_zero_rows_and_columns():
    made = cases.build("frozen and unused")
    H = Hessian(made.loss, made.model.named_parameters(), made.batches)
    dense = H.matmat(torch.eye(H.size, dtype=H.dtype))
    stop = 0
    for name, size in zip(H.block.names, H.block.sizes, strict=True):
        start, stop = stop, stop + size
        zero = name.startswith(("frozen", "idle"))
        assert bool((dense[start:stop] == 0).all()) == zero, name
        assert bool((dense[:, start:stop] == 0).all()) == zero, name
    assert H.unused == ("idle.weight", "idle.bias")


def test_a_parameter_that_only_some_batches_use():
    a, b = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    H = Hessian(
        lambda batch: (batch * (a if len(batch) == 1 else b) ** 2).mean(), [a, b], [torch.ones(1, 2), torch.ones(3, 2)]
    )
    assert H.unused == ()
    assert H.used == (True, True)
    assert torch.allclose(
        H.matmat(torch.eye(4, dtype=H.dtype)).diagonal(), torch.tensor([0.25, 0.25, 0.75, 0.75]).double()
    )


def test_parameters_that_changed_since_are_noticed():
    made = cases.build("mlp tanh")
    H = Hessian(made.loss, made.parameters, made.batches)
    with torch.no_grad():
        for p in made.parameters:
            p.mul_(0.9)
    with pytest.raises(CurvatureError, match="training step since the operator was made"):
        H.matvec(torch.ones(H.size, dtype=H.dtype))


def test_returned_weights_replace_sample_counts():
    made = cases.build("uneven batches")
    weights = iter([1.0, 4.0, torch.tensor(2.5)])
    H = Hessian(lambda batch: (made.loss(batch), next(weights)), made.parameters, made.batches)
    made.counts = [1.0, 4.0, 2.5]
    assert H.samples == 7.5
    assert_equals_dense(H, cases.dense_hessian(made))


def test_uneven_batches_equal_one_batch():
    made = cases.build("uneven batches")
    union = [tuple(torch.cat(parts) for parts in zip(*made.batches, strict=True))]
    H = Hessian(made.loss, made.parameters, made.batches)
    whole = Hessian(made.loss, made.parameters, union)
    v = torch.randn(H.size, dtype=torch.float64)
    assert torch.allclose(H.matvec(v), whole.matvec(v), rtol=1e-11, atol=1e-13)


def test_leaves_gradients_and_parameters_alone():
    made = cases.build("cnn batchnorm eval")
    fired = []
    for p in made.parameters:
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    before = [(p.grad, p.grad.clone(), p._version, p.grad._version, p.data_ptr()) for p in made.parameters]
    values = cases.flat_parameters(made)
    H = Hessian(made.loss, made.parameters, made.batches)
    H.matmat(torch.randn(2, H.size, dtype=H.dtype))
    for p, (grad, copy, version, grad_version, pointer) in zip(made.parameters, before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, copy)
        assert (p._version, grad._version, p.data_ptr()) == (version, grad_version, pointer)
    assert torch.equal(cases.flat_parameters(made), values)
    assert not fired
    # the control: what this test looks for is what backward() does
    made.loss(made.batches[0]).backward()
    assert fired


def test_works_in_no_grad_and_inference_mode():
    made = cases.build("checkpoint")
    dense = cases.dense_hessian(made)
    eye = torch.eye(dense.shape[0], dtype=dense.dtype)
    with torch.no_grad():
        assert torch.allclose(Hessian(made.loss, made.parameters, made.batches).matmat(eye), dense, atol=1e-12)
    with torch.inference_mode():
        found = Hessian(made.loss, made.parameters, made.batches).matmat(eye)
    assert not found.is_inference()
    assert torch.allclose(found, dense, atol=1e-12)


class SynchronisationCounter(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        name = func.overloadpacket.__name__
        copies = name in ("_to_copy", "copy_") and len({str(a.device) for a in args if isinstance(a, torch.Tensor)}) > 1
        self.count += name in self.WAITING or copies
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["hessian", "at once", "anew", "gauss newton", "covariance", "finite difference"])
def test_products_never_wait_for_the_device(kind):
    made = cases.build("mlp tanh")
    weight = torch.tensor(6.0)  # a weight on the device must not be read in a product
    loss = lambda batch: (made.loss(batch), weight)  # noqa: E731
    arguments = made.parameters, made.batches
    operator = {
        "hessian": lambda: Hessian(loss, *arguments),
        "at once": lambda: Hessian(loss, *arguments),
        "anew": lambda: Hessian(loss, *arguments, keep_graphs=False),
        "gauss newton": lambda: GaussNewton(
            lambda b: made.model(b[0]), lambda out, b: (F.cross_entropy(out, b[1]), weight), *arguments
        ),
        "covariance": lambda: GradientCovariance(loss, *arguments),
        "finite difference": lambda: FiniteDifferenceHessian(loss, *arguments),
    }[kind]()
    operator.at_once = kind == "at once"
    V = torch.randn(3, operator.size, dtype=operator.dtype)
    with SynchronisationCounter() as counter:
        operator.matmat(V)
    assert counter.operations > 0
    assert counter.count == 0
    with SynchronisationCounter() as control:
        bool(V.sum() > 0)
    assert control.count == 1


def test_graphs_built_anew_are_in_memory_one_at_a_time():
    made = cases.build("uneven batches")
    boxes, alive = [], []

    def loss(batch):
        alive.append(sum(ref() is not None for ref in boxes))

        def pack(tensor):
            box = Box(tensor.detach())
            boxes.append(weakref.ref(box))
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            return made.loss(batch)

    H = Hessian(loss, made.parameters, made.batches, keep_graphs=False)
    H.matvec(torch.ones(H.size, dtype=H.dtype))
    assert len(boxes) > 0
    assert alive == [0] * 6  # when a batch is evaluated, nothing of the ones before it is left


class Box:
    """A saved tensor that can be watched."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("kind", ["hessian", "anew", "gauss newton"])
def test_release_frees_the_graphs_without_the_garbage_collector(kind):
    made = cases.build("mlp tanh")
    watched = []

    def pack(tensor):
        box = Box(tensor.detach())  # with its graph, a saved output would hold itself
        watched.append(weakref.ref(box))
        return box

    def forward(batch):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            return torch.tanh(made.model(batch[0]))

    def loss(batch):
        return F.cross_entropy(forward(batch), batch[1])

    gc.collect()
    gc.disable()
    try:
        if kind == "gauss newton":
            H = GaussNewton(forward, lambda out, b: F.cross_entropy(out, b[1]), made.parameters, made.batches)
        else:
            H = Hessian(loss, made.parameters, made.batches, keep_graphs=kind == "hessian")
        H.matvec(torch.randn(H.size, dtype=H.dtype))
        assert watched
        assert any(ref() is not None for ref in watched) == (kind != "anew")
        H.release()
        assert all(ref() is None for ref in watched)
        with pytest.raises(RuntimeError, match="released"):
            H.matvec(torch.randn(H.size, dtype=H.dtype))
    finally:
        gc.enable()


def test_fused_attention_needs_the_math_backend():
    """The control for the sdpa cases: without the protection, double backward fails."""
    made = cases.build("sdpa")
    live = cases.trainable(made)
    first = torch.autograd.grad(made.loss(made.batches[0]), live, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad([g.sum() for g in first], live, allow_unused=True)


def test_compiled_modules_run_eagerly_and_the_stance_comes_back():
    made = cases.build("mlp tanh")
    dense = cases.dense_hessian(made)
    compiled = torch.compile(made.model, backend="aot_eager")
    loss = lambda batch: F.cross_entropy(compiled(batch[0]), batch[1])  # noqa: E731
    loss(made.batches[0])
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compilations > 0
    assert_equals_dense(Hessian(loss, made.parameters, made.batches), dense)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
    assert torch._dynamo.eval_frame._stance.stance == "default"
    # the control
    live = cases.trainable(made)
    first = torch.autograd.grad(loss(made.batches[0]).clone(), live, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|donated"):
        torch.autograd.grad([g.sum() for g in first], live, allow_unused=True)
    torch._dynamo.reset()


def test_embedding_bag_has_no_second_derivative_and_the_error_says_so():
    bag = nn.EmbeddingBag(6, 3)
    loss = lambda batch: bag(batch).tanh().pow(2).mean()  # noqa: E731
    with pytest.raises(SecondDerivativeError, match=r"_embedding_bag.*FiniteDifferenceHessian") as caught:
        Hessian(loss, bag.parameters(), [torch.randint(6, (4, 2))]).matvec(torch.randn(18))
    assert caught.value.operation == "_embedding_bag_backward"
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("outer", [lambda y: y.sum(), lambda y: y.pow(2).sum()])
def test_a_function_whose_backward_leaves_autograd_is_refused(outer):
    """Which isn't marked, and in the first case is the loss itself: nothing but a constant arrives there."""

    class Cube(torch.autograd.Function):
        kernel = staticmethod(lambda x, g: torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy()))

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return Cube.kernel(*ctx.saved_tensors, g)

    x = torch.randn(3, requires_grad=True)
    loss = lambda _: outer(Cube.apply(x))  # noqa: E731
    words = r"Cube .*leaves autograd"
    with pytest.raises(SecondDerivativeError, match=words):
        Hessian(loss, [x], [None])
    with pytest.raises(SecondDerivativeError, match=words):
        GaussNewton(loss, lambda out, _: out**2, [x], [None])
    with pytest.raises(SecondDerivativeError, match=words):
        GaussNewton(lambda _: 2 * x, lambda out, _: outer(Cube.apply(out)), [x], [None])
    smooth, v = Hessian(lambda _: outer(x**3), [x], [None]), torch.randn(3)
    assert torch.allclose(FiniteDifferenceHessian(loss, [x], [None]).matvec(v), smooth.matvec(v), rtol=1e-2, atol=1e-3)
    Cube.kernel = staticmethod(lambda x, g: 3 * x**2 * g)  # and one that stays in it is not
    assert torch.allclose(Hessian(loss, [x], [None]).matvec(v), smooth.matvec(v))


def test_a_linear_function_of_ones_own_is_not_refused():
    class Twice(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: 2 * x)
        backward = staticmethod(lambda ctx, g: 2 * g)

    x, v = torch.randn(3, requires_grad=True), torch.randn(3)
    assert Hessian(lambda _: Twice.apply(x).sum(), [x], [None]).matvec(v).equal(torch.zeros(3))
    assert torch.allclose(Hessian(lambda _: Twice.apply(x).pow(2).sum(), [x], [None]).matvec(v), 8 * v)
    assert (
        GaussNewton(lambda _: 2 * x, lambda out, _: Twice.apply(out).sum(), [x], [None]).matvec(v).equal(torch.zeros(3))
    )


@pytest.mark.parametrize("outer", [lambda y: y.sum(), lambda y: y.pow(2).sum()])
def test_a_function_that_is_once_differentiable_is_refused(outer):
    """Autograd itself says nothing and takes its second derivative for zero."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] ** 2 * g

    x = torch.randn(3, requires_grad=True)
    loss = lambda _: outer(Cube.apply(x))  # noqa: E731
    (first,) = torch.autograd.grad(loss(None), [x], create_graph=True)
    if first.requires_grad:
        assert torch.autograd.grad(first.sum(), [x], allow_unused=True) == (None,)
    with pytest.raises(SecondDerivativeError, match=r"Cube .*once_differentiable"):
        Hessian(loss, [x], [None])
    with pytest.raises(SecondDerivativeError, match=r"Cube .*once_differentiable"):
        GaussNewton(loss, lambda out, _: out**2, [x], [None])
    with pytest.raises(SecondDerivativeError, match=r"Cube .*once_differentiable"):
        GaussNewton(lambda _: 2 * x, lambda out, _: outer(Cube.apply(out)), [x], [None])
    H = FiniteDifferenceHessian(loss, [x], [None])  # the way out that the message names
    smooth = Hessian(lambda _: outer(x**3), [x], [None])
    v = torch.randn(3)
    assert torch.allclose(H.matvec(v), smooth.matvec(v), rtol=1e-2, atol=1e-3)


def test_a_sparse_gradient_is_refused_by_name():
    embedding = nn.Embedding(5, 3, sparse=True)
    loss = lambda batch: embedding(batch).tanh().pow(2).mean()  # noqa: E731
    with pytest.raises(CurvatureError, match=r"'weight' has a sparse gradient.*sparse = False"):
        Hessian(loss, embedding.named_parameters(), [torch.tensor([0, 3])])


def test_a_reentrant_checkpoint_hides_parameters_and_they_are_listed():
    made = cases.case(cases.Checkpointed(True))
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        H = Hessian(made.loss, made.model.named_parameters(), made.batches)
    assert H.unused == ("first.0.weight", "first.0.bias")


def test_a_reentrant_checkpoint_further_in_is_refused():
    made = cases.case(nn.Sequential(nn.Linear(4, 4), cases.Checkpointed(True)))
    with pytest.raises(CurvatureError, match="use_reentrant=False"):
        Hessian(made.loss, made.parameters, made.batches)


def test_hooks_on_parameters_scale_the_product_and_are_found():
    made = cases.build("mlp tanh")
    dense = cases.dense_hessian(made)
    assert hooked_parameters(made.model.named_parameters()) == ()
    handles = [p.register_hook(lambda g: 0.5 * g) for p in made.parameters]
    eye = torch.eye(dense.shape[0], dtype=dense.dtype)
    scaled = Hessian(made.loss, made.parameters, made.batches).matmat(eye)
    assert torch.allclose(scaled, 0.25 * dense, atol=1e-12)  # what the caller is warned about
    assert hooked_parameters(made.model.named_parameters()) == tuple(n for n, _ in made.model.named_parameters())
    for handle in handles:
        handle.remove()
    assert hooked_parameters(made.model.named_parameters()) == ()


def quadratic():
    x = torch.ones(2, requires_grad=True)
    return x, lambda _: (x**2).sum()


@pytest.mark.parametrize(
    ("loss", "batches", "kind", "message"),
    [
        (lambda x: lambda _: x**2, [None], ValueError, r"must be a scalar, got shape \(2,\) in batch 0.*mean"),
        (lambda x: lambda _: (x.detach() ** 2).sum(), [None], ValueError, "no graph.*detached"),
        (lambda x: lambda _: 1.0, [None], TypeError, "got float in batch 0"),
        (lambda x: lambda _: None, [None], TypeError, "got NoneType"),
        (lambda x: lambda b: (x * b).sum(), [1.0, float("nan")], ValueError, "batch 1 is nan"),
        (lambda x: lambda b: (x * b).sum(), [float("inf")], ValueError, "batch 0 is inf"),
        (lambda x: lambda b: ((x**2).sum(), b), [1.0, 0.0], ValueError, "batch 1 has weight 0.0"),
        (lambda x: lambda b: ((x**2).sum(), b), [float("nan")], ValueError, "weight nan"),
        (lambda x: lambda b: (x**2).sum(), [], ValueError, "no batches"),
        (lambda x: lambda b: (x**2).sum(), torch.ones(2), TypeError, r"write \[batch\]"),
        (lambda x: lambda b: (x**2).sum(), {"x": 1}, TypeError, r"write \[batch\]"),
        (
            lambda x: lambda b: torch.ones(1, requires_grad=True).sum(),
            [None],
            ValueError,
            "batch 0 depends on none of the parameters",
        ),
    ],
)
def test_errors_say_what_was_wrong(loss, batches, kind, message):
    x, _ = quadratic()
    with pytest.raises(kind, match=message):
        Hessian(loss(x), [x], batches)


def test_all_parameters_frozen():
    _, loss = quadratic()
    y = torch.ones(1)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        Hessian(loss, [y], [None])


def test_inference_tensors_are_refused_with_a_way_out():
    with torch.inference_mode():
        batch = torch.ones(2)
    x, _ = quadratic()
    with pytest.raises(CurvatureError, match="clone them"):
        Hessian(lambda b: (x * b).pow(2).sum(), [x], [batch])


def test_vectors_are_checked():
    x, loss = quadratic()
    H = Hessian(loss, [x], [None])
    with pytest.raises(ValueError, match=r"shape \(k, 2\), got \(2,\)"):
        H.matmat(torch.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        H.matvec(torch.ones(3))
    with pytest.raises(ValueError, match=r"must be torch.float32 on cpu, got torch.float64"):
        H.matmat(torch.ones(1, 2, dtype=torch.float64))
    assert H.products == 0
    H.matmat(torch.ones(3, 2))
    assert H.products == 3


def test_second_construction_agrees():
    made = cases.build("cnn batchnorm eval")
    v = torch.randn(sum(p.numel() for p in made.parameters), dtype=torch.float64)
    once = Hessian(made.loss, made.parameters, made.batches).matvec(v)
    again = Hessian(made.loss, made.parameters, made.batches).matvec(v)
    assert torch.equal(once, again)


def test_scales_with_the_loss():
    """Exact in powers of two, from tiny to huge: nothing in a product has a scale of its own."""
    made = cases.build("mlp tanh")
    v = torch.randn(sum(p.numel() for p in made.parameters), dtype=torch.float64)
    plain = Hessian(made.loss, made.parameters, made.batches).matvec(v)
    for exponent in (-40, 40):
        c = 2.0**exponent
        scaled = Hessian(lambda b, c=c: c * made.loss(b), made.parameters, made.batches).matvec(v)
        assert torch.equal(scaled, c * plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mlp tanh", "cnn batchnorm eval", "encoder gelu", "mlp dropout"])
def test_equals_the_dense_hessian_on_cuda(name):
    made = cases.build(name)
    made.model.cuda()
    made.batches = [tuple(t.cuda() for t in batch) for batch in made.batches]
    H = Hessian(made.loss, made.parameters, made.batches)
    found = H.matmat(torch.eye(H.size, dtype=H.dtype, device="cuda"))
    assert found.device.type == "cuda"
    cases.reseed()
    assert torch.allclose(found, cases.dense_hessian(made), atol=1e-10)


def test_noise_is_that_of_the_least_precise_trainable_parameter():
    x = torch.ones(2, requires_grad=True)
    frozen = torch.ones(2, dtype=torch.int8)
    loss = lambda _: (x**2).sum()  # noqa: E731
    single = Hessian(loss, [x], [None]).noise
    assert Hessian(loss, [x, frozen], [None]).noise == single
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    assert Hessian(loss, [x, half], [None]).noise > 1e4 * single
