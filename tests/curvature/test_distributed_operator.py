"""Two processes with uneven shards against one process with all the data; and what happens when one of them
fails."""

from __future__ import annotations

import datetime
import weakref

import curvature_cases as cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian
from lightning_rmt.curvature.gauss_newton import GaussNewton
from lightning_rmt.curvature.gradient_covariance import GradientCovariance
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "barrier", "reduce_scatter")
SHARDS = ((0, 1), (2,))  # of three batches with 7, 1 and 3 samples


def build(kind, batches, made):
    arguments = made.model.named_parameters(), batches
    return {
        "hessian": lambda: Hessian(made.loss, *arguments),
        "gauss newton": lambda: GaussNewton(
            lambda b: made.model(b[0]), lambda out, b: F.cross_entropy(out, b[1]), *arguments
        ),
        "covariance": lambda: GradientCovariance(made.loss, *arguments),
        "covariance by 2": lambda: GradientCovariance(made.loss, *arguments, microbatch=2),
        "finite difference": lambda: FiniteDifferenceHessian(made.loss, *arguments),
    }[kind]()


KINDS = ("hessian", "gauss newton", "covariance", "covariance by 2", "finite difference")


def vectors(operator):
    return torch.randn(4, operator.size, dtype=operator.dtype, generator=torch.Generator().manual_seed(5))


def compare(rank):
    """Products, statistics and number of collectives of every operator on this rank's shard."""
    results = {}
    calls = []
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, original=original, name=name, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    for kind in KINDS:
        made = cases.build("uneven batches")
        operator = RankSum(build(kind, [made.batches[i] for i in SHARDS[rank]], made))
        calls.clear()
        product = operator.matmat(vectors(operator))
        counted_calls = list(calls)
        results[kind] = {
            "product": product,
            "calls": counted_calls,
            "single": operator.matvec(vectors(operator)[0]),
            "gradient": operator.gradient,
            "loss": operator.loss_value,
            "samples": operator.samples,
            "products": operator.products,
            "product_error": operator.product_error,
            "error": operator.error,
        }
    made = cases.build("uneven batches")
    local = build("hessian", [made.batches[i] for i in SHARDS[rank]], made)
    equal = RankSum(local, weights="equal")
    results["equal"] = {"product": equal.matmat(vectors(equal)), "gradient": equal.gradient, "loss": equal.loss_value}
    return results


class Failing(CurvatureOperator):
    """The identity, until it is told to raise."""

    def __init__(self, error=None):
        super().__init__(ParameterBlock([torch.zeros(3, requires_grad=True)]))
        self.samples, self.loss_value, self.gradient, self.used = 1.0, 0.0, torch.zeros(3), (True,)
        self.raises, self.calls = error, 0
        self.noise = 0.25 if error is None else 0.5
        self.exact, self.product_error = False, self.noise / 2

    def _matmat(self, V):
        self.calls += 1
        if self.raises is not None and self.calls > 1:
            raise self.raises
        return V.clone()


def fail(rank):
    """Rank 1 raises in its second product; all the later ones go on in step."""
    inner = Failing(ValueError("out of luck") if rank == 1 else None)
    operator = RankSum(inner)
    seen = [operator.matmat(torch.ones(2, 3)) for _ in range(4)]
    after = torch.tensor([float(rank)])
    dist.all_reduce(after)  # the ranks are still paired: this is the training's own reduction
    return {
        "seen": seen,
        "error": repr(operator.error),
        "calls": inner.calls,
        "after": after,
        "noise": operator.noise,
        "product_error": operator.product_error,
    }


def keep(rank):
    """Whether a failed product's exception keeps the activations alive."""
    watched = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return Raises.apply(g)

    class Raises(Fails):
        @staticmethod
        def backward(ctx, g):
            activations = Watched()
            watched.append(weakref.ref(activations))
            raise RuntimeError("derivative for aten::never is not implemented")

    x = torch.ones(2, requires_grad=True)
    operator = RankSum(Hessian(lambda b: Fails.apply(x).pow(2).sum(), [x], [None]))
    operator.matvec(torch.ones(2))
    return {"error": repr(operator.error), "cause": repr(operator.error.__cause__), "alive": watched[0]() is not None}


class Watched:
    pass


def mismatch(rank):
    x = torch.ones(3 + rank, requires_grad=True)
    try:
        RankSum(Hessian(lambda b: (x**2).sum(), [x], [None]))
    except ValueError as error:
        return str(error)
    return "nothing"


def unused(rank):
    """Rank 0 uses the first layer only, rank 1 the second; the third is idle everywhere."""
    layers = [nn.Linear(1, 1) for _ in range(3)]
    named = [(f"{i}.weight", layer.weight) for i, layer in enumerate(layers)]
    loss = lambda batch: layers[rank](batch).pow(2).mean()  # noqa: E731
    local = Hessian(loss, named, [torch.ones(2, 1)])
    return {"local": local.unused, "shared": RankSum(local).unused}


def interrupt(rank):
    """KeyboardInterrupt passes; no other rank waits here, so only one has the operator."""
    if rank == 0:
        return "waited for nobody"
    alone = dist.new_group([1], use_local_synchronization=True)
    operator = RankSum(Failing(KeyboardInterrupt()), alone)
    operator.matmat(torch.ones(1, 3))
    try:
        operator.matmat(torch.ones(1, 3))
    except KeyboardInterrupt:
        return "passed"
    return "swallowed"


