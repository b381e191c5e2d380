"""Installs what is shipped on every Python that this machine has, each in an environment of its own, and uses it there.

``make pythons`` runs it, and so does CI. The wheel goes to every interpreter that ``requires-python`` allows, with the
versions of ``constraints.txt``; the sdist goes to the oldest, with the lowest versions that ``pyproject.toml`` declares.
Each environment has to pass ``pip check`` and to run ``users_run.py`` away from the checkout; in one of them the types
of the installed package are checked strictly. What was found is printed, and what can't be installed fails.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import Metadata
from packaging.version import Version
from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (Path(__file__).with_name("users_run.py"), ROOT / "tests" / "typed_user_script.py")
CONSTRAINED = ("-c", str(ROOT / "constraints.txt"))
DEBIAN = Path("/usr")
# where pip's settings go in uv: an index that pip uses here, or a folder of wheels, is used
UV_SETTINGS = {
    "find-links": "UV_FIND_LINKS",
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "constraint": "UV_CONSTRAINT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}


class Failed(Exception):
    """A command failed; the message is what it said."""


@dataclass(frozen=True)
class Interpreter:
    version: Version
    path: Path
    prefix: Path


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="every-python-") as folder:
        work = Path(folder)
        uv("build", "--quiet", "--out-dir", str(work / "dist"), str(ROOT))  # the wheel is built from the sdist
        (wheel,), (sdist,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
        metadata = metadata_of(wheel)
        found = interpreters(metadata)
        for interpreter in found:
            print(f"found Python {interpreter.version}: {interpreter.path}", flush=True)
        complaint = too_few(found)
        if complaint:
            print(complaint)
            return 1
        oldest = min(found, key=lambda interpreter: interpreter.version)
        cases = [("wheel", interpreter, wheel, CONSTRAINED) for interpreter in found]
        # named on the command line our dependencies are direct ones, and theirs as new as elsewhere
        direct = [str(requirement) for requirement in metadata.requires_dist or () if requirement.marker is None]
        cases.append(("sdist, lowest versions", oldest, sdist, ("--resolution", "lowest-direct", *direct)))
        failures = 0
        with ThreadPoolExecutor(2) as pool:  # an installation uses all cores itself, so these wait for each other
            running: list[tuple[str, Future[str]]] = []
            for number, (what, interpreter, shipped, versions) in enumerate(cases):
                name = f"Python {interpreter.version}, {what}"
                place = work / str(number)
                try:
                    started = time.monotonic()
                    torch = install(interpreter, shipped, versions, place)
                    name += f", torch {torch}: installed in {time.monotonic() - started:.0f} s"
                except Failed as failure:
                    failures += 1
                    print(f"FAILED {name}: can't be installed\n{failure}", flush=True)
                    continue
                running.append((name, pool.submit(use, place, check_types=number == 0)))
            for name, future in running:
                try:
                    print(f"ok     {name}, {future.result()}", flush=True)
                except Failed as failure:
                    failures += 1
                    print(f"FAILED {name}\n{failure}", flush=True)
    print(f"{len(cases)} environments on {len(found)} Pythons, {failures} of them failed")
    return int(failures > 0)


def too_few(found: Sequence[Interpreter]) -> str | None:
    """Why a run that passes would say too little. CI has to see a second Python, and Debian's own where it is Debian."""
    if not found:
        return "FAILED: no Python that requires-python allows was found"
    if "CI" in os.environ and len(found) < 2:
        return "FAILED: only one Python was found; CI needs a second"
    if "CI" in os.environ and Path("/etc/debian_version").exists() and DEBIAN not in {one.prefix for one in found}:
        return "FAILED: Debian's own Python, /usr/bin/python3, was not found"
    return None


def interpreters(shipped: Metadata) -> list[Interpreter]:
    """Every CPython on PATH, of pyenv and of the system that ``requires-python`` allows, oldest first, each once."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    # pyenv's shims are left out: one stands for a Python only where pyenv is told to use that one
    on_path = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != str(pyenv / "shims")]
    places = [*map(str, sorted(pyenv.glob("versions/*/bin"))), *on_path, "/usr/local/bin", "/usr/bin"]
    options = ("--only-installed", "--no-managed-python", "--output-format", "json")
    listed = uv("python", "list", *options, PATH=os.pathsep.join(places))
    found: dict[tuple[Version, Path], Interpreter] = {}
    for one in json.loads(listed):
        version = Version(one["version"])
        allowed = shipped.requires_python is None or shipped.requires_python.contains(version)
        if allowed and one["implementation"] == "cpython" and one["variant"] == "default":
            # links and virtual environments are other names of the same installation
            prefix = Path(run(one["path"], "-I", "-c", "import sys; print(sys.base_prefix)").strip()).resolve()
            found.setdefault((version, prefix), Interpreter(version, Path(one["path"]), prefix))
    return [found[key] for key in sorted(found)]


def install(interpreter: Interpreter, shipped: Path, versions: Sequence[str], place: Path) -> str:
    """Makes an environment in ``place``, installs what is shipped with its dependencies, and returns torch's version."""
    python = environment(place)
    uv("venv", "--quiet", "--python", str(interpreter.path), str(place / "environment"))
    uv("pip", "install", "--quiet", "--python", python, *versions, str(shipped))
    uv("pip", "check", "--quiet", "--python", python)
    listed = uv("pip", "list", "--quiet", "--python", python, "--format", "json")
    return next(one["version"] for one in json.loads(listed) if one["name"] == "torch")


def use(place: Path, check_types: bool) -> str:
    """Runs the user's scripts in the environment, which is removed then: with CUDA's libraries it takes gigabytes."""
    started = time.monotonic()
    for script in SCRIPTS:
        shutil.copy(script, place)
    try:
        run(environment(place), SCRIPTS[0].name, cwd=place)
        said = f"used for {time.monotonic() - started:.0f} s"
        if check_types:  # without the configuration of this project: as strictly as a user may
            mypy = (sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(place / "cache"))
            run(*mypy, "--python-executable", environment(place), SCRIPTS[1].name, cwd=place)
            said += ", types checked"
    finally:
        shutil.rmtree(place / "environment")
    return said


def environment(place: Path) -> str:
    return str(place / "environment" / "bin" / "python")


def metadata_of(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name))


def uv(*arguments: str, **variables: str) -> str:
    return run(find_uv_bin(), *arguments, **{**pip_settings(), **variables})


def pip_settings() -> dict[str, str]:
    """What pip is told on this machine about where packages come from, as uv's environment variables."""
    # as pip does, and unlike uv, take the best version of all indexes
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        variable = UV_SETTINGS.get(key.rpartition(".")[2])
        if variable is not None:  # what the environment says comes first in the list, and before files
            separator = "," if variable == "UV_FIND_LINKS" else " "
            settings.setdefault(variable, separator.join(str(ast.literal_eval(value)).split()))
    return {key: value for key, value in settings.items() if key not in os.environ}


def run(*command: str, cwd: Path | None = None, **variables: str) -> str:
    """The command's standard output; of this checkout's environment it sees nothing."""
    # without bytecode every process would compile all of torch again
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MYPYPATH", "PYTHONDONTWRITEBYTECODE"}
    env = {key: value for key, value in os.environ.items() if key not in ours} | variables
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
