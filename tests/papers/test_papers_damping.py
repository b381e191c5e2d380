"""The script on damping as shrinkage, at its quick size; and that it fails where a rule is wrong."""

from __future__ import annotations

import dataclasses

import damping_as_shrinkage as damping
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_all_that_is_asserted_holds(tmp_path, capsys):
    assert damping.main(["--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "damping_as_shrinkage.md").read_text()
    assert "does not reproduce" in page
    assert "test accuracy, controller" in page


def test_a_wrong_rule_is_seen(tmp_path, monkeypatch):
    real = damping.linear_shrinkage
    wrong = lambda *arguments: dataclasses.replace(real(*arguments), intensity=0.9)  # noqa: E731
    monkeypatch.setattr(damping, "linear_shrinkage", wrong)
    monkeypatch.setattr(damping, "networks", lambda claims: None)
    assert damping.main(["--quick", "--out", str(tmp_path)]) == 1
