"""SpectrumMonitor: watches the spectrum of the loss's curvature while a LightningModule trains."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_rmt.callbacks.arguments import (
    at_least_one,
    choose,
    refuse_bad_blocks,
    refuse_bad_levels,
    refuse_bad_metric,
    refuse_bad_values,
)
from lightning_rmt.callbacks.failures import Failures
from lightning_rmt.krylov.collectives import LostRankError
from lightning_rmt.live.announcement import too_short
from lightning_rmt.live.batch_law import Turns, refuse_no_batch_law
from lightning_rmt.live.batches import BatchCollector, CapturedBatch
from lightning_rmt.live.level_blocks import refuse_unusable_blocks, refuse_unusable_levels
from lightning_rmt.live.loss import refuse_unusable_loss
from lightning_rmt.live.measurement import measure_live
from lightning_rmt.live.memory import Memory
from lightning_rmt.live.namespaces import MisconfigurationException, callback_bases
from lightning_rmt.live.operators import refuse_missing_outputs, refuse_unmatched_parameters
from lightning_rmt.live.optimizer_metric import NotSteppedError, refuse_no_metric
from lightning_rmt.live.ranks import Ranks, refuse_differences
from lightning_rmt.live.reading import reading_of
from lightning_rmt.live.schedule import Decision, Schedule, Speed
from lightning_rmt.live.settings import Learned, LightEnds, ProbeSettings
from lightning_rmt.live.strategies import refuse_untested_sharding, refuse_untested_strategy, under_join
from lightning_rmt.live.training import (
    current_step,
    log_directory,
    on_last_batch_of_fast_dev_run,
    seconds_left,
    total_steps,
)
from lightning_rmt.reading import Reading
from lightning_rmt.report.files import save_reading
from lightning_rmt.report.history import HistoryEntry
from lightning_rmt.report.loggers import LoggerReport
from lightning_rmt.report.scalars import TOP

STATE_VERSION = 2
#: A first probe may be slow for reasons that don't come back (code that is read from a disk). The second one is taken to
#: last no longer than so many times its products: too little is corrected then, too much would put it off for good.
FIRST_TO_NEXT = 2.0
REFUSED = "the SpectrumMonitor is refused on {}"


class SpectrumMonitor(*callback_bases()):  # type: ignore[misc]
    """Measures the spectrum of the curvature of the training loss now and then, and logs it.

    Training with the monitor is bitwise training without it: the loss is run again behind a fence that restores
    everything it may touch, on copies of batches that the training loop consumed anyway.

    **Logged** (prefix ``rmt/``, or the ``name``): ``lambda_max`` and ``lambda_min`` with their residuals, ``trace`` and
    ``frobenius`` with their standard errors, certified eigenvalues ``top/<i>`` and ``bottom/<i>``, outlier counts, bulk
    edges, quantiles, masses, ``sharpness_times_lr`` (gradient descent: compare with 2), ``probe_seconds`` and
    ``overhead``; to TensorBoard also the density as a histogram, and two figures. What can't be had honestly is not
    logged; the reason is, once. Every reading is saved below the run's log directory:
    ``python -m lightning_rmt plot RUN_DIRECTORY`` draws them, ``Spectrum.load`` reads one.

    Probes come at two speeds. A *full* one shows all of this and ends once outlier counts and edges have settled, at the
    latest after ``lanczos_steps`` products. Between those, *light* ones follow the largest eigenvalues: they end as soon as
    ``lambda_max`` and the outliers are certified, mostly after a fifth of the products, and log what they certified.

    After a probe, `reading` holds the last full reading, `light_reading` the last light one, and `history` a short record
    of every probe.

    Args:
        every_n_steps: full probe at every multiple of this number of optimizer steps, the first one after step 0. None: as
            often as ``max_overhead`` allows, which goes in halves to full probes and to light ones between them.
        light_every_n_steps: with ``every_n_steps``, a light probe at every multiple of this number between the full ones;
            it must divide ``every_n_steps``. None: no light probes there.
        max_overhead: share of the training time that the probes may take, if ``every_n_steps`` is None. It is kept over
            the whole training, as long as ``max_epochs``, ``max_steps`` or ``max_time`` say it is; early on, and in a
            training that ends before that, it may be up to four times as much.
        curvature: ``"hessian"``, ``"ggn"`` (Gauss-Newton; needs ``outputs_fn`` or the module's ``curvature_outputs``) or
            ``"gradient_covariance"`` (of one sample's gradient; see ``microbatch``).
        lanczos_steps: products per probe, at most. 100 resolve most outliers; 50 are often enough with a few large ones.
        probes: random start vectors. One carries its own error bars; more make density and trace sharper.
        batches: curvature batches per probe and rank, collected over the steps before it.
        rank_weights: of the curvature of several ranks: ``"equal"``, as DDP averages their gradients, or ``"samples"``, by
            what their batches hold, which is the mean over the data set.
        loss_fn: function of (module, batch) that returns the loss, or (loss, weight). None: the module's
            ``curvature_loss(batch)`` if it has one, else its ``training_step``.
        outputs_fn: function of (module, batch) that returns the outputs and a function of them that is the loss, for
            ``"ggn"``.
        parameters: name patterns (``"encoder.*"``) of the parameters to look at. None: all trainable ones.
        levels: blocks of parameters whose exact Hessian is taken, in float64, for random-matrix level statistics (logged as
            ``goe/<block>/...``): name patterns or layers, one block each, of 50 to 4096 parameters. ``"auto"``: 256 to 1024
            parameters nearest to the loss, as many as half of the rest of the probe pays for. None: no level statistics.
            Each curvature batch of each rank gives one spectrum, and they are pooled.
        blocks: groups of parameters (layers or name patterns) that get a spectrum of their own at full probes, logged as
            ``blocks/<group>/...``. A group costs up to ``lanczos_steps`` products, from the graphs of the whole spectrum
            where these are kept, and those of the Hessian then reach no further than to it.
        noise: measure the noise of the curvature from two half batches at full probes (four products and two more
            evaluations of the loss): ``noise_scale``, ``noise_edge``, ``anisotropy``, and the damping that it asks for.
        batch_law_every: at every so many-th full probe, from the first one on, also measure the largest outliers on parts of
            the curvature batches, and fit how they grow as batches shrink (``batch_law/<i>/...``; arXiv 2205.08601). It
            needs 16 samples a rank and takes 28 Lanczos runs of up to 40 products on 1/4, 1/8 and 1/16 of them (60 on 1/4 to
            1/32 from 64 samples on): some 60 to 100 products on all of the batches, 160 at most. None: never.
        preconditioned: measure P^(-1/2) H P^(-1/2) instead of H, with the P that the optimizer divides its steps by (Adam:
            ``sqrt(vhat) + eps`` from its own state), so that all of the spectrum is in the optimizer's metric, and log
            where it stands against this optimizer's edge of stability: ``preconditioned/sharpness_over_limit``. For
            Adam, AdamW, NAdam, RAdam, Adamax, RMSprop and Adagrad; SGD has P = 1 and a limit with its momentum. For the
            ordinary spectrum beside it take a second monitor with another ``name``.
        microbatch: samples per gradient, for ``"gradient_covariance"``; every gradient is kept, so larger ones save memory
            and estimate the same matrix.
        product: ``"exact"`` (double backward, about two gradients), ``"auto"`` (exact, unless an operation of the model has
            no second derivative and finite differences pass their own check), or ``"finite_difference"``: one gradient
            per product, no second-order graph, flash attention and compiled code as in training. Its error, some 1e-3,
            is measured at every probe (13 gradients; against exact products where there are any), logged as
            ``product_error`` and part of every residual: enough for density and outliers, never for level statistics.
            Networks with kinks (ReLU, max pooling) are refused. Under FSDP2, where whole parameters don't fit on every rank,
            ``"auto"`` and ``"finite_difference"`` take central differences on the shards; ``"exact"`` can't be had.
        autocast: measure under the Trainer's autocast instead of in full precision; products then err by 0.4 to 5 %.
        seed: of the start vectors and of the dropout masks inside the probe.
        name: prefix of the tags, and the folder of the saved readings; several monitors need different ones.
        on_error: ``"warn"``: a probe that fails is a warning, and the monitor turns itself off after three in a row;
            ``"raise"``: it raises, with the module restored.
        figures_every: draw figures for every n-th full reading (and the first and the last); 0 for none.
        custom_scalars: also write a layout for TensorBoard's custom scalars tab: what is to be compared in one chart, first
            what tells on learning rate, batch and damping. It replaces a layout of your own.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: (in ``setup``) the Trainer or the module can't be watched as asked.

    Example::

        trainer = Trainer(callbacks=[SpectrumMonitor()])
        trainer.fit(model)  # then: tensorboard --logdir lightning_logs
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        light_every_n_steps: int | None = None,
        max_overhead: float = 0.05,
        curvature: Literal["hessian", "ggn", "gradient_covariance"] = "hessian",
        lanczos_steps: int = 100,
        probes: int = 1,
        batches: int = 1,
        rank_weights: Literal["equal", "samples"] = "equal",
        loss_fn: Callable[[Any, Any], Any] | None = None,
        outputs_fn: Callable[[Any, Any], Any] | None = None,
        parameters: list[str] | None = None,
        levels: list[str] | Literal["auto"] | None = "auto",
        blocks: list[str] | None = None,
        noise: bool = True,
        batch_law_every: int | None = None,
        preconditioned: bool = False,
        microbatch: int = 1,
        product: Literal["auto", "exact", "finite_difference"] = "auto",
        autocast: bool = False,
        seed: int = 0,
        name: str = "rmt",
        on_error: Literal["warn", "raise"] = "warn",
        figures_every: int = 10,
        custom_scalars: bool = False,
    ) -> None:
        super().__init__()
        at_least_one(lanczos_steps=lanczos_steps, probes=probes, batches=batches, microbatch=microbatch)
        refuse_bad_values(every_n_steps, light_every_n_steps, max_overhead, parameters, seed, name)
        choose("curvature", curvature, ("hessian", "ggn", "gradient_covariance"))
        choose("product", product, ("auto", "exact", "finite_difference"))
        choose("rank_weights", rank_weights, ("equal", "samples"))
        choose("on_error", on_error, ("warn", "raise"))
        refuse_bad_levels(levels, curvature)
        refuse_bad_metric(preconditioned, curvature, product, levels)
        refuse_bad_blocks(blocks)
        if batch_law_every is not None:
            at_least_one(batch_law_every=batch_law_every)
        self.curvature = curvature
        self.lanczos_steps = lanczos_steps
        self.probes = probes
        self.rank_weights = rank_weights
        self.loss_fn = loss_fn
        self.outputs_fn = outputs_fn
        self.parameters = parameters
        self.levels = levels
        self.blocks = blocks
        self.noise = noise
        self.batch_law_every = batch_law_every
        self.preconditioned = preconditioned
        self.microbatch = microbatch
        self.product = product
        self.autocast = autocast
        self.seed = seed
        self.name = name
        self.on_error = on_error
        self.reading: Reading | None = None
        self.light_reading: Reading | None = None
        self.history: list[HistoryEntry] = []
        self._schedule = Schedule(every_n_steps, max_overhead, batches, light_every_n_steps)
        self._collector = BatchCollector(batches)
        self._report = LoggerReport(figures_every=figures_every, custom_scalars=custom_scalars)
        self._checked = False
        self._learned: Learned | None = None
        self._turns = Turns(batch_law_every)
        self._memory = Memory()
        self._failures = Failures(name, on_error)
        self._clock: float | None = None
        self._total_steps = math.inf
        self._capture_error: Exception | None = None
        self._said_too_short = False

    @property
    def state_key(self) -> str:
        """Own key in the checkpoint for each of several monitors."""
        return f"SpectrumMonitor[{self.name}]"

    @property
    def _settings(self) -> ProbeSettings:
        return ProbeSettings(
            curvature=self.curvature,
            microbatch=self.microbatch,
            product=self.product,
            parameters=self.parameters,
            blocks=self.blocks,
            levels=self.levels if self.curvature == "hessian" and not self.preconditioned else None,
            loss_fn=self.loss_fn,
            outputs_fn=self.outputs_fn,
            autocast=self.autocast,
            lanczos_steps=self.lanczos_steps,
            probes=self.probes,
            rank_weights=self.rank_weights,
            noise=self.noise and self.curvature != "gradient_covariance",
            batch_law=self._turns.due(sum(entry.speed == "full" for entry in self.history)),
            batches=self._schedule.batches,
            seed=self.seed,
            name=self.name,
            preconditioned=self.preconditioned,
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what can't work, before the first step."""
        if stage != "fit":
            return
        refuse_untested_strategy(trainer)
        ranks = Ranks.of(trainer)
        arguments = vars(self._settings) | self._schedule.arguments
        arguments |= {"on_error": self.on_error, "batch_law_every": self.batch_law_every}
        refuse_differences(ranks, arguments, "build it with the same arguments on every rank")
        ranks.together(lambda: self._refuse_unusable(trainer, pl_module), elsewhere=REFUSED)
        self._failures.off = bool(trainer.barebones)

    def _refuse_unusable(self, trainer: Any, pl_module: Any) -> None:
        if self.curvature == "ggn":
            refuse_missing_outputs(pl_module, self.curvature, self.outputs_fn)
        else:
            refuse_unusable_loss(pl_module, self.loss_fn)
        refuse_no_batch_law(self.batch_law_every, self.curvature, self.product, self.preconditioned)
        if not trainer.is_global_zero:  # nobody else writes
            return
        consumed = any(getattr(callback, "consumes_readings", False) for callback in trainer.callbacks)
        if not trainer.loggers and not consumed and not trainer.barebones and not trainer.fast_dev_run:
            raise MisconfigurationException(
                "SpectrumMonitor has nowhere to write: the Trainer has no logger. Use Trainer(logger=True) or a "
                "TensorBoardLogger, or remove the monitor"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks what depends on the accumulation and on the parameters' names, and starts the clock."""
        if current_step(trainer) == 0:
            self._start_afresh()
        ranks = Ranks.of(trainer)
        state = {"step": current_step(trainer), **self._schedule.agreed}
        state |= {"first probe": not self._checked, "failures": self._failures.in_a_row, "rest": self._failures.off}
        refuse_differences(ranks, state, "resume every rank from the same checkpoint")
        ranks.together(lambda: self._refuse_unfitting(trainer, pl_module), elsewhere=REFUSED)
        self._total_steps = total_steps(trainer)
        self._clock = time.perf_counter()

    def _refuse_unfitting(self, trainer: Any, pl_module: Any) -> None:
        refuse_untested_sharding(pl_module)
        every = self._schedule.light_every_n_steps or self._schedule.every_n_steps
        if every is not None and self._schedule.window(trainer.accumulate_grad_batches) > every:
            raise MisconfigurationException(
                f"{self._schedule.batches} curvature batches don't fit into {every} steps of "
                f"{trainer.accumulate_grad_batches} batches: make (light_)every_n_steps larger or batches smaller"
            )
        if self.parameters is not None:
            refuse_unmatched_parameters(pl_module, self.parameters)
        refuse_unusable_levels(pl_module, self.levels, self.parameters)
        refuse_unusable_blocks(pl_module, self.blocks, self.parameters)
        if self.preconditioned:
            refuse_no_metric(trainer, pl_module, self.parameters)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Copies the batch if a probe is coming up: the training step may change it."""
        if self._idle(trainer) or not self._schedule.collects(current_step(trainer), trainer.accumulate_grad_batches):
            return
        try:
            self._collector.add(batch, batch_idx)
        except Exception as error:  # told to the other ranks when the probe is due
            self._capture_error = error

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Takes a probe if one is due after the optimizer step that was just made."""
        if self._idle(trainer) or trainer.fit_loop._should_accumulate():
            return
        if under_join(trainer):
            self._collector.take()
            self._failures.under_join(trainer)
            return
        step = current_step(trainer)
        now = time.perf_counter()
        if self._clock is not None:
            self._schedule.stepped(now - self._clock)
        speed = self._schedule.due(step, trainer.accumulate_grad_batches)
        if speed is None and on_last_batch_of_fast_dev_run(trainer):
            speed = "full"
        if speed is not None:
            recurring = self._take(trainer, pl_module, step, speed)
            self._schedule.probed(step, time.perf_counter() - now, recurring, speed)
        elif self._schedule.undecided(step):
            following = self._schedule.decide(step, self._total_steps, seconds_left(trainer))
            self._schedule.set_next(step, Decision(*Ranks.of(trainer).from_first(following)))
            self._say_too_short()
        self._clock = time.perf_counter()

    def _say_too_short(self) -> None:
        """Once, if there will be one column in the heat map: that is no fault of the training's."""
        full_steps = self._schedule.steps_of_a_full_probe
        alone = sum(entry.speed == "full" for entry in self.history) == 1
        if full_steps is not None and alone and not self._said_too_short:
            self._said_too_short = True
            rank_zero_info(too_short(self.name, self._schedule.max_overhead, self._total_steps, full_steps))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draws the last reading's figures, and logs what the probes cost in all."""
        reading = self.reading
        last = current_step(trainer) - 1
        cost = self._schedule.overhead
        if reading is not None and cost is not None and self.history[-1].step != last and not trainer.fast_dev_run:
            share = {f"{self.name}/overhead": cost}
            self._try_to_write(reading, lambda: self._report.log_scalars(trainer.loggers, share, last))
        if reading is not None and self._report.figures_every and not trainer.fast_dev_run:
            self._try_to_write(reading, lambda: self._report.log_figures(trainer.loggers, reading, self.history))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Drops the batches that no probe came for, and what would keep the module and its Trainer alive."""
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same, since Lightning calls no teardown after an exception."""
        self._let_go()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values only: checkpoints are read back with ``weights_only=True``."""
        return {
            "version": STATE_VERSION,
            "schedule": self._schedule.state_dict(),
            "report": self._report.state_dict(),
            "history": [entry.to_dict() for entry in self.history],
            "checked": self._checked,
            "failures": self._failures.in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint left off; a state of another version, or damaged, is ignored with a warning."""
        self._start_afresh()  # whatever an earlier training left
        problem = f"is of version {state_dict.get('version')}, not {STATE_VERSION}"
        if state_dict.get("version") == STATE_VERSION:
            try:
                self._restore(state_dict)
                return
            except Exception as error:  # whatever a missing key or a wrong type leads to
                problem = f"can't be read ({type(error).__name__}: {error})"
                self._start_afresh()
        warnings.warn(
            f"the checkpoint's state of SpectrumMonitor {self.name!r} {problem}; the monitor starts afresh",
            stacklevel=2,
        )

    def _forget_batches(self) -> None:
        self._collector.take()
        self._capture_error = None

    def _let_go(self) -> None:
        self._forget_batches()
        for name in ("log", "log_dict"):  # Lightning binds the module's own to every callback, anew for every run
            self.__dict__.pop(name, None)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        self._schedule.load_state_dict(state_dict["schedule"])
        self._report.load_state_dict(state_dict["report"])
        self.history = [HistoryEntry.from_dict(entry) for entry in state_dict["history"]]
        self._checked = bool(state_dict["checked"])
        self._failures.in_a_row = int(state_dict["failures"])

    def _idle(self, trainer: Any) -> bool:
        """Whether this batch is no business of the monitor's."""
        averaging_epoch = trainer.fit_loop._skip_backward  # SWA's last epoch, which only updates batch statistics
        probed_enough = bool(trainer.fast_dev_run) and self.reading is not None
        return self._failures.off or averaging_epoch or probed_enough

    def _take(self, trainer: Any, pl_module: Any, step: int, speed: Speed) -> float | None:
        """Takes a reading and writes it; returns the seconds that the next such one will take, None if it failed."""
        begin, settings = time.perf_counter(), self._settings
        try:
            probed = measure_live(
                trainer,
                pl_module,
                self._captured,
                step,
                settings,
                check=not self._checked,
                light=self._light_ends if speed == "light" else None,
                learned=self._learned,
                memory=self._memory,
            )
        except NotSteppedError as reason:  # no failure either, even with on_error="raise"
            self._forget_batches()
            self._failures.too_early(trainer, str(reason))
            return None
        except LostRankError:  # no failure of the probe's: the training can't go on either
            raise
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._learned = None
            self._failures.probe_failed(trainer, error, self._memory.shrink(error))
            return None
        if not self._checked and trainer.is_global_zero:
            for sentence in probed.warnings:  # about the module, so once is enough; the loggers get them as text
                warnings.warn(f"SpectrumMonitor {self.name!r}: {sentence}", stacklevel=2)
        self._failures.in_a_row = 0
        self._memory.worked()
        self._checked, self._learned = True, probed.learned
        seconds = time.perf_counter() - begin
        reading = reading_of(
            trainer,
            pl_module,
            probed,
            settings,
            step=step,
            seconds=seconds,
            overhead=self._schedule.overhead_with(seconds),
            light=speed == "light",
        )
        if speed == "light":
            self.light_reading = reading
        else:
            self.reading = reading
        self.history.append(HistoryEntry.from_reading(reading))
        if trainer.is_global_zero:
            self._write(trainer, reading)
        if speed == "light":
            return seconds
        fit = probed.batch_law_seconds
        if probed.products_seconds is not None:  # the first probe, which may take many times as long as the next
            seconds = min(seconds, fit + FIRST_TO_NEXT * probed.products_seconds)
        return self._turns.on_average(seconds, fit)

    @property
    def _light_ends(self) -> LightEnds:
        """What a light probe certifies: the outliers that the last full reading counted, and lambda_max in any case."""
        last = next((entry for entry in reversed(self.history) if entry.speed == "full"), None)
        if last is None:
            return LightEnds()
        return LightEnds(min(max(last.outliers_high or 0, 1), TOP), min(last.outliers_low or 0, TOP))

    def _start_afresh(self) -> None:
        """Forgets an earlier training: the same monitor may watch one after another, each from its own step 0."""
        old = self._schedule
        self._schedule = Schedule(old.every_n_steps, old.max_overhead, old.batches, old.light_every_n_steps)
        self._report = LoggerReport(
            figures_every=self._report.figures_every, custom_scalars=self._report.custom_scalars
        )
        self.reading, self.light_reading, self.history = None, None, []
        self._checked, self._learned, self._capture_error, self._said_too_short = False, None, None, False
        self._turns, self._memory = Turns(self.batch_law_every), Memory()
        self._failures = Failures(self.name, self.on_error, off=self._failures.off)

    def _write(self, trainer: Any, reading: Reading) -> None:
        """Saves and logs a reading; where one of the two fails, the other is still done."""
        if not trainer.fast_dev_run:
            self._try_to_write(reading, lambda: save_reading(reading, log_directory(trainer)))
        self._try_to_write(reading, lambda: self._report.log(trainer.loggers, reading, self.history))

    def _try_to_write(self, reading: Reading, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:
            self._failures.write_failed(reading.step, error)

    def _captured(self) -> list[CapturedBatch]:
        """The batches, or what went wrong when they were captured; either is forgotten."""
        error, self._capture_error = self._capture_error, None
        batches = self._collector.take()
        try:
            if error is not None:
                raise error
        finally:
            error = None  # or its traceback's frame would hold it, and with it all that it refers to
        return batches
