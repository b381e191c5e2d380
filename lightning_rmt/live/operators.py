"""The curvature operator of a live module on its captured batches; called inside the fence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_rmt.curvature.errors import CurvatureError, SecondDerivativeError
from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian
from lightning_rmt.curvature.fitting import fitting_hessian
from lightning_rmt.curvature.gauss_newton import GaussNewton
from lightning_rmt.curvature.gradient_covariance import GradientCovariance
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import hooked_parameters, select_parameters
from lightning_rmt.curvature.scaled import Scaled
from lightning_rmt.curvature.second_derivatives import SecondDerivativeCheck, check_second_derivatives
from lightning_rmt.krylov.lanczos import rounding_noise, start_vector
from lightning_rmt.live.batches import CapturedBatch, copy_batch
from lightning_rmt.live.loss import curvature_loss
from lightning_rmt.live.memory import Memory
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.live.settings import Curvature, OutputsFn, ProbeSettings, Product


def refuse_missing_outputs(module: Any, curvature: Curvature, outputs_fn: OutputsFn | None) -> None:
    """Refuses a Gauss-Newton matrix of a module that doesn't say what its outputs are.

    Raises:
        MisconfigurationException: ``curvature="ggn"``, no ``outputs_fn`` and no ``curvature_outputs`` on the module.
    """
    if curvature != "ggn" or outputs_fn is not None or callable(getattr(module, "curvature_outputs", None)):
        return
    raise MisconfigurationException(
        'SpectrumMonitor(curvature="ggn") needs the model\'s outputs and a loss of them: define '
        f"curvature_outputs(self, batch) on {type(module).__name__}, or pass outputs_fn=, a function of (module, batch); "
        "either returns (outputs, loss), the loss a function of the outputs, for example "
        "`return self(x), lambda logits: cross_entropy(logits, y)`. "
        'curvature="hessian" needs neither.'
    )


def refuse_unmatched_parameters(module: Any, parameters: Sequence[str], who: str = "SpectrumMonitor") -> None:
    """Refuses name patterns with a slip in them before the first step, rather than at every probe.

    Patterns of frozen parameters pass: a callback may unfreeze them later.

    Raises:
        MisconfigurationException: a pattern matches no parameter of the module.
    """
    named = list(module.named_parameters())
    unmatched = [pattern for pattern in parameters if not any(fnmatchcase(name, pattern) for name, _ in named)]
    if unmatched:
        try:
            select_parameters(named, unmatched)
        except ValueError as error:  # its message names what comes close
            raise MisconfigurationException(f"{who}(parameters={list(parameters)}): {error}") from error


def build_operator(
    module: Any,
    captured: Sequence[CapturedBatch],
    settings: ProbeSettings,
    *,
    mixed_precision: bool,
    product: Product,
    memory: Memory,
    check: bool = False,
    agree: Callable[[int], int] = int,
) -> tuple[CurvatureOperator, tuple[str, ...], tuple[str, ...]]:
    """The operator on this rank's batches, what to warn of about it, and sentences to keep with what it shows.

    Args:
        module: the LightningModule, fenced and (if it was sharded) gathered.
        captured: this rank's curvature batches, at least one.
        settings: which matrix of which parameters, and how.
        mixed_precision: whether the fence computes in it.
        product: ``"auto"`` tries double backward once and falls back to central differences, which check themselves, where
            an operation has no second derivative; ``"finite_difference"`` takes forward differences, whose error is
            measured.
        memory: what the graphs of exact products of the Hessian may take; it learns what they took.
        check: whether to compare the second derivatives of functions of the user's with finite differences.
        agree: as for `fitting_hessian`.

    Raises:
        CurvatureError: the product can't be had; the message says what to do.
        ValueError: the loss or the parameters are unusable.
    """
    chosen = select_parameters(module.named_parameters(), settings.parameters)
    operator, fallback, notes = _operator(module, chosen, captured, settings, product, memory, check, agree)
    if mixed_precision:  # the parameters' dtype doesn't tell
        operator.noise = max(operator.noise, rounding_noise(torch.bfloat16))
    if settings.scale is not None:
        operator = Scaled(operator, settings.scale)
    return operator, (*fallback, *unused_warning(operator.unused)), notes


def _operator(
    module: Any,
    chosen: list[tuple[str, Tensor]],
    captured: Sequence[CapturedBatch],
    settings: ProbeSettings,
    product: Product,
    memory: Memory,
    check: bool,
    agree: Callable[[int], int],
) -> tuple[CurvatureOperator, tuple[str, ...], tuple[str, ...]]:
    if settings.curvature == "ggn":
        return _gauss_newton(module, chosen, captured, settings.outputs_fn), (), ()
    loss = curvature_loss(module, settings.loss_fn)
    if settings.curvature == "gradient_covariance":
        return GradientCovariance(loss, chosen, captured, settings.microbatch), (), ()
    limit = agree(
        max(memory.for_graphs(chosen[0][1].device), 1)
    )  # one limit, so that all ranks evaluate the loss as often
    if settings.product == "finite_difference":
        return _forward_differences(loss, chosen, captured, limit)
    try:
        hessian, fitted = fitting_hessian(
            loss, chosen, captured, limit, [*module.parameters(), *module.buffers()], agree
        )
        if product == "auto":
            memory.graphs = hessian.graph_bytes()
            hessian.matvec(start_vector(hessian, 0))  # some operations fail only here
    except SecondDerivativeError as error:
        if settings.preconditioned:  # how far differences err in the optimizer's metric isn't known
            raise CurvatureError(
                f"PyTorch has no second derivative of {error.operation}, and preconditioned=True takes exact products: give "
                'a loss without it (loss_fn=), or take curvature="ggn"'
            ) from error
        if product == "exact":
            raise
        why = f"PyTorch has no second derivative of {error.operation}"
        try:
            operator, note = _finite_differences(loss, chosen, captured, why)
        except CurvatureError as refused:  # whose advice is to use the Hessian, which is what failed
            raise CurvatureError(
                f"{why}, and finite differences of gradients don't agree with each other either (a loss with kinks, such as "
                f"ReLU's, or with noise). Give a loss without {error.operation.split(' (')[0]} (loss_fn=), or measure what "
                'first derivatives are enough for (curvature="gradient_covariance")'
            ) from refused
        return operator, (note,), ()
    notes = (f"memory is short: {fitted}",) if fitted else ()
    if not check:
        return hessian, (), notes
    doubts, unseen = _about_functions(check_second_derivatives(hessian, loss, captured, agree))
    return hessian, doubts, (*notes, *unseen)


def _about_functions(found: SecondDerivativeCheck | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to warn of and what to note about the second derivatives of the user's own functions."""
    if found is None or not (found.missing or found.doubt):
        return (), ()
    names = listed(found.functions) or "one that another rank's loss has"
    if not found.missing:
        return (), (
            f"whether autograd's second derivative of the loss's own functions ({names}) is right could not be seen"
            f"{': ' if not found.doubt.startswith('only') else ', '}{found.doubt}",
        )
    return (
        f"the Hessian seems to lack a term: a product differs by {found.mismatch:.0%} from differences of the gradient, "
        f"whose own error is {found.error:.0e}. The loss has functions of your own ({names}): one whose backward uses "
        "something that it saved detached, as fused losses do, has a second derivative that autograd gets wrong. Give a "
        'loss of PyTorch\'s own operations (loss_fn=), or take products by differences (product="finite_difference")',
    ), ()


