from __future__ import annotations

import re

from lightning_rmt.report.table import summary_table


def test_columns_hold_the_readings_numbers(trained, known):
    lines = summary_table([known("initial"), trained]).split("\n")
    assert len({len(line) for line in lines}) == 1  # aligned
    header, first, second = (re.split(r"\s{2,}", line.strip()) for line in lines)
    assert header == ["step", "lambda_max", "lambda_min", "trace", "outliers", "bulk edges", "seconds", "products"]
    assert first[0] == "0"
    assert second[0] == "120"
    assert second[1].startswith("10.40 ± ")
    assert second[2].startswith("-0.1116 ± ")
    trace = trained.spectrum.trace
    assert second[3] == f"{trace.mean:.2f} ± {trace.stderr:.2f}"
    assert (first[4], second[4]) == ("- / -", "9? / -")
    assert (first[5], second[5]) == ("- .. -", "- .. 0.700")
    assert second[6:] == ["1.5", "100"]


def test_uncertain_numbers_are_marked(known, reading_of):
    import numpy as np

    row = summary_table([known("four steps")]).split("\n")[1]
    assert "~" in row
    spiked = np.concatenate([np.linspace(-1, 1, 1000), [4.0]])
    assert ">=1 / " in summary_table([reading_of(spiked, 60)])


def test_any_reading_fits(any_reading):
    assert len(summary_table([any_reading]).split("\n")) == 2
