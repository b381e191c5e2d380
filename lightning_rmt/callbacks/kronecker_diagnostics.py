"""KroneckerDiagnostics: whether a run's gradients want an optimizer that rotates, as SOAP and Shampoo do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from lightning_rmt.callbacks.arguments import choose, refuse_bad_factor_values
from lightning_rmt.callbacks.spectrum_monitor import SpectrumMonitor
from lightning_rmt.live.gradients import refuse_sharded_gradients, refuse_sharded_parameters
from lightning_rmt.live.kronecker import FactorSettings, FactorWindow
from lightning_rmt.live.namespaces import callback_bases
from lightning_rmt.live.operators import refuse_unmatched_parameters
from lightning_rmt.live.training import current_step, takes_all_data
from lightning_rmt.local_law.kronecker import KroneckerReading
from lightning_rmt.local_law.learning_rate import suggestion
from lightning_rmt.report.kronecker import KroneckerReport

STATE_VERSION = 1
CLIPPED = "gradients are taken before they are clipped, which weighs the steps differently than the optimizer does"
SAME_DATA = (
    "every step sees the same data, so that gradients differ by the training's drift alone: effective samples, q and "
    "eigenvalue biases are meant for independent batches, and the gain is that of these data"
)


class KroneckerDiagnostics(*callback_bases()):  # type: ignore[misc]
    """Reads the gradients of every weight matrix for a few dozen steps now and then, and logs what they want.

    Works with any optimizer, changes nothing (training is bitwise the same), and runs no pass of its own: a measurement
    costs a few products of matrices of the gradient's size in each of its steps. It only logs.

    **Logged**, for every layer as ``rmt/kronecker/<layer>/...`` (``rmt`` is the ``name``):

    - ``rotation_gain``: by how much smaller the constant of the regret bound would be in the eigenbasis of the gradient's
      Kronecker factors (SOAP) than in the weights' own coordinates (Adam), on gradients that came after the basis was fixed.
      1 is nothing; 1.6 to 4.7 were measured on small tasks. With its standard error over groups of steps (of 8, hence itself
      known to about a quarter), and a bias of 3 % at most where gradients have very heavy tails.
    - ``effective_samples_left``, ``_right``, ``q_left``, ``q_right``: how many independent columns a factor's noise amounts
      to (a formula: right within 2.5 times on perceptrons and a language model, up to 24 times too small on a convolutional
      network), and its size over them.
    - ``eigenvalue_bias_left``, ``_right``: by what factor the smaller half of the factor's eigenvalues is too small next
      to the larger half by the weighted local law; ``..._held_out`` is what the gradients after it say, which is sampling
      and the training's drift. SOAP isn't affected.

    A verdict goes to TensorBoard as text, ``rmt/kronecker/verdict``, and to the console. What is skipped (vectors,
    embeddings, frozen or sparse parameters, layers without gradients) is said once, with the reason.

    With plain SGD and a `SpectrumMonitor` of the whole Hessian in the same Trainer, ``rmt/suggested_lr`` is
    2 / lambda_max at the beginning; the note next to it says how far that was right.

    Gradients are the ones that the optimizer is about to use: accumulated, averaged over the ranks, unscaled; before
    clipping. Steps with a NaN or an infinity in them are left out and counted.

    After a measurement `reading` holds it, and `history` all of them.

    Args:
        every_n_steps: a measurement begins at every multiple of this number of optimizer steps, the first one with the first
            step. None: that one only.
        factor_steps: gradients in the factors, moving averages as in SOAP.
        held_out_steps: gradients after those, which the bases are judged by; at least 8.
        beta: decay of the moving averages per step.
        parameters: name patterns (``"encoder.*"``) of the parameters to look at. None: all.
        max_dim: matrices with more rows or columns are skipped.
        max_memory_mib: what a measurement may keep on the device, smaller matrices first:
            8 (m^2 + n^2) + 64 m n bytes for one of shape (m, n), all of it freed at the end.
        name: prefix of the tags; several callbacks need different ones.
        on_error: ``"warn"``: a failure is a warning and turns the callback off; ``"raise"``: it raises.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: (in ``setup`` or at the start) gradients are sharded, or a pattern matches nothing.

    Example::

        trainer = Trainer(callbacks=[KroneckerDiagnostics()])
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = 1000,
        factor_steps: int = 40,
        held_out_steps: int = 24,
        beta: float = 0.95,
        parameters: list[str] | None = None,
        max_dim: int = 1024,
        max_memory_mib: float = 512.0,
        name: str = "rmt",
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        refuse_bad_factor_values(
            every_n_steps, factor_steps, held_out_steps, beta, parameters, max_dim, max_memory_mib, name
        )
        choose("on_error", on_error, ("warn", "raise"))
        self.every_n_steps = every_n_steps
        self.factor_steps = factor_steps
        self.held_out_steps = held_out_steps
        self.beta = beta
        self.parameters = parameters
        self.max_dim = max_dim
        self.max_memory_mib = max_memory_mib
        self.name = name
        self.on_error = on_error
        self.reading: KroneckerReading | None = None
        self.history: list[KroneckerReading] = []
        self._window: FactorWindow | None = None
        self._report = KroneckerReport()
        self._due: int | None = 0
        self._suggested = False
        self._off = False

    @property
    def state_key(self) -> str:
        """Own key in the checkpoint for each of several callbacks."""
        return f"KroneckerDiagnostics[{self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses strategies that shard gradients, before the first step."""
        if stage == "fit":
            refuse_sharded_gradients(trainer, "KroneckerDiagnostics")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses what depends on the parameters."""
        if current_step(trainer) == 0:
            self._start_afresh()
        self._off = bool(trainer.barebones)
        refuse_sharded_parameters(pl_module, "KroneckerDiagnostics")
        if self.parameters is not None:
            refuse_unmatched_parameters(pl_module, self.parameters, "KroneckerDiagnostics")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins a measurement when one is due."""
        step = current_step(trainer)
        if self._off or self._window is not None or self._due is None or step < self._due:
            return
        settings = FactorSettings(
            factor_steps=self.factor_steps,
            held_out_steps=self.held_out_steps,
            beta=self.beta,
            parameters=self.parameters,
            max_dim=self.max_dim,
            max_memory_mib=self.max_memory_mib,
        )
        self._try("begin", lambda: setattr(self, "_window", FactorWindow(pl_module, settings, step, self.name)))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Takes the gradients of this step, if a measurement goes on."""
        window = self._window
        if window is not None:
            self._try("take gradients", lambda: window.take(trainer, optimizer, current_step(trainer)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends a measurement that has all that it needs; suggests a learning rate once there is a first spectrum."""
        if self._window is not None and self._window.over:
            self._end(trainer)
        if not self._off and not self._suggested:
            self._suggest(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends a measurement that nothing more will come for, and says so if it was the only one."""
        window = self._window
        if window is not None and not trainer.fast_dev_run and (window.complete or not self.history):
            self._end(trainer)
        self._window = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Drops a measurement that was cut off, and what would keep the module and its Trainer alive."""
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same, since Lightning calls no teardown after an exception."""
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values; a measurement that is cut off begins again after the resume."""
        state = {"due": self._due, "suggested": self._suggested, "said": self._report.said}
        return {"version": STATE_VERSION, **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint left off; a state of another version is ignored."""
        self._start_afresh()
        if state_dict.get("version") == STATE_VERSION:
            self._due, self._suggested = state_dict["due"], bool(state_dict["suggested"])
            self._report = KroneckerReport(state_dict["said"])

    def _start_afresh(self) -> None:
        """Forgets an earlier training: the same callback may watch one after another."""
        self.reading, self.history, self._window = None, [], None
        self._report = KroneckerReport()
        self._due, self._suggested, self._off = 0, False, False

    def _let_go(self) -> None:
        self._window = None
        for name in ("log", "log_dict"):  # Lightning binds the module's own to every callback, anew for every run
            self.__dict__.pop(name, None)

    def _end(self, trainer: Any) -> None:
        window, self._window = self._window, None
        assert window is not None
        every = self.every_n_steps
        self._due = None if every is None else -(-current_step(trainer) // every) * every
        said = {CLIPPED: bool(trainer.gradient_clip_val), SAME_DATA: takes_all_data(trainer)}
        notes = tuple(note for note, holds in said.items() if holds)

        def finish() -> None:
            reading = window.finish(notes)
            self.reading = reading
            self.history.append(reading)
            self._report.log(trainer.loggers, reading)

        self._try("finish", finish)

    def _suggest(self, trainer: Any) -> None:
        optimizers = trainer.optimizers
        if not optimizers or not all(isinstance(optimizer, torch.optim.SGD) for optimizer in optimizers):
            self._suggested = True
            return
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, SpectrumMonitor)]
        plain = [monitor for monitor in monitors if monitor.curvature == "hessian" and not monitor.preconditioned]
        whole = [monitor for monitor in plain if monitor.parameters is None]
        reading = whole[0].reading if whole else None
        if whole and reading is None:
            return
        rate, sentence = suggestion(
            None if reading is None else reading.spectrum.lambda_max, 0 if reading is None else reading.step
        )
        self._suggested = True
        step = current_step(trainer)
        self._try(
            "suggest a learning rate",
            lambda: self._report.log_learning_rate(trainer.loggers, self.name, rate, sentence, step),
        )

    def _try(self, what: str, act: Callable[[], object]) -> None:
        """A failure here is this rank's alone, and never the training's."""
        try:
            act()
        except Exception as error:
            self._window = None
            if self.on_error == "raise":
                raise
            self._off = True
            warnings.warn(
                f"KroneckerDiagnostics {self.name!r} could not {what} and is off now, the training is unaffected: "
                f"{type(error).__name__}: {error}",
                stacklevel=3,
            )
