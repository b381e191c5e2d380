"""Any optimizer, with shorter steps along the few directions of largest curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_rmt.curvature.parameters import ParameterBlock, Parameters
from lightning_rmt.krylov.eigenpairs import EigenPairs, top_eigenpairs
from lightning_rmt.krylov.lanczos import SymmetricOperator, product_noise
from lightning_rmt.optim.base_step import Snapshot, shrink_step
from lightning_rmt.optim.checkpoint import SPECTRAL, refuse_another_model, restore, save
from lightning_rmt.optim.deflation import SMALLEST_GAP, Deflation, find_deflation, spectrum_with
from lightning_rmt.optim.metric import Metric, block_of, in_metric, metric_of
from lightning_rmt.optim.owner import BaseOwner, requires_closure
from lightning_rmt.optim.progress import Progress
from lightning_rmt.optim.subspace import subspace_of
from lightning_rmt.reading import Reading
from lightning_rmt.spectra.spectrum import Spectrum


class SpectralPreconditioner(BaseOwner):
    """Experimental. Shrinks a base optimizer's steps along the outliers of the curvature, so that the bulk sets the pace.

    The base takes its own step, with its own state, from raw gradients; what it changed in the weights is then multiplied by
    ``P = D^(-1/2) (I - V (1 - c) V') D^(1/2)``: V are the k outermost eigenvectors of the curvature in the base's metric D,
    and c the factors of `Deflation`, so that ``0 < P <= I`` there. It never amplifies, and where nothing stands apart, the
    eigenvectors are out of date, or the rank is 0, the base's step is what is taken, bit for bit. Momentum is the base's and
    lives in raw coordinates, so a change of the basis can't corrupt it. Decoupled weight decay isn't shrunk.

    Where a spectrum has a gap, the learning rate can be as large as the bulk allows, and nothing here changes it. It wins on
    ill-conditioned problems with few outliers, and lost on small networks (docs/preconditioner.md has the numbers).

    Memory: k n elements, 3 n more in a step and ``steps * n`` in a refresh. A step takes ``4 k n`` operations on top.

    Args:
        base_optimizer: takes the steps. Its ``param_groups`` and ``state`` are this one's: schedulers and checkpoints see
            them. One whose ``step`` requires a closure (LBFGS) builds on the steps it thinks it took, and is refused.
        rank: ``"auto"``: as many directions as stand above the noise and a gap; a number: that many at most, 0 for none.
        max_rank: the most that ``"auto"`` may take.
        gap: factor by which the last shrunk level has to exceed the next one; 1 takes all that stand apart.
        refresh: steps after which the basis is `due` to be measured again. Halved while it turns out to be out of date, up
            to three times.
        metric: ``"adam"``: D is ``sqrt(vhat) + eps``; ``"identity"``; ``"auto"``: Adam's where the base is one. Groups with
            different learning rates enter D in either.
        damping: added to curvatures before they are compared, in the units of the operator in the metric: a number, or
            called with the number of steps taken. The larger, the less is shrunk.
        decoupled_weight_decay: whether the base shrinks weights by ``lr * weight_decay`` apart from its step. None: as AdamW
            and its likes say; has to be said for optimizers from elsewhere.
        save_basis: whether ``state_dict`` holds the eigenvectors. Without them a resumed run takes the base's steps until
            the next refresh.
        seed: of the start vectors of refreshes.

    Attributes:
        base: the base optimizer.
        metric: ``"adam"`` or ``"identity"``.

    Raises:
        TypeError: the base is no optimizer, or requires a closure.
        ValueError: an argument is out of its range, or the metric doesn't suit the base.

    Example:
        >>> import torch
        >>> from lightning_rmt.curvature.hessian import Hessian
        >>> w = torch.ones(50, requires_grad=True)
        >>> loss = lambda batch: (torch.cat([torch.tensor([100.0]), torch.linspace(0.1, 1, 49)]) * w**2).sum() / 2
        >>> optimizer = SpectralPreconditioner(torch.optim.SGD([w], lr=1.0))  # SGD diverges from a rate of 2 / 100 on
        >>> optimizer.refresh(Hessian(loss, [w], [None])).rank
        1
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     loss(None).backward()
        ...     _ = optimizer.step()
        >>> bool(loss(None) < 0.1)
        True
    """

    pickled = (
        "base",
        "metric",
        "_rank",
        "_most",
        "_gap",
        "_damping",
        "_decoupled",
        "_save_basis",
        "_seed",
        "_progress",
    )

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rank: int | Literal["auto"] = "auto",
        max_rank: int = 10,
        gap: float = SMALLEST_GAP,
        refresh: int = 200,
        metric: Metric = "auto",
        damping: float | Callable[[int], float] = 0.0,
        decoupled_weight_decay: bool | None = None,
        save_basis: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(base_optimizer)
        if rank != "auto" and (not isinstance(rank, int) or rank < 0):
            raise ValueError(f"rank must be 'auto' or a number of directions of at least 0, got {rank!r}")
        if not (max_rank >= 1 and refresh >= 1 and gap >= 1):
            raise ValueError(f"max_rank, refresh and gap must be at least 1, got {max_rank}, {refresh} and {gap}")
        if rank != 0 and requires_closure(base_optimizer):
            raise TypeError(
                f"{type(base_optimizer).__name__} requires a closure: it calls it several times and builds on the "
                "steps that it believes to have taken, which this would change. Use it alone, or another base"
            )
        self.metric = metric_of(base_optimizer, metric)
        self._rank, self._most = rank, max_rank if rank == "auto" else rank
        self._gap = gap
        self._damping = damping
        self._decoupled = decoupled_weight_decay
        self._save_basis, self._seed = save_basis, seed
        # in an object of its own: Lightning hands out a wrapper of optimizers, whose attributes aren't theirs
        self._progress = Progress(refresh)

    # --- steps ----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base, shrunk along the outliers.

        Args:
            closure: for the base, which evaluates it and whose result is returned.

        Raises:
            ValueError: the damping is negative or not finite.
        """
        progress = self._progress
        subspace = progress.active
        if subspace is None:
            loss = self.base.step() if closure is None else self.base.step(closure)
        else:
            factors = subspace.deflation.factors(self.damping)
            snapshot = Snapshot(subspace.block)
            if closure is None:
                snapshot.take()
                loss = self.base.step()
            else:
                loss = self.base.step(snapshot.after(closure))
            if snapshot.before is not None:  # else it never asked for gradients
                shrink_step(snapshot, subspace, factors, self.base, self.metric, self._decoupled)
        progress.steps += 1
        return loss

    # --- what it shrinks ------------------------------------------------------------------------------------------

    @property
    def damping(self) -> float:
        """The damping of the next step."""
        return float(self._damping(self._progress.steps) if callable(self._damping) else self._damping)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._progress.steps

    @property
    def due(self) -> bool:
        """Whether it is time for a refresh. Adam's metric exists after its first step."""
        ready = self.metric == "identity" or any("exp_avg_sq" in state for state in self.base.state.values())
        return self._most > 0 and ready and self._progress.due

    @property
    def active(self) -> bool:
        """Whether steps are shrunk; where not, `reason` says why."""
        return self._progress.active is not None

    @property
    def deflation(self) -> Deflation | None:
        """The levels that the last refresh chose, None before the first."""
        return None if self._progress.subspace is None else self._progress.subspace.deflation

    @property
    def cosine(self) -> float | None:
        """Mean squared cosine between the last two bases; below 0.5 steps aren't shrunk until the next refresh."""
        return self._progress.cosine

    @property
    def reason(self) -> str:
        """In words, why so many directions are shrunk, or none."""
        return "the rank is 0" if self._most == 0 else self._progress.reason

    # --- refreshes ------------------------------------------------------------------------------------------------

    def in_metric(self, operator: SymmetricOperator, parameters: Parameters | None = None) -> SymmetricOperator:
        """The operator in the base's metric as it is now, ``D^(-1/2) H D^(-1/2)``; itself where D is 1.

        A spectrum, its noise and the eigenpairs for `update` have to be measured on this one.

        Args:
            operator: of the curvature, whole in this process.
            parameters: that its vectors run over, in its order; None: as ``operator.block`` says, else this optimizer's.

        Raises:
            ValueError: the sizes don't fit, or the operator's vectors are spread over processes.
            RuntimeError: Adam has no second moments yet.
        """
        return in_metric(self.base, self.metric, operator, self._block(operator, parameters))

    def refresh(
        self,
        operator: SymmetricOperator,
        *,
        noise: float | Callable[[EigenPairs], float] = 0.0,
        steps: int | None = None,
        parameters: Parameters | None = None,
    ) -> Deflation:
        """Measures the outliers anew: one Lanczos run gives the eigenpairs and the spectrum that cleans them.

        Args:
            operator: of the curvature at the weights as they are now; the same on all ranks (`RankSum`).
            noise: scale s of the noise in the operator in the base's metric; 0 takes the batch's curvature for the truth. Or
                a function that measures it, given the eigenpairs whose directions have a noise of their own.
            steps: products; None: ``2 max_rank + 10``.
            parameters: as for `in_metric`.

        Returns:
            What will be shrunk. Errors are those of `in_metric`, `top_eigenpairs` and `update`.
        """
        if self._most == 0:
            return Deflation.nothing("the rank is 0")
        block = self._block(operator, parameters)
        inside = in_metric(self.base, self.metric, operator, block)
        pairs = top_eigenpairs(inside, self._most, steps=steps, seed=self._seed + self._progress.refreshes)
        assert pairs.run is not None
        spectrum = Spectrum((pairs.run,), inside.size, pairs.run.steps, product_noise(inside))
        scale = noise(pairs) if callable(noise) else noise
        return self.update(spectrum, pairs, noise=scale, parameters=zip(block.names, block.tensors, strict=True))

    def forget(self) -> None:
        """Takes the base's steps until the next refresh, which is due at once."""
        self._progress.forget()

    def update(
        self,
        reading: Reading | Spectrum,
        pairs: EigenPairs | None = None,
        *,
        noise: float = 0.0,
        parameters: Parameters | None = None,
    ) -> Deflation:
        """Takes over what a probe measured on `in_metric`.

        Args:
            reading: a reading or its spectrum.
            pairs: outermost eigenpairs of the same matrix: a spectrum has no eigenvectors.
            noise: scale s of the noise in that matrix.
            parameters: that the vectors run over, in their order; None: this optimizer's own.

        Returns:
            What will be shrunk.

        Raises:
            TypeError: an argument isn't what it should be, or there are no pairs.
            ValueError: they don't fit together, or aren't of this optimizer's parameters.
        """
        if self._most == 0:
            return Deflation.nothing("the rank is 0")
        spectrum = spectrum_with(pairs, reading)
        assert pairs is not None
        deflation = find_deflation(
            pairs.values, pairs.residuals, spectrum, noise=noise, most=self._most, rank=self._rank, gap=self._gap
        )
        self._progress.take(subspace_of(self._parameters(), self._block(None, parameters), pairs.vectors, deflation))
        return deflation

    def _parameters(self) -> list[Tensor]:
        """Each of the optimizer's parameters once."""
        return list({id(p): p for group in self.base.param_groups for p in group["params"]}.values())

    def _block(self, operator: SymmetricOperator | None, parameters: Parameters | None) -> ParameterBlock:
        known = block_of(operator) if parameters is None else ParameterBlock(parameters)
        return ParameterBlock(self._parameters()) if known is None else known

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's, which it can load as well, with what is known of the curvature under ``"spectral"``."""
        spectral = save(self._progress, self.metric, self._parameters(), self._save_basis)
        return {**self.base.state_dict(), SPECTRAL: spectral}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint of this optimizer, or of its base alone: then nothing is shrunk until a refresh.

        Raises:
            ValueError: it is of a model with other parameters; nothing was changed.
        """
        saved = state_dict.get(SPECTRAL)
        if saved is not None:
            refuse_another_model(saved, self._parameters())
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != SPECTRAL})
        restore(self._progress, saved, self.metric, self._parameters())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(metric={self.metric!r}, active={self.active}, base={self.base!r})"