def _forward_differences(
    loss: Any, chosen: list[tuple[str, Tensor]], captured: Sequence[CapturedBatch], memory_limit: int
) -> tuple[CurvatureOperator, tuple[str, ...], tuple[str, ...]]:
    try:
        operator = FiniteDifferenceHessian(loss, chosen, captured, scheme="forward", memory_limit=memory_limit)
    except CurvatureError as refused:
        raise CurvatureError(
            f"product='finite_difference' can't be had from this loss, product='auto' may: {refused}"
        ) from refused
    measured = operator.measured
    assert measured is not None  # unless a tolerance of infinity asks for none
    doubts = f" ({operator.doubts})" if operator.doubts else ""
    note = (
        f"products are forward differences of gradients, step {measured.step:.1e}. Against {measured.method}{doubts} they "
        f"err by {measured.product:.1e}, and by {measured.quadratic:.1e} in the quadratic form of a random vector: good for "
        "density and outliers, never for level statistics"
    )
    return operator, (), (note,)


def _finite_differences(
    loss: Any, chosen: list[tuple[str, Tensor]], captured: Sequence[CapturedBatch], why: str
) -> tuple[CurvatureOperator, str]:
    operator = FiniteDifferenceHessian(loss, chosen, captured)
    check = operator.checked
    assert check is not None  # made unless a tolerance of infinity asks for none
    return operator, (
        f"products are finite differences of gradients, because {why}: two steps differ by {check.disagreement:.1e}, "
        f"asymmetry {check.asymmetry:.1e}. Good for density and outliers, not for the last digits"
    )


def unused_warning(names: Sequence[str]) -> tuple[str, ...]:
    """What looks wrong about the module, and can't be seen in the numbers: a sentence, if there are such parameters."""
    if not names:
        return ()
    return (
        f"no gradient reaches {listed(names)}: unused, or behind a reentrant activation checkpoint; they are zeros in the "
        "spectrum",
    )


def hook_notes(module: Any) -> tuple[str, ...]:
    """A sentence about gradient hooks, to be asked for outside the fence, which takes them off.

    Left on, a hook would fire in both passes of a product: one that halves the gradient would quarter the curvature.
    """
    hooked = hooked_parameters(module.named_parameters())
    if not hooked:
        return ()
    return (
        f"gradient hooks on {listed(hooked)} are off during the probe: this is the curvature of the loss itself, not of "
        "what the hooks make of its gradient",
    )


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gauss_newton(
    module: Any, chosen: Any, captured: Sequence[CapturedBatch], outputs_fn: OutputsFn | None
) -> GaussNewton:
    losses: dict[int, Callable[[Any], Tensor]] = {}

    def outputs(batch: CapturedBatch) -> Any:
        copied = copy_batch(batch.batch)
        found = outputs_fn(module, copied) if outputs_fn is not None else module.curvature_outputs(copied)
        if not (isinstance(found, tuple) and len(found) == 2 and callable(found[1])):
            raise TypeError(
                "curvature_outputs must return (outputs, loss), the loss a function of the outputs, for example "
                "`return self(x), lambda logits: cross_entropy(logits, y)`"
            )
        losses[id(batch)] = found[1]
        return found[0]

    return GaussNewton(outputs, lambda produced, batch: losses.pop(id(batch))(produced), chosen, captured)
