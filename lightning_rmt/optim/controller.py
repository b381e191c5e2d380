"""The damping of any optimizer, from the curvature of an independent batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_rmt.local_law.arguments import spectrum_argument
from lightning_rmt.local_law.damping import effective_damping, self_consistent_damping
from lightning_rmt.local_law.errors import NoDampingError
from lightning_rmt.optim.adjustment import change, smoothed
from lightning_rmt.optim.judge import Questions, judge
from lightning_rmt.optim.knob import Knob
from lightning_rmt.optim.look import Look
from lightning_rmt.optim.outside_state import OutsideState
from lightning_rmt.optim.report import DampingReport
from lightning_rmt.optim.settings import DampingSettings, GuardSteps, Method, Mode
from lightning_rmt.optim.state import ControllerState
from lightning_rmt.optim.taken_step import LossFunction, Surroundings, TakenStep
from lightning_rmt.optim.targets import TargetArgument
from lightning_rmt.spectra.spectrum import Spectrum

#: Noise of a scale below this share of the largest eigenvalue is none: rounding. On a healthy run with small batches, an
#: autoencoder on digits, it was 1.5e-3 to 4e-3; of full batches the finite population leaves exactly 0.
NOISE_FREE = 1e-5
#: Cleaned curvatures that differ by more than this share don't let the local law be trusted.
GAP = 0.2


class DampingController:
    """Sets the damping of an optimizer so that its steps are neither too long nor too short on other data.

    Three parts. *Start*: a search at the first step, which is taken again with other dampings until it fits; it begins at
    the closed form of the local law, where `update` was given a spectrum, else at the largest damping, so that what the
    damping was has no say. *Run*: every so many steps, ``r = d'H d / (-g.d)`` along
    the step d (learning rate divided out) with the curvature H of an independent batch and the step's own gradient g; r is
    the inverse of the step length that H calls for, whatever the noise is like; the damping is multiplied by it, and by the
    length ``lr / (1 - momentum)`` that momentum takes each gradient to, if that is above 1. The same with the step's own
    batch's curvature counts where it is larger: near interpolation other batches show hardly any.
    *Guard*: a step after which its own batch's loss is ``guard`` times what it was is undone, bit for bit, and the damping
    raised; where the loss rises from one batch to the next, the training goes back to where it was lowest.

    In a training loop, after ``backward()`` and in place of ``optimizer.step()``::

        controller = DampingController(mode="control").attach(optimizer)
        ...
        controller.step(lambda: loss(batch), lambda: loss(other_batch), before=loss_of_this_batch)

    A framework that steps by itself calls `before_step` and `after_step` around it. A library that takes a callable takes
    the controller: ``damping=controller``.

    That curvature should be judged on an independent batch is SketchySGD's idea (Frangella et al. 2022, there for the
    learning rate); the trust part of ``"two-part"`` is Levenberg and Marquardt's, with the thresholds of kfac-jax.

    Args:
        target: a key of ``param_groups``; ``(get, set)`` functions; ``"call"`` where a library calls the controller; None
            for the first of ``damping``, ``delta``, ``rho`` and ``mu`` that is there. ``eps`` is only taken when asked for:
            measured, no training loss gains from it. Groups keep the ratios of their values.
        method: ``"heldout"``, as above; ``"local-law"``, only the closed form at each `update`, without any product;
            ``"two-part"``, at least what the held-out curvature asks for and at least a trust part, which follows from how
            far the batch's own loss is from quadratic: for full batches, whose curvature has no noise. A spectrum without
            noise switches to it.
        every: steps between measurements.
        init: ``"local-law"``, or the damping to start with.
        bounds: smallest and largest damping.
        rel_bounds: the same in units of the largest absolute eigenvalue, from the first `update` on.
        max_change: largest factor by which one measurement changes the damping.
        ema: share of the old damping that is kept, in logarithms.
        deadband: ratios r that are right as they are: following the noise of single batches makes the damping nervous.
        guard: see above; None: never. Costs a loss per guarded step, two where ``before`` isn't given.
        guard_factor: what a rejected step multiplies the damping by. Its momentum is halved.
        guard_steps: ``"probe"``, those that are measured, or ``"every"``, which copies weights and state in each step. The
            first of them, and those after a rejection, are seen in both: see ``docs/damping.md``.
        rewind: while every step is guarded, a mean loss of `optim.rise.WINDOW` successive batches that is so many times the
            lowest one takes the training back to there: a step that is too long lowers its own batch's loss, which is all
            that the guard sees, and raises that of others. The last of these batches must have a loss as much lower at the
            weights of then, one forward pass: batches that have only become harder are no reason. None: never. Keeps one
            more copy of weights and state while it watches. Averages of weights that others keep (EMA) aren't taken back.
        mode: ``"log"`` measures and changes nothing, ``"suggest"`` warns as well, ``"control"`` sets the damping.
        search: whether the first step is taken again with other dampings. False where a damping acts on later steps only, as
            in optimizers that move an inverse a little in each step (singd): one step then says nothing about it.

    Attributes:
        settings: the arguments, but for ``target``.
        target: that argument.
        report: what the last measured step said, None before one.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        target: TargetArgument = None,
        method: Method = "heldout",
        every: int = 25,
        init: Literal["local-law"] | float = "local-law",
        bounds: tuple[float, float] = (1e-8, 1e3),
        rel_bounds: tuple[float, float] | None = None,
        max_change: float = 2.0,
        ema: float = 0.0,
        deadband: tuple[float, float] = (0.7, 1.3),
        guard: float | None = 1.5,
        guard_factor: float = 4.0,
        guard_steps: GuardSteps = "probe",
        rewind: float | None = 1.5,
        mode: Mode = "log",
        search: bool = True,
    ) -> None:
        self.settings = DampingSettings(
            method, every, init, bounds, rel_bounds, max_change, ema, deadband,
            guard, guard_factor, guard_steps, rewind, mode, search,
        )  # fmt: skip
        self.report: DampingReport | None = None
        self.target = target
        self._knob = Knob(self.settings)
        self._group: dist.ProcessGroup | None = None
        self._buffers: list[Tensor] = []
        self._surroundings: Surroundings = nullcontext
        self._outside: OutsideState | None = None
        self._taken: TakenStep | None = None
        self._measured: tuple[Spectrum, float, float | None] | None = None
        self._busy = False

    # --- what is set up -------------------------------------------------------------------------------------------

    def attach(
        self,
        optimizer: Optimizer,
        *,
        group: dist.ProcessGroup | None = None,
        buffers: Iterable[Tensor] = (),
        surroundings: Surroundings = nullcontext,
        state: Iterable[Any] = (),
        offset: int = 0,
    ) -> DampingController:
        """Finds the optimizer's damping; to be called once, before the first step.

        Args:
            optimizer: any. What its ``state_dict`` holds is put back when a step is undone; what it hides is warned of.
            group: decide together with these ranks, which must all call the controller at the same steps.
            buffers: tensors that the loss functions change, such as ``model.buffers()`` with batch normalisation.
            surroundings: makes a context in which the loss functions are called and differentiated; the optimizer's steps
                are outside of it.
            state: what else a step or a loss function changes, such as a preconditioner beside the optimizer: objects with
                ``state_dict`` and ``load_state_dict``, or pairs of functions ``(get, set)``.
            offset: steps by which every measurement but the first comes later than a multiple of ``every``, less than that:
                where the held-out batch is that of the step before, and checkpoints are written at round numbers, say.

        Returns:
            The controller itself.

        Raises:
            TypeError: the target is no number, or ``target`` nothing that can be one; or something in ``state`` is no state.
            ValueError: the offset isn't below ``every``; the optimizer has no such damping, or nothing that it is for can be
                trained; or in control its parameters are sharded (FSDP).
        """
        if not 0 <= offset < self.settings.every:
            raise ValueError(f"offset must be at least 0 and below every={self.settings.every}, got {offset}")
        outside = OutsideState(optimizer, state)
        self._knob.attach(optimizer, self.target, offset)
        if self._knob.controls:
            outside.warn_of_hidden()
        self._group, self._buffers, self._outside, self._taken = group, list(buffers), outside, None
        self._surroundings = surroundings
        return self

    def detach(self) -> None:
        """Lets go of the optimizer; what the controller says stays. Attached again, it starts afresh unless it is loaded."""
        self._knob.detach()
        self._measured = None
        self._group, self._buffers, self._outside, self._taken = None, [], None, None
        self._surroundings = nullcontext

    def update(
        self,
        spectrum: Spectrum,
        noise: float,
        *,
        spectrum_noise: float | None = None,
        wigner_gap: float | None = None,
    ) -> None:
        """Takes over a spectrum: the damping to start with, or with the method ``"local-law"`` to go on with.

        Later ones are for the report. Without noise (its scale below 1e-5 of the largest eigenvalue) there
        is nothing to start from, and held-out curvature says nothing either: the method is ``"two-part"`` from then on,
        of which only the trust part is left.

        Args:
            spectrum: of the curvature.
            noise: scale s of the noise in the curvature of a *training* batch: half as much for four times the samples.
            spectrum_noise: in that of the spectrum, where it is another; see `local_law.self_consistent_damping`.
            wigner_gap: how far the noise is from the local law's (`Reading.wigner_gap`); above `GAP` the method
                ``"local-law"`` measures held-out curvature as well, and follows that.

        Raises:
            TypeError: the spectrum is none.
            ValueError: a noise scale is negative or not finite, or the spectrum has more noise than a batch.
        """
        knob, state, settings = self._knob, self._knob.state, self.settings
        if wigner_gap is not None and wigner_gap > GAP and not state.distrusted:
            state.distrusted = True
            if settings.method == "local-law":
                warnings.warn(
                    f"the curvature's noise isn't that of the local law: true curvatures by it are {wigner_gap:.0%} off in "
                    'the outliers\' directions. Held-out curvature sets the damping from here on (method="heldout")',
                    RuntimeWarning,
                    stacklevel=2,
                )
        spectrum = spectrum_argument(spectrum)
        state.largest = max(abs(spectrum.lambda_max.value), abs(spectrum.lambda_min.value))
        state.noise_free = 0 <= noise <= NOISE_FREE * state.largest  # also where the spectrum has too much of it
        state.local_law = None  # that of an earlier spectrum, where this one is refused
        state.local_law = found = self_consistent_damping(noise, spectrum, spectrum_noise=spectrum_noise)
        if knob.controls and not state.noise_free and found > 0:
            if knob.method == "local-law" and state.started:
                factor = change(found / state.damping, settings.max_change)
                knob.set(smoothed(state.damping, state.damping * factor, settings.ema))
            elif (not state.started and settings.method == "local-law") or (
                settings.init == "local-law" and state.steps == 0
            ):
                knob.set(found)
                state.started = True
        self._measured = spectrum, noise, spectrum_noise
        self._see_effective()

    def _see_effective(self) -> None:
        """What the last spectrum says of the damping in use."""
        if self._measured is None:
            return
        spectrum, noise, spectrum_noise = self._measured
        try:
            found = effective_damping(self.damping, noise, spectrum, spectrum_noise=spectrum_noise)
        except NoDampingError:  # below what the noise alone takes
            found = None
        self._knob.state.effective = found

    # --- what happens around a step -------------------------------------------------------------------------------

    def step(
        self,
        loss: LossFunction | None = None,
        held_out: LossFunction | None = None,
        *,
        before: Tensor | float | None = None,
        take: Callable[[], Any] | None = None,
        clipped: Tensor | bool | None = None,
    ) -> DampingReport | None:
        """Steps the optimizer, after ``backward()``; measures, guards and changes the damping when due.

        The functions are called when they are needed only: ``loss`` and ``held_out`` once in ``every`` steps each.

        Args:
            loss: returns this batch's mean loss as a scalar tensor, without ``backward()``; None: no guard, no trust part.
            held_out: the same of a batch that is independent of this one; None: no held-out measurement. The same function
                as ``loss``: there is none, and the curvature of this batch has to do.
            before: this batch's loss before the step, where it is at hand: saves a forward pass.
            take: takes the step; None: ``optimizer.step``. For a preconditioner that rewrites the gradients, for example
                ``lambda: (kfac.step(), optimizer.step())``. It may be called again with the same gradients, which
                ``optimizer.step`` isn't where they carry a graph (``create_graph=True``): it goes through that once only. A
                ``GradScaler`` refuses a second step: unscale the gradients, call `before_step`, let it step, and call
                `after_step` with ``retake=optimizer.step``.
            clipped: whether this step's gradients were clipped, as in ``clip_grad_norm_(parameters, 1.0) > 1.0``; given on
                all ranks or on none. Where most of the measured steps were, the clipping and not the damping says how long
                steps are, and the damping is left as it is.

        Returns:
            What was seen; None where this step wasn't looked at.

        Raises:
            RuntimeError: the controller isn't attached.
        """
        self.before_step()
        if self._taken is not None and self.due:
            self._taken.keep_gradients()
        retake = take
        if take is None:
            take = self._knob.optimizer.step
            retake = take if self._taken is None or self._taken.repeatable else None
        take()
        return self.after_step(loss, held_out, before=before, retake=retake, clipped=clipped)

    def before_step(self) -> None:
        """The first half of `step`: remembers where the step starts.

        Raises:
            RuntimeError: the controller isn't attached.
        """
        if self._busy:
            return
        knob = self._knob
        optimizer = knob.optimizer
        knob.look_for_others()
        if not knob.watches:
            knob.forget_losses()  # and the weights that go with them
        self._taken = None
        if self.looks:
            assert self._outside is not None
            self._taken = TakenStep(
                optimizer,
                knob.target,
                undo=self.guards or knob.searching,
                outside=self._outside,
                buffers=self._buffers,
                surroundings=self._surroundings,
            )

    def after_step(
        self,
        loss: LossFunction | None = None,
        held_out: LossFunction | None = None,
        *,
        before: Tensor | float | None = None,
        retake: Callable[[], Any] | None = None,
        clipped: Tensor | bool | None = None,
    ) -> DampingReport | None:
        """The second half of `step`, with the gradients still there.

        Args:
            loss: see `step`, like ``held_out`` and ``before``.
            held_out: see there.
            before: see there.
            clipped: see there.
            retake: takes the same step again, with the same gradients; calls of `before_step` and `after_step` in it are
                passed over. None: the first calibration is spread over the first steps, one product each.
        """
        if self._busy:
            return None
        taken, self._taken = self._taken, None
        report = None
        if taken is not None:
            if self._knob.controls and self._outside is not None:
                self._outside.warn_of_hidden()  # many make it in their first step
            self._busy = True
            try:
                questions = Questions(loss, held_out, before, retake, clipped)
                report = judge(self._knob, Look(taken, self._group), questions)
                self._see_effective()
                report = self.report = replace(report, effective=self._knob.state.effective)
            finally:
                self._busy = False
        self._knob.state.steps += 1
        return report

    # --- what it says ---------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the step that comes, or was just taken, is measured: whether it needs a held-out batch."""
        return self._knob.due()

    @property
    def due_next(self) -> bool:
        """The same of the step after that."""
        return self._knob.due(1)

    @property
    def guards(self) -> bool:
        """Whether the step that comes may be undone: whether it needs its own batch's loss."""
        return self._knob.guards

    @property
    def looks(self) -> bool:
        """Whether the step that comes is measured or guarded: the same on all ranks."""
        return self.guards or (self.due and self._knob.method != "local-law")

    @property
    def searches(self) -> bool:
        """Whether the first calibration isn't over: whether ``loss`` as ``held_out`` too is better than nothing."""
        return self._knob.searching

    @property
    def busy(self) -> bool:
        """Whether steps that are taken now are the controller's own."""
        return self._busy

    @property
    def optimizer(self) -> Optimizer:
        """The one that it is attached to.

        Raises:
            RuntimeError: there is none.
        """
        return self._knob.optimizer

    @property
    def mode(self) -> Mode:
        """The current one: ``"log"`` for good once somebody else has changed the damping."""
        return self._knob.state.mode

    @property
    def damping(self) -> float:
        """The damping in use: the largest, where groups have different ones."""
        return self._knob.damping

    def __call__(self, step: int | None = None) -> float:
        """The damping, for libraries that call for it; they may pass their step, which isn't used."""
        return self.damping

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next: plain numbers."""
        return self._knob.state.to_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, before or after `attach`; the optimizer's own state is loaded apart.

        The mode is this controller's own, unless the saved one had given up control to somebody else.

        Raises:
            ValueError: it is no such state.
        """
        self._knob.load(ControllerState.from_dict(saved))
