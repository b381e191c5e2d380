"""The damping in its place: who may turn it, and who else did."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer

from lightning_rmt.optim.rise import LossRise
from lightning_rmt.optim.settings import DampingSettings, Method
from lightning_rmt.optim.state import ControllerState
from lightning_rmt.optim.taken_step import check_parameters
from lightning_rmt.optim.targets import CalledTarget, Target, TargetArgument, find_target


class Knob:
    """A target with the controller's state.

    Args:
        settings: the controller's.

    Attributes:
        state: what is remembered and saved.
        settings: the controller's.
        topped: how many steps were undone with the largest damping.
        offset: remainder, by ``every``, of the steps after the first that are measured.
        rise: watches the losses while every step is guarded, None where nobody wants it. Not saved: it holds weights.
    """

    def __init__(self, settings: DampingSettings) -> None:
        self.settings = settings
        self.state = self._fresh()
        self.offset = 0
        self.rise = None if settings.rewind is None or settings.guard is None else LossRise(settings.rewind)
        self._optimizer: Optimizer | None = None
        self._target: Target | None = None
        self._written: tuple[float, ...] | None = None
        self.topped = 0
        self._loaded = False
        self._left = False

    def _fresh(self) -> ControllerState:
        settings = self.settings
        state = ControllerState(settings.mode, trust=settings.bounds[0], guarded_until=settings.every)
        if isinstance(settings.init, (int, float)):
            state.damping = float(settings.init)
        if settings.method == "local-law" or not settings.search:
            state.first_products = 0
        return state

    def attach(self, optimizer: Optimizer, argument: TargetArgument, offset: int = 0) -> None:
        """See `DampingController.attach`."""
        self.offset = offset
        target = find_target(optimizer, argument)
        mode = self.state.mode if self._loaded else self.settings.mode
        check_parameters(optimizer, target, whole=mode == "control")
        if (self._optimizer is not None or self._left) and not self._loaded:
            self.state = self._fresh()
        self._left = False
        state = self.state
        if self._loaded and state.ratios is not None and len(state.ratios) == len(target.ratios):
            target.ratios = state.ratios
        state.ratios = target.ratios
        known = self._loaded or state.started or self.settings.init != "local-law"
        if not known and not isinstance(target, CalledTarget):
            state.damping = max(target.values())
        self._optimizer, self._target, self._loaded = optimizer, target, False
        if self.controls or isinstance(target, CalledTarget):
            self.set(state.damping)

    def detach(self) -> None:
        """See `DampingController.detach`."""
        self.forget_losses()
        if self._target is not None:
            self.state.damping = self.damping
        self._optimizer, self._target, self._written, self._left = None, None, None, True

    def forget_losses(self) -> None:
        """Nothing is known of the losses so far."""
        if self.rise is not None:
            self.rise.forget()

    def load(self, state: ControllerState) -> None:
        """See `DampingController.load_state_dict`."""
        self.state = state
        # what this controller was made for, not the one that the state was saved by
        state.mode = "log" if state.given_up and self.settings.mode == "control" else self.settings.mode
        self.forget_losses()
        self._loaded = self._target is None
        if self._target is None:
            return
        if state.ratios is not None and len(state.ratios) == len(self._target.ratios):
            self._target.ratios = state.ratios
        if self.controls:
            self.set(state.damping)

    @property
    def optimizer(self) -> Optimizer:
        """The one that is attached.

        Raises:
            RuntimeError: none is.
        """
        if self._optimizer is None:
            raise RuntimeError("no optimizer yet: call controller.attach(optimizer) before the first step")
        return self._optimizer

    @property
    def target(self) -> Target:
        """Where its damping is."""
        assert self._target is not None
        return self._target

    @property
    def controls(self) -> bool:
        """Whether the damping may be set."""
        return self.state.mode == "control"

    @property
    def method(self) -> Method:
        """The one that is in use: held-out curvature in place of a local law that isn't trusted."""
        method = self.settings.method
        return "heldout" if method == "local-law" and self.state.distrusted else method

    @property
    def held_out_wanted(self) -> bool:
        """Whether held-out curvature has a say."""
        return self.method != "local-law" and not self.state.noise_free

    @property
    def searching(self) -> bool:
        """Whether the first calibration isn't over."""
        return self.controls and self.held_out_wanted and self.state.first_products > 0

    def due(self, ahead: int = 0) -> bool:
        """Whether the current step, or one that many steps ahead, is to be measured."""
        step = self.state.steps + ahead
        return step == 0 or step % self.settings.every == self.offset or self.searching

    @property
    def guards(self) -> bool:
        """Whether the current step may be undone."""
        state, settings = self.state, self.settings
        wanted = settings.guard_steps == "every" or state.steps < state.guarded_until or self.due()
        return self.controls and settings.guard is not None and wanted

    @property
    def watches(self) -> bool:
        """Whether steps are seen without gaps, so that a rise of the loss can be."""
        return self.guards and self.state.steps < self.state.guarded_until

    @property
    def damping(self) -> float:
        """In use: the largest of the target's values."""
        return self.state.damping if self.controls or self._target is None else max(self._target.values())

    def within(self, damping: float) -> float:
        """Clipped to the bounds."""
        return self.settings.within(damping, self.state.largest)

    def set(self, damping: float) -> None:
        """Sets the damping, within the bounds, if there is an optimizer."""
        self.state.damping = self.within(damping)
        if self._target is not None:
            self._target.write(self.state.damping)
            self._written = self._target.values()

    def look_for_others(self) -> None:
        """Gives up control, with one warning, where somebody else has changed the damping since it was set."""
        if not self.controls or self._written is None:
            return
        found = self.target.values()
        if found == self._written:
            return
        self.state.mode, self.state.given_up = "log", True
        warnings.warn(
            f"the damping was set to {_shown(self._written)} and is {_shown(found)} now: a scheduler or a callback changes "
            "it too. The controller only logs from here on; let one of them set it",
            RuntimeWarning,
            stacklevel=2,
        )


def _shown(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
