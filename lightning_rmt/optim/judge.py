"""What follows from one step: search, update, trust part and guard, in this order."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lightning_rmt.optim.adjustment import FALL, WIDE, RootSearch, change, smoothed, trust_change
from lightning_rmt.optim.errors import NoCalibrationError, NoMoveError
from lightning_rmt.optim.knob import Knob
from lightning_rmt.optim.look import Look, Ratio, same_direction
from lightning_rmt.optim.report import DampingReport
from lightning_rmt.optim.snapshot import halve_momentum
from lightning_rmt.optim.taken_step import LossFunction, TakenStep

#: Steps undone with the largest damping before that is said: one may be a bad batch.
UNDONE_AT_THE_TOP = 3


class Questions(NamedTuple):
    """What a caller gave for one step; see `DampingController.after_step`."""

    loss: LossFunction | None
    held_out: LossFunction | None
    before: Tensor | float | None
    retake: Callable[[], Any] | None
    clipped: Tensor | bool | None


def judge(knob: Knob, look: Look, asked: Questions) -> DampingReport:
    """Measures the step and, in control, changes the damping or undoes the step."""
    state, settings = knob.state, knob.settings
    ratio: Ratio | None = None
    reduction = refused = None
    proposal = knob.damping
    if knob.due() and knob.method != "local-law":
        try:
            _refuse_clipped(knob, look, asked)
            if knob.held_out_wanted and (asked.held_out is not None or knob.method == "heldout"):
                ratio, proposal = (_search if knob.searching else _follow)(knob, look, asked)
            if knob.method == "two-part" or state.noise_free:
                reduction, proposal = _trust(knob, look, asked, proposal)
        except NoCalibrationError as error:
            refused = str(error)
            proposal = knob.damping
    state.products += look.products
    undone = 0
    try:
        undone = _guard(knob, look, asked) if knob.guards else 0
    except NoCalibrationError as error:  # the loss can't be had: no reason to take a step back
        refused = refused or str(error)
    if undone:
        state.guarded_until = max(state.guarded_until, state.steps + 1 + settings.every)
        proposal = max(proposal, knob.damping * settings.guard_factor)
        _warn_at_the_top(knob)
    proposal = knob.within(proposal)
    if knob.controls and (undone or proposal != state.damping):
        knob.set(proposal)  # what was undone had the damping from before the step
    elif state.mode == "suggest":
        _suggest(knob, proposal, ratio)
    return DampingReport(
        step=state.steps,
        mode=state.mode,
        damping=knob.damping,
        suggested=proposal,
        ratio=None if ratio is None else ratio.held_out,
        own_ratio=None if ratio is None else ratio.own,
        reduction=reduction,
        rejected=undone > 0,
        undone=undone,
        rejections=state.rejections,
        products=state.products,
        refused=refused,
        reach=None if ratio is None else ratio.reach,
        local_law=state.local_law,
        effective=state.effective,
    )


def _refuse_clipped(knob: Knob, look: Look, asked: Questions) -> None:
    """Counts clipped steps.

    Raises:
        NoCalibrationError: most of the last ones were clipped.
    """
    if asked.clipped is None:
        return
    state = knob.state
    state.clipped = look.clipped_share(bool(asked.clipped), state.clipped)
    if state.clipped > 0.5 and knob.controls:
        raise NoCalibrationError(
            f"clipped: {state.clipped:.0%} of the last measured steps had clipped gradients, and that sets their length"
        )


def _ratio(knob: Knob, look: Look, asked: Questions) -> Ratio:
    """The trust part looks at the step's own batch in its own way, and a third product would be one too many."""
    return look.ratio(asked.held_out, asked.loss if knob.method == "heldout" else None)


def _follow(knob: Knob, look: Look, asked: Questions) -> tuple[Ratio, float]:
    """The ratio, and the damping that follows."""
    settings, damping, ratio = knob.settings, knob.damping, _ratio(knob, look, asked)
    # down from a start that nobody has measured it is as fast as up
    knob.state.settled = knob.state.settled or abs(ratio.value) >= settings.deadband[0]
    slowly = FALL if knob.controls and knob.state.settled else 1.0
    factor = change(ratio.value, settings.max_change, settings.deadband, slowly)
    return ratio, smoothed(damping, damping * factor, settings.ema)


def _search(knob: Knob, look: Look, asked: Questions) -> tuple[Ratio, float]:
    """The first calibration: takes the same step with other dampings until the ratio is one.

    Unless somebody has said where to begin, at the largest damping, so that what it was before has no say. Without a way to
    take a step again, one measurement of it.

    Raises:
        NoCalibrationError: the step can't be judged, or doesn't depend on the damping; it was taken with the old damping.
    """
    if asked.retake is None:
        knob.state.first_products -= 1
        ratio, last = _ratio(knob, look, asked), knob.state.damping
        knob.state.started = True
        factor = change(ratio.value, WIDE, knob.settings.deadband)
        if factor == 1 and ratio.value > 0:
            knob.state.first_products = 0
        return ratio, last * factor
    start = knob.state.damping
    try:
        return _search_by_retaking(knob, look, asked, asked.retake)
    except NoCalibrationError:
        if knob.state.damping != start:
            _retake(knob, look, asked.retake, start)
        raise


