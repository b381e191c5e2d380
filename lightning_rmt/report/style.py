"""How the figures look: one palette, one eigenvalue axis. Matplotlib is imported where a figure is made, never before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too.
BULK, OUTLIER, ATOM, LIMIT = "#0072B2", "#D55E00", "#009E73", "#A0158A"
INK, FAINT, GRID = "#222222", "#6F6F6F", "#E6E6E6"
TITLE_SIZE, LABEL_SIZE, TICK_SIZE, LEGEND_SIZE = 10.5, 10.0, 9.0, 8.5
DPI = 110


def new_figure(width: float, height: float) -> Figure:
    """A figure of ``width`` x ``height`` inches with its own Agg canvas: no pyplot, nothing global, any thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def mass_colours() -> ListedColormap:
    """From pale green to dark blue; without YlGnBu's lightest tones, which would pass for the white of "no mass"."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["YlGnBu"](np.linspace(0.16, 1.0, 256)))


def dress(axes: Axes) -> None:
    """The look that all axes share."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(labelsize=TICK_SIZE, colors=INK, which="both")
    axes.tick_params(color=FAINT, which="both")
    axes.set_axisbelow(True)


@dataclass(frozen=True)
class EigenvalueAxis:
    """An axis for eigenvalues: linear, or linear around zero and logarithmic beyond (symlog).

    Attributes:
        low: left end.
        high: right end.
        linear_to: magnitude up to which the axis is linear, a power of ten; infinite for a linear axis.
        linear_decades: half the linear part's length, in decades of the logarithmic part; it takes the tick labels
            0 and ±linear_to, so an axis across the page needs more than one up it.
    """

    low: float
    high: float
    linear_to: float = math.inf
    linear_decades: float = 0.8

    @classmethod
    def spanning(cls, low: float, high: float, scale: float) -> EigenvalueAxis:
        """An axis from ``low`` to ``high`` with room to spare, on which the bulk, of magnitude ``scale``, stays visible.

        It is linear where the ends are within ten times ``scale``; beyond that a linear axis would make a line of the bulk.
        The linear part ends at the power of ten below ``scale``, and no more than four decades below the ends.
        """
        reach = max(abs(low), abs(high))
        if reach == 0.0:
            return cls(-1.0, 1.0)
        if reach <= 10.0 * scale:
            room = 0.05 * ((high - low) or reach)
            return cls(low - room, high + room)
        linear_to = 10.0 ** math.floor(math.log10(min(max(scale, reach * 1e-4), reach * 0.1)) + 1e-9)
        return cls.symlog(low, high, linear_to)

    @classmethod
    def symlog(cls, low: float, high: float, linear_to: float, linear_decades: float = 0.8) -> EigenvalueAxis:
        """A symlog axis from ``low`` to ``high`` with room to spare; its linear part takes at least a tenth of it."""
        decades = sum(math.log10(max(end / linear_to, 1.0)) for end in (high, -low))
        linear_decades = max(linear_decades, 0.07 * decades)
        bare = cls(low, high, linear_to, linear_decades)
        ends = bare.position([min(low, -0.4 * linear_to), max(high, 0.4 * linear_to)])
        room = 0.05 * (ends[1] - ends[0])
        left, right = bare.value([ends[0] - room, ends[1] + room])
        return cls(float(left), float(right), linear_to, linear_decades)

    @property
    def is_linear(self) -> bool:
        """Whether this is a plain linear axis."""
        return math.isinf(self.linear_to)

    def position(self, values: ArrayLike) -> NDArray[np.float64]:
        """Where eigenvalues lie along the axis, in decades (linear axis: as they are)."""
        values = np.asarray(values, dtype=np.float64)
        if self.is_linear:
            return values
        ratio = np.maximum(np.abs(values) / self.linear_to, 1e-300)
        inner = ratio * self.linear_decades
        outer = self.linear_decades + np.log10(np.maximum(ratio, 1.0))
        return np.sign(values) * np.where(ratio <= 1.0, inner, outer)

    def value(self, positions: ArrayLike) -> NDArray[np.float64]:
        """The inverse of `position`."""
        positions = np.asarray(positions, dtype=np.float64)
        if self.is_linear:
            return positions
        size = np.abs(positions)
        outer = 10.0 ** np.maximum(size - self.linear_decades, 0.0)
        return (
            np.sign(positions)
            * self.linear_to
            * np.where(size <= self.linear_decades, size / self.linear_decades, outer)
        )

    def samples(self, count: int) -> NDArray[np.float64]:
        """``count`` eigenvalues, evenly spaced along the axis; shape (count,)."""
        ends = self.position([self.low, self.high])
        return self.value(np.linspace(ends[0], ends[1], count))

    def apply(self, axes: Axes, which: str = "x", labels: int = 9) -> None:
        """Gives ``axes`` this scale, its limits and its ticks.

        Args:
            axes: the axes.
            which: ``"x"`` or ``"y"``.
            labels: largest number of tick labels.
        """
        axis: Axis = axes.xaxis if which == "x" else axes.yaxis
        limits = axes.set_xlim if which == "x" else axes.set_ylim
        if self.is_linear:
            limits(self.low, self.high)
            _linear_ticks(axis, labels)
            return
        scale: dict[str, Any] = {"linthresh": self.linear_to, "linscale": self.linear_decades * 0.9, "base": 10}
        (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", **scale)
        limits(self.low, self.high)
        self._symlog_ticks(axis, labels)

    def _symlog_ticks(self, axis: Axis, labels: int) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

        first = round(math.log10(self.linear_to))
        last = math.floor(math.log10(max(abs(self.low), abs(self.high), self.linear_to)) + 1e-9)
        inside = [k for k in range(first, last + 1) for side in (-1, 1) if self.low <= side * 10.0**k <= self.high]
        stride = max(1, math.ceil(len(inside) / (labels - 1)))
        exponents = list(range(first, last + 1, stride))
        ticks = [0.0] + [side * 10.0**k for k in exponents for side in (-1, 1)]
        minor = [side * m * 10.0**k for k in range(first, last + 1) for m in range(1, 10) for side in (-1, 1)]
        plain = exponents[0] >= -3 and exponents[-1] <= 3

        def text(value: float, _position: int | None = None) -> str:
            if value == 0.0:
                return "0"
            sign = "−" if value < 0 else ""
            k = round(math.log10(abs(value)))
            return f"{sign}{10.0**k:g}" if plain else rf"${'-' if sign else ''}10^{{{k}}}$"

        axis.set_major_locator(FixedLocator(sorted(t for t in ticks if self.low <= t <= self.high)))
        axis.set_major_formatter(FuncFormatter(text))
        axis.set_minor_locator(FixedLocator(sorted(t for t in minor if self.low <= t <= self.high)))
        axis.set_minor_formatter(NullFormatter())


def _linear_ticks(axis: Axis, labels: int) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-3, 4))
    axis.set_major_locator(MaxNLocator(nbins=labels, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(formatter)
