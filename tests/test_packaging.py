"""What is shipped: built as an installer builds it, and looked into. `make pythons` installs and uses it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata

import lightning_rmt

ROOT = Path(__file__).parent.parent
NAME = f"lightning_rmt-{lightning_rmt.__version__}"


def run(*command: str):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    directory = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT))
    return directory


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    package = ROOT / "lightning_rmt"
    files = {
        path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.suffix in {".py", ".npz", ".typed"}
    }
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    assert shipped == files
    assert {"lightning_rmt/py.typed", "lightning_rmt/levels/goe_null.npz"} <= shipped


def test_the_sdist_holds_what_tests_and_documentation_need(dist):
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        shipped = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    kept = {path.name for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".yml", ".txt", ".cff", ".py"}}
    folders = {"lightning_rmt", "tests", "docs", "examples", "benchmarks"}
    assert shipped == kept | folders | {"Makefile", "LICENSE", "PKG-INFO", ".gitignore"}


def test_the_metadata_is_valid_and_true(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = Metadata.from_email(archive.read(f"{NAME}.dist-info/METADATA"), validate=True)
        assert archive.read(f"{NAME}.dist-info/licenses/LICENSE").decode() == (ROOT / "LICENSE").read_text()
    assert str(metadata.version) == lightning_rmt.__version__
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description == (ROOT / "README.md").read_text()
    assert metadata.description_content_type == "text/markdown"
    pythons = [
        line.rsplit(" ", 1)[1]
        for line in metadata.classifiers
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert pythons
    assert f"{metadata.requires_python}" == f">={pythons[0]}"
    plain = {requirement.name for requirement in metadata.requires_dist if requirement.marker is None}
    assert {"torch", "pytorch-lightning", "numpy", "scipy"} <= plain
    assert not {"lightning", "transformers", "scikit-learn", "tabulate"} & plain


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_rmt.__version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_changelog_begins_with_what_is_not_released_or_this_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]"
    released = headings[1:]
    assert not released or released[0].startswith(f"## [{lightning_rmt.__version__}] - ")
