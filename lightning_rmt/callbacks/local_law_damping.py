"""LocalLawDamping: the damping of the optimizer in use, from the noise of the curvature."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

from lightning_rmt.callbacks.arguments import choose, refuse_bad_name
from lightning_rmt.callbacks.spectrum_monitor import SpectrumMonitor
from lightning_rmt.krylov.collectives import LostRankError
from lightning_rmt.live.damping import StepBatches, find_optimizer, refuse_sharding
from lightning_rmt.live.fence import fence
from lightning_rmt.live.gradients import clips, gradient_norm
from lightning_rmt.live.loss import LossFn, refuse_unusable_loss
from lightning_rmt.live.namespaces import MisconfigurationException, callback_bases
from lightning_rmt.live.ranks import Ranks
from lightning_rmt.live.seeds import mixed_seed
from lightning_rmt.live.training import current_step
from lightning_rmt.optim.controller import DampingController
from lightning_rmt.optim.report import DampingReport
from lightning_rmt.optim.settings import Mode
from lightning_rmt.reading import Reading
from lightning_rmt.report.damping import DampingReports
from lightning_rmt.report.once import Once

STATE_VERSION = 2
REFUSED = "LocalLawDamping is refused on {}"
FAILED = "judging a step failed on {}"
#: A gradient whose norm differs by more than this share before and after clipping was clipped.
CLIPPED = 1e-4


class LocalLawDamping(*callback_bases()):  # type: ignore[misc]
    """Reads what damping the curvature asks for, and, if allowed, sets it: a `DampingController` on a Trainer.

    Curvature noise eats damping: of a damping delta, ``delta - s^2 tr (H + delta)^-1 / n`` is left. With a
    `SpectrumMonitor` in the same Trainer the local law says how much is needed (``rmt/local_law_damping``) and how much
    there is (``rmt/effective_damping``). Beside that, every so many steps, the curvature of the step *before*'s batches
    along the step judges the damping without any assumption on the noise: that is what sets it.

    **Logged** (``rmt`` is the ``name``): ``rmt/damping``, the one in use; ``rmt/effective_damping``, what noise leaves of it
    by the last spectrum; and in ``rmt/damping_control/``: ``heldout_ratio`` and ``own_ratio`` (1 is right, above 1 the
    damping is too small), ``suggested``, ``rejections`` so far, ``products`` so far, ``clipped``, and in words what couldn't
    be had.

    In mode ``"log"``, the default, and ``"suggest"``, training is bitwise what it is without the callback. In mode
    ``"control"`` it writes the damping. A scheduler of yours on the same number wins: one warning, and only logs from there
    on.

    Products and losses are those of the controller, ``every`` steps: 2 products, and in control 2 losses; batches of these
    steps are copied. The very first step has no step before it: there the search goes by the curvature of its own batches,
    from the largest damping down, since no spectrum is measured before that step either, and both ratios are of them.

    Measured are the first step and those in the middle between multiples of ``every``. A resumed run goes on bit for bit, if
    the module, its optimizer and its data do: but where the checkpoint was written right before a step that is measured,
    that measurement is left out, since batches aren't in checkpoints.

    Args:
        controller: with settings of its own, see there; None: ``DampingController(target=target, mode=mode)``.
        mode: ``"log"``, ``"suggest"`` (which warns as well) or ``"control"``.
        target: the key of ``param_groups`` that is the damping, ``"call"`` where the optimizer was given
            ``damping=controller``; None for the first of ``damping``, ``delta``, ``rho`` and ``mu`` that is there.
        optimizer: which one, in the order of ``configure_optimizers``; None: the first that has the target.
        loss_fn: ``(module, batch) -> loss``, where ``training_step`` isn't the loss (manual optimization); as for the
            monitor.
        seed: of the masks of dropout while losses are looked at.
        name: prefix of the tags; several callbacks need different ones.
        on_error: ``"warn"``: a failure is a warning and turns the callback off; ``"raise"``: it raises.

    Attributes:
        controller: the controller.
        report: of the last step that was looked at, None before one.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: (in ``setup`` or at the start) no optimizer has such a damping, a spectrum is needed and
            no monitor measures one, or gradients are sharded.

    Example::

        trainer = Trainer(callbacks=[SpectrumMonitor(), LocalLawDamping(mode="control")])
    """

    #: Tells monitors that somebody reads them, be there a logger or not.
    consumes_readings = True

    def __init__(
        self,
        controller: DampingController | None = None,
        *,
        mode: Mode | None = None,
        target: str | None = None,
        optimizer: int | None = None,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        seed: int = 0,
        name: str = "rmt",
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        if isinstance(controller, str):
            raise ValueError(f"the first argument is a DampingController; write LocalLawDamping(mode={controller!r})")
        if controller is not None and (mode is not None or target is not None):
            raise ValueError(
                "mode and target are the controller's own: pass them to DampingController, or no controller"
            )
        choose("on_error", on_error, ("warn", "raise"))
        refuse_bad_name(name)
        self.controller = DampingController(target, mode=mode or "log") if controller is None else controller
        self.optimizer = optimizer
        self.loss_fn: LossFn | None = loss_fn
        self.seed = seed
        self.name = name
        self.on_error = on_error
        self.report: DampingReport | None = None
        self._reports = DampingReports(name)
        self._batches = StepBatches()
        self._pending: DampingReport | None = None
        self._reading: Reading | None = None
        self._hooks: list[Any] = []
        self._depth = 0  # of steps in steps
        self._ranks = Ranks()
        self._norm: float | None = None
        self._clipped: bool | None = None
        self._looks = False
        self._failure: Exception | None = None
        self._once = Once()
        self._off = False

    @property
    def state_key(self) -> str:
        """Own key in the checkpoint for each of several callbacks."""
        return f"LocalLawDamping[{self.name}]"

    # --- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what can't work, before the first step."""
        if stage != "fit":
            return
        self._off = bool(trainer.barebones)
        refuse_unusable_loss(pl_module, self.loss_fn, "LocalLawDamping")
        if self.controller.settings.method == "local-law" and self._monitor(trainer) is None:
            raise MisconfigurationException(
                'LocalLawDamping: method="local-law" takes the damping from a spectrum, and no SpectrumMonitor(noise=True) '
                "of the Hessian or the Gauss-Newton matrix in the plain coordinates (preconditioned=False) is among the "
                'callbacks. Add one, or use method="heldout"'
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds the damping and takes its place around the optimizer's step."""
        if self._off:
            return
        self._ranks = Ranks.of(trainer)
        self._ranks.together(lambda: self._attach(trainer, pl_module), elsewhere=REFUSED)

    def _attach(self, trainer: Any, pl_module: Any) -> None:
        if self.controller.mode == "control":
            refuse_sharding(trainer, pl_module)
        else:
            try:
                refuse_sharding(trainer, pl_module)
            except MisconfigurationException as error:
                self._turn_off(trainer, str(error))
                return
        optimizer = find_optimizer(trainer, self.optimizer, self.controller.target)
        try:
            self.controller.attach(
                optimizer,
                group=self._ranks.group,
                surroundings=lambda: fence(trainer, pl_module, seed=self._seed(trainer)),
                # a measurement needs the batch before it, which no checkpoint has, and those are of round steps
                offset=self.controller.settings.every // 2,
            )
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"LocalLawDamping: {error}") from error
        # after the update itself, which a gradient scaler may skip
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._enter_step()),
            optimizer.register_step_post_hook(lambda *_: self._leave_step(trainer, pl_module, optimizer)),
        ]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Copies the batch where this step or the next one is looked at: the training step may change it."""
        self._depth = 0
        self._batches.begin()
        if not self._off and (self.controller.due or self.controller.due_next or self.controller.guards):
            try:
                self._batches.add(batch, batch_idx)
            except Exception as error:  # told to the other ranks when the step is judged
                self._failure = error

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Remembers where the step starts; closures have been called by now, and gradients aren't clipped yet."""
        if self._off or not self._hooks or self.controller.busy or optimizer is not self.controller.optimizer:
            return
        self._norm = gradient_norm(optimizer) if self.controller.due and clips(trainer, pl_module) else None
        self._looks = self.controller.looks
        self._batches.stepped()
        try:
            self.controller.before_step()
        except Exception as error:
            self._failure = error

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs what was seen of the step, and takes over a new reading."""
        report, self._pending = self._pending, None
        if report is not None:
            self.report = report
            step, clipped = current_step(trainer), self._clipped
            self._try("write", lambda: self._reports.log(trainer.loggers, report, step, clipped))
        monitor = None if self._off else self._monitor(trainer)
        reading = None if monitor is None else monitor.reading
        if reading is not None and reading is not self._reading:
            self._reading = reading
            self._try("use the spectrum", lambda: self._take_over(trainer, reading))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the optimizer, and drops what would keep the module and its Trainer alive."""
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same, since Lightning calls no teardown after an exception."""
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values only: checkpoints are read back with ``weights_only=True``."""
        return {"version": STATE_VERSION, "controller": self.controller.state_dict(), "said": self._reports.said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint left off; a state of another version is ignored."""
        if state_dict.get("version") == STATE_VERSION:
            self.controller.load_state_dict(state_dict["controller"])
            self._reports = DampingReports(self.name, state_dict["said"])

    # --- around the optimizer's step ----------------------------------------------------------------------------------

    def _enter_step(self) -> None:
        self._depth += 1

    def _leave_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """PyTorch calls the hooks around a parent class's step in a step as well: only the outermost one is judged."""
        self._depth -= 1
        if self._depth == 0:
            self._after_step(trainer, module, optimizer)

    def _after_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self._off or self.controller.busy:
            return
        if self._looks:
            self._judge_together(trainer, module, optimizer)
        else:
            self.controller.after_step()

    def _judge_together(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """On all ranks, or, if one has failed, never again on any."""
        try:
            self._ranks.together(self._raise_failure, elsewhere=FAILED)  # before what it judges with waits for others
            self._ranks.together(lambda: self._judge(module, optimizer), elsewhere=FAILED)
        except LostRankError:
            raise
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._turn_off(trainer, f"it could not judge a step: {type(error).__name__}: {error}")

    def _raise_failure(self) -> None:
        """What went wrong on this rank since the last step."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _judge(self, module: Any, optimizer: Any) -> None:
        self._clipped = self._was_clipped()
        own = self._batches.own(module, self.loss_fn)
        held_out = self._batches.held_out(module, self.loss_fn) or (own if self.controller.searches else None)
        # an optimizer that unscales its gradients itself would do so a second time
        again = None if getattr(optimizer, "_step_supports_amp_scaling", False) else optimizer.step
        self._pending = self.controller.after_step(own, held_out, retake=again, clipped=self._clipped)

    def _was_clipped(self) -> bool:
        norm, self._norm = self._norm, None
        if norm is None:  # nobody clips
            return False
        return abs(gradient_norm(self.controller.optimizer) - norm) > CLIPPED * norm

    def _take_over(self, trainer: Any, reading: Reading) -> None:
        if reading.noise is None or reading.curvature_noise is None:
            return
        try:
            self.controller.update(
                reading.spectrum,
                reading.noise.mean,
                spectrum_noise=reading.curvature_noise.mean,
                wigner_gap=reading.wigner_gap(),
            )
        except ValueError as error:
            self._reports.note(trainer.loggers, f"no damping from the local law: {error}", current_step(trainer))

    # --- small things -------------------------------------------------------------------------------------------------

    def _monitor(self, trainer: Any) -> SpectrumMonitor | None:
        """The monitor whose readings are used: one of the same name before the first of the others."""
        fit = [
            callback
            for callback in trainer.callbacks
            if isinstance(callback, SpectrumMonitor)
            and callback.noise
            and callback.curvature != "gradient_covariance"
            and not callback.preconditioned  # a damping is added to the curvature in the plain coordinates
        ]
        return next((monitor for monitor in fit if monitor.name == self.name), fit[0] if fit else None)

    def _seed(self, trainer: Any) -> int:
        return mixed_seed(self.seed, current_step(trainer), self._ranks.rank)

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._batches.forget()
        self._pending = self._reading = self._failure = None
        self.controller.detach()
        for name in ("log", "log_dict"):  # Lightning binds the module's own to every callback, anew for every run
            self.__dict__.pop(name, None)

    def _turn_off(self, trainer: Any, reason: str) -> None:
        self._off = True
        self._batches.forget()
        self.controller.detach()  # it may hold weights and state of earlier steps
        if trainer.is_global_zero:
            warnings.warn(f"LocalLawDamping {self.name!r} is off: {reason}", stacklevel=4)

    def _try(self, what: str, act: Callable[[], object]) -> None:
        """A failure here may be this rank's alone: the others go on judging steps, and so does it."""
        try:
            act()
        except Exception as error:
            if self.on_error == "raise":
                raise
            reason = f"it could not {what}: {type(error).__name__}: {error}"
            if self._once.is_new(reason):
                warnings.warn(f"LocalLawDamping {self.name!r}: {reason} (said once)", stacklevel=4)
