"""One reading: what a probe measured at one step of the training, frozen and saveable. Knows neither torch nor Lightning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_rmt.laws.ranking import QUICK, Ranking, rank_laws
from lightning_rmt.levels.block import BlockLevels
from lightning_rmt.levels.edge import edge_statistics
from lightning_rmt.levels.statistics import LevelStatistics
from lightning_rmt.levels.verdict import FEWEST_LEVELS
from lightning_rmt.local_law.batch_law import BatchLaw
from lightning_rmt.local_law.cleaning import Cleaned, clean, wigner_gap
from lightning_rmt.local_law.damping import self_consistent_damping, self_consistent_damping_error
from lightning_rmt.local_law.noise import NoiseScale
from lightning_rmt.spectra.archive import read_arrays
from lightning_rmt.spectra.levels import Level
from lightning_rmt.spectra.spectrum import Spectrum

BLOCK_META = ("name", "description", "noise", "seconds")
"""What is saved of a block besides its eigenvalues."""

NOISES = ("noise", "curvature_noise")
"""Attributes that are a `NoiseScale`."""

PLAIN = (*NOISES, "batch_law")
"""Attributes that are saved as plain values, or None."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The result of one probe of a training run.

    Attributes:
        step: position on the loggers' step axis (the one that the batch's training metrics are logged under).
        epoch: epoch of the probe.
        spectrum: the measured spectrum.
        curvature: ``"hessian"``, ``"ggn"`` or ``"gradient_covariance"``.
        name: the monitor's name, which prefixes every tag.
        seconds: wall-clock time of the probe.
        overhead: time spent on probes so far, this one included, as a share of the training time; None where that
            wasn't measured.
        samples: samples in the curvature batches, over all ranks.
        parameters: names of the probed parameters.
        learning_rate: largest learning rate over the optimizers' parameter groups, None where there is none.
        symmetry_error: ``|u'Hv - v'Hu| / |Hu|`` with random u and v along Hu; None where it wasn't tested.
        repeat_error: relative difference of the same product taken twice; None where it wasn't tested.
        notes: sentences for the user: what was refused or looks wrong, and why.
        speed: ``"full"``, or ``"light"``: the probe ended once the outermost eigenvalues were certified, and nothing else of
            its spectrum should be relied on.
        product: ``"exact"`` or ``"finite_difference"``.
        product_error: relative error of a product of finite differences, as measured; None where it is exact.
        levels: exact eigenvalues of blocks of parameters with their level statistics; none in a light reading.
        blocks: spectra of groups of parameters, by their tag; none in a light reading.
        noise: of the curvature of one training batch (all that goes into an optimizer step) around that of all data; none in
            a light reading.
        curvature_noise: of the matrix whose spectrum this is.
        preconditioner: what this probe fed a `SpectralPreconditioner`: ``rank`` (directions that are shrunk from here on),
            ``edge`` (largest level left, in its metric), ``smallest_factor`` and ``cosine`` (mean squared, to the last
            basis); empty where none was due.
        batch_law: the largest outliers on parts of the batches, and how they grow as batches shrink; None where that wasn't
            asked for at this reading, or a note says why it can't be had.
        preconditioned: the optimizer in whose metric everything is measured (``"Adam"``), so that the spectrum is that of
            P^(-1/2) H P^(-1/2); None for the ordinary spectrum.
        stability_limit: of the largest eigenvalue there, for this optimizer's next step; None for an ordinary spectrum, and
            where the learning rate is 0.
        sharpness_limit: of `sharpness_times_lr`, for the optimizer in use: 2 for gradient descent and where the optimizer
            isn't known, ``2 (1 + momentum)`` for SGD with momentum; None where the optimizer scales the gradient (Adam).
    """

    step: int
    epoch: int
    spectrum: Spectrum
    curvature: str
    name: str
    seconds: float
    samples: int
    parameters: tuple[str, ...] = ()
    learning_rate: float | None = None
    overhead: float | None = None
    symmetry_error: float | None = None
    repeat_error: float | None = None
    notes: tuple[str, ...] = ()
    speed: str = "full"
    product: str = "exact"
    product_error: float | None = None
    levels: tuple[BlockLevels, ...] = ()
    blocks: Mapping[str, Spectrum] = field(default_factory=dict)
    noise: NoiseScale | None = None
    curvature_noise: NoiseScale | None = None
    preconditioner: Mapping[str, float] = field(default_factory=dict)
    batch_law: BatchLaw | None = None
    preconditioned: str | None = None
    stability_limit: float | None = None
    sharpness_limit: float | None = 2.0

    @property
    def light(self) -> bool:
        """Whether this is a light reading."""
        return self.speed == "light"

    @property
    def sharpness_times_lr(self) -> float | None:
        """``lambda_max * lr``; gradient descent on a quadratic is stable below 2 (Cohen et al. 2021); see `sharpness_limit`.

        None without a learning rate, where a light reading didn't certify lambda_max, or in an optimizer's metric, whose
        limit isn't 2 (see `sharpness_over_limit`).
        """
        unknown = self.preconditioned is not None or (self.light and not self.spectrum.lambda_max.certified)
        return None if self.learning_rate is None or unknown else self.spectrum.lambda_max.value * self.learning_rate

    @property
    def sharpness_over_limit(self) -> Level | None:
        """lambda_max in the optimizer's metric over its `stability_limit` (Cohen et al. 2022): 1 is the edge of stability.

        None without a limit, or where a light reading didn't certify lambda_max.
        """
        found, limit = self.spectrum.lambda_max, self.stability_limit
        if limit is None or (self.light and not found.certified):
            return None
        return Level(found.value / limit, found.residual / limit, found.certified)

    @cached_property
    def laws(self) -> Ranking:
        """Limiting laws (the quick ones) fitted to the bulk of the spectrum, nearest first; see `rank_laws`."""
        return rank_laws(self.spectrum, QUICK)

    @cached_property
    def cleaned_outliers(self) -> Cleaned | None:
        """The counted outliers above the bulk without what noise added to them; None where the noise isn't known."""
        if self.curvature_noise is None:
            return None
        levels = self.spectrum.top[: self.spectrum.outliers.high.count or 0]
        noise = self.curvature_noise
        return clean(
            [level.value for level in levels],
            noise.mean,
            self.spectrum,
            noise_stderr=math.nan if noise.stderr is None else noise.stderr,
            residuals=[level.residual for level in levels],
            along=noise.along or 0.0,
        )

    def local_law_damping_error(self) -> float:
        """Standard error of `local_law_damping`; NaN where it isn't known.

        Raises:
            ValueError: as there.
        """
        if self.noise is None or self.curvature_noise is None or self.noise.stderr is None:
            return math.nan
        return self_consistent_damping_error(
            self.noise.mean,
            self.spectrum,
            spectrum_noise=self.curvature_noise.mean,
            noise_stderr=self.noise.stderr,
        )

    def local_law_damping(self) -> float | None:
        """The damping at which a noisy Newton step is right on average, see `self_consistent_damping`.

        None where the noise isn't known.

        Raises:
            ValueError: it can't be had (`NoDampingError`), a step has more samples than the spectrum's batches, or the
                spectrum is the one in an optimizer's metric.
        """
        if self.noise is None or self.curvature_noise is None:
            return None
        if self.preconditioned is not None:
            raise ValueError(
                "a damping is added to the curvature itself, and this is the one in the optimizer's metric"
            )
        return self_consistent_damping(self.noise.mean, self.spectrum, spectrum_noise=self.curvature_noise.mean)

    def wigner_gap(self) -> float | None:
        """How far the local law's isotropic noise is from that in the outliers' directions, see `wigner_gap`.

        By the counted outliers, or, where these can't be counted, by the largest eigenvalue. Above 0.2 the local law
        shouldn't be trusted with a damping; None where it can't be told.
        """
        noise, cleaned = self.curvature_noise, self.cleaned_outliers
        if noise is None or noise.anisotropy is None or cleaned is None:
            return None
        if not cleaned.told.any() and self.spectrum.top:
            cleaned = clean([self.spectrum.top[0].value], noise.mean, self.spectrum)
        return wigner_gap(cleaned, noise.anisotropy)

    @cached_property
    def level_statistics(self) -> dict[str, LevelStatistics]:
        """Level statistics by scope: the exact blocks, and the certified runs at the ends of the whole spectrum.

        A run of certified eigenvalues counts once it has enough of them, and only where products are exact: see
        `edge_statistics`.
        """
        found = {block.name: block.statistics for block in self.levels}
        if not self.light and self.product == "exact":
            edges = {"edge_top": edge_statistics(self.spectrum, "high", exact_products=True)}
            edges["edge_bottom"] = edge_statistics(self.spectrum, "low", exact_products=True)
            found |= {name: edge for name, edge in edges.items() if edge.levels >= FEWEST_LEVELS}
        return found

    def save(self, path: str | Path) -> None:
        """Writes the reading to ``path`` as .npz (plain arrays and JSON, no pickle); ``Spectrum.load`` reads it too."""
        meta = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("spectrum", "levels", "blocks")}
        meta["levels"] = [{name: getattr(block, name) for name in BLOCK_META} for block in self.levels]
        meta["blocks"] = list(self.blocks)
        meta |= {name: None if (found := getattr(self, name)) is None else found.to_dict() for name in PLAIN}
        arrays: dict[str, Any] = {"reading": np.array(json.dumps(meta)), **self.spectrum.to_arrays()}
        arrays |= {f"levels_{i}": block.eigenvalues for i, block in enumerate(self.levels)}
        for i, spectrum in enumerate(self.blocks.values()):
            arrays |= {f"block_{i}_{name}": array for name, array in spectrum.to_arrays().items()}
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Reading:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or is not a saved reading (a bare spectrum has no reading in it).
        """
        arrays = read_arrays(path)
        if "reading" not in arrays:
            raise ValueError(f"{path} holds no reading; Spectrum.load may read it")
        meta: dict[str, Any] = json.loads(str(arrays.pop("reading")))
        meta["levels"] = [
            BlockLevels(eigenvalues=arrays[f"levels_{i}"], **block) for i, block in enumerate(meta.get("levels", []))
        ]
        blocks = {
            name: Spectrum.from_arrays(_starting_with(f"block_{i}_", arrays))
            for i, name in enumerate(meta.pop("blocks", []))
        }
        meta |= {name: NoiseScale(**meta[name]) for name in NOISES if meta.get(name) is not None}
        if meta.get("batch_law") is not None:
            meta["batch_law"] = BatchLaw.from_dict(meta["batch_law"])
        known = {f.name for f in fields(cls)}
        meta = {key: tuple(v) if isinstance(v, list) else v for key, v in meta.items() if key in known}
        return cls(spectrum=Spectrum.from_arrays(arrays), blocks=blocks, **meta)


def _starting_with(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