def _search_by_retaking(knob: Knob, look: Look, asked: Questions, retake: Callable[[], Any]) -> tuple[Ratio, float]:
    state, settings = knob.state, knob.settings
    from_above = settings.init == "local-law" and not state.started
    search = RootSearch(settings.deadband, from_above=from_above)
    tried: list[tuple[float, Ratio]] = []
    if from_above:
        look.check_gradients()  # a step that a gradient scaler has skipped isn't to be taken now
        _retake(knob, look, retake, knob.within(math.inf))
    while state.first_products > 0:
        state.first_products -= 1
        following: float | None
        try:
            tried.append((state.damping, _ratio(knob, look, asked)))
            following = search.following(state.damping, tried[-1][1].value)
        except NoMoveError:  # too large a damping for the weights' precision
            if tried or knob.within(state.damping / WIDE) == state.damping:
                raise
            following = state.damping / WIDE
        following = None if following is None else knob.within(following)
        if following is None or following == state.damping:
            break
        _retake(knob, look, retake, following)
    if from_above and len(tried) == 1 and tried[0][1].value > 1:  # too small at its largest, or without any say
        top = state.damping
        for damping in (top / WIDE, top / WIDE**2):
            _retake(knob, look, retake, knob.within(damping))
            tried.insert(0, (state.damping, _ratio(knob, look, asked)))
        _retake(knob, look, retake, top)
    state.first_products = 0
    (first, one), *others = tried
    if len(others) > 1 and all(same_direction(one, other) for _, other in others):
        raise NoCalibrationError(
            f"the step is the same with a damping of {first:.3g} and {others[-1][0]:.3g}: the optimizer doesn't use this "
            "number, or only every so many steps"
        )
    if all(-1 <= ratio.value <= 0 for _, ratio in tried):
        raise NoCalibrationError("the curvature along the step is negative with any damping: there is nothing to go by")
    state.settled = state.started = True
    return tried[-1][1], state.damping


def _retake(knob: Knob, look: Look, retake: Callable[[], Any], damping: float) -> None:
    look.taken.undo()
    look.forget_losses()
    knob.set(damping)
    retake()


def _trust(knob: Knob, look: Look, asked: Questions, proposal: float) -> tuple[float, float]:
    """The reduction, and the damping where the trust part has a say: at least that part."""
    state, settings = knob.state, knob.settings
    if asked.loss is None:
        raise NoCalibrationError("the trust part needs the loss of the step's own batch; pass it as loss")
    reduction = look.reduction(asked.loss, asked.before)
    factor = trust_change(reduction, settings.max_change)
    if state.noise_free or asked.held_out is None:
        return reduction, knob.damping * factor
    trust = knob.damping * factor if factor > 1 else state.trust * factor
    if knob.controls:
        state.trust = max(trust, settings.bounds[0])
    return reduction, max(proposal, trust)


def _guard(knob: Knob, look: Look, asked: Questions) -> int:
    """Undoes the step if its own batch's loss has risen too far, or isn't a number; how many steps were undone.

    All since the losses of the batches were lowest, if those have risen.
    """
    state, settings = knob.state, knob.settings
    if settings.guard is None or asked.loss is None:
        return 0
    before, after = look.losses(asked.loss, asked.before)
    lowest = _rise(knob, look, asked.loss, before)
    # of a positive loss, guard times what it was; a negative one may rise by as much
    if lowest is None and math.isfinite(before) and after <= before + (settings.guard - 1) * abs(before):
        return 0
    if lowest is None:
        first = state.steps
        look.taken.undo()
    else:
        first, start = lowest
        start.rewind()
        knob.forget_losses()
    halve_momentum(knob.optimizer)
    state.rejections += 1
    return state.steps - first + 1


def _rise(knob: Knob, look: Look, loss: LossFunction, before: float) -> tuple[int, TakenStep] | None:
    """Where to go back to, if the losses rise because of the weights; None: no rise, or the batches have become harder."""
    if knob.rise is None or not knob.watches:
        return None
    lowest = knob.rise.see(knob.state.steps, before, look.taken)
    if lowest is None or not math.isfinite(before):
        return lowest
    there = look.loss_at(lowest[1], loss)
    return lowest if knob.rise.is_above(before, there) else None


def _warn_at_the_top(knob: Knob) -> None:
    """Undoing steps with the largest damping that there is may go on for ever: a training that stands still."""
    state = knob.state
    if state.damping < knob.within(math.inf):
        return
    knob.topped += 1
    if knob.topped != UNDONE_AT_THE_TOP:
        return
    warnings.warn(
        f"step {state.steps}: for the {knob.topped}rd time undone although the damping is {state.damping:.3g}, the largest "
        "that its bounds allow. While steps are undone the training stands still: lower the learning rate or raise bounds=; "
        "or the optimizer doesn't use this number. This is said once",
        RuntimeWarning,
        stacklevel=2,
    )


def _suggest(knob: Knob, proposal: float, ratio: Ratio | None) -> None:
    if ratio is None or proposal == knob.damping or knob.state.suggested:
        return
    knob.state.suggested = True
    warnings.warn(
        f"step {knob.state.steps}: the curvature along the step is {ratio.value:.3g} times what the step assumes; a damping "
        f"of {proposal:.3g} in place of {knob.damping:.3g} would be nearer. This is said once, every measurement is in the "
        "report",
        RuntimeWarning,
        stacklevel=2,
    )