SCENARIOS = {
    "compare": compare,
    "fail": fail,
    "keep": keep,
    "mismatch": mismatch,
    "unused": unused,
    "interrupt": interrupt,
}


def work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    for name, scenario in SCENARIOS.items():
        outcome = scenario(rank)
        torch.save((name, outcome), f"{results}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each scenario returned on each of two ranks; the processes are forked once for all."""
    folder = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mp.start_processes(work, (str(folder / "store"), str(folder)), nprocs=2, start_method="fork")
    finally:
        torch.set_num_threads(threads)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False)[1] for rank in range(2)]
        for name in SCENARIOS
    }


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process_on_the_union(outcomes, kind):
    made = cases.build("uneven batches")
    whole = build(kind, made.batches, made)
    # finite differences are no more accurate than this, and choose their own steps
    rtol = 1e-6 if kind == "finite difference" else 1e-10
    for outcome in (ranks := [rank[kind] for rank in outcomes["compare"]]):
        expected = whole.matmat(vectors(whole))
        assert outcome["error"] is None
        assert float((outcome["product"] - expected).norm()) <= rtol * float(expected.norm())
        assert float((outcome["single"] - expected[0]).norm()) <= rtol * float(expected[0].norm())
        assert torch.allclose(outcome["gradient"], whole.gradient, rtol=1e-11, atol=1e-14)
        assert outcome["loss"] == pytest.approx(whole.loss_value, rel=1e-12)
        assert outcome["samples"] == whole.samples == 11
        assert outcome["products"] == 5
    assert torch.equal(ranks[0]["product"], ranks[1]["product"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_collective_per_product(outcomes, kind):
    assert [rank[kind]["calls"] for rank in outcomes["compare"]] == [["all_reduce"]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_only_finite_differences_have_a_measured_error(outcomes, kind):
    assert all((rank[kind]["product_error"] is None) is (kind != "finite difference") for rank in outcomes["compare"])


def test_plain_means_would_be_wrong(outcomes):
    """The control: shards of 8 and 3 samples, so equal weights are not the answer."""
    made = cases.build("uneven batches")
    parts = [build("hessian", [made.batches[i] for i in shard], made) for shard in SHARDS]
    V = vectors(parts[0])
    plain = sum(part.matmat(V) for part in parts) / 2
    right = outcomes["compare"][0]["hessian"]["product"]
    assert float((plain - right).norm() / right.norm()) > 0.01
    covariances = [build("covariance", [made.batches[i] for i in shard], made) for shard in SHARDS]
    within = sum(part.matmat(V) * part.samples for part in covariances) / 11
    right = outcomes["compare"][0]["covariance"]["product"]
    assert float((within - right).norm() / right.norm()) > 0.01


def test_equal_weights_are_what_ddp_optimises(outcomes):
    """The mean of the ranks' means, as of their gradients, whatever they hold."""
    made = cases.build("uneven batches")
    parts = [build("hessian", [made.batches[i] for i in shard], made) for shard in SHARDS]
    V = vectors(parts[0])
    for rank in outcomes["compare"]:
        seen = rank["equal"]
        assert torch.allclose(seen["product"], sum(part.matmat(V) for part in parts) / 2, rtol=1e-12)
        assert torch.allclose(seen["gradient"], sum(part.gradient for part in parts) / 2, rtol=1e-12)
        assert seen["loss"] == pytest.approx(sum(part.loss_value for part in parts) / 2)
        assert not torch.allclose(seen["product"], rank["hessian"]["product"], rtol=1e-3)


def test_a_rank_that_raises_gives_nan_everywhere_and_nobody_hangs(outcomes):
    good, bad = outcomes["fail"]
    for outcome in (good, bad):
        assert torch.equal(outcome["seen"][0], torch.ones(2, 3))
        assert all(bool(product.isnan().all()) for product in outcome["seen"][1:])
        assert outcome["after"].item() == 1.0
    assert good["error"] == "None"
    assert bad["error"] == "ValueError('out of luck')"
    assert (good["calls"], bad["calls"]) == (4, 2)  # what has failed is not tried again
    assert good["noise"] == bad["noise"] == 0.5  # each rank's own is 0.25 and 0.5
    assert good["product_error"] == bad["product_error"] == 0.25


def test_the_exception_that_is_kept_does_not_keep_activations(outcomes):
    for outcome in outcomes["keep"]:
        assert "SecondDerivativeError" in outcome["error"]
        assert "aten::never" in outcome["cause"]
        assert not outcome["alive"]


def test_keyboard_interrupt_passes(outcomes):
    assert outcomes["interrupt"][1] == "passed"


def test_different_parameters_are_refused_on_every_rank(outcomes):
    assert all("the ranks' operators differ" in message for message in outcomes["mismatch"])


def test_unused_means_unused_on_every_rank(outcomes):
    first, second = outcomes["unused"]
    assert first == {"local": ("1.weight", "2.weight"), "shared": ("2.weight",)}
    assert second == {"local": ("0.weight", "2.weight"), "shared": ("2.weight",)}


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="use the operator itself"):
        RankSum(Failing())
