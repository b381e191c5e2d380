"""Where the readings of a run are kept: ``<log_dir>/<name>/step_<8 digits>.npz``, one file a reading."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from lightning_rmt.reading import Reading


def reading_path(log_dir: str | Path, name: str, step: int) -> Path:
    """The file of the reading of monitor ``name`` at ``step``.

    Raises:
        ValueError: ``name`` would leave ``log_dir``.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(f"a monitor's name is part of a path below the log directory, and {name!r} can't be")
    return Path(log_dir).joinpath(*parts) / f"step_{step:08d}.npz"


def save_reading(reading: Reading, log_dir: str | Path) -> Path:
    """Writes the reading below ``log_dir`` and returns the path; a crash leaves the old file or the new, never half.

    A reading of the same step is replaced: after a resume the later one counts.
    """
    path = reading_path(log_dir, reading.name, reading.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system; the suffix keeps load_run from seeing it.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        reading.save(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def load_run(directory: str | Path) -> dict[str, list[Reading]]:
    """Every reading below ``directory``, by monitor, sorted by step.

    The key is the monitor's name, or the folder relative to ``directory`` where several folders hold one name (two
    versions of a run, say). A file that can't be read is skipped with a warning that names it.

    Raises:
        FileNotFoundError: ``directory`` doesn't exist.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory")
    folders: dict[Path, list[Reading]] = {}
    for path in sorted(directory.rglob("step_*.npz")):
        try:
            folders.setdefault(path.parent, []).append(Reading.load(path))
        except Exception as error:  # whatever a damaged file makes NumPy, zipfile or JSON raise
            reason = str(error).removeprefix(f"{path} is not a saved spectrum or reading: ")
            warnings.warn(f"skipped {path}, which can't be read as a reading: {reason}", stacklevel=2)
    folders = {folder: readings for folder, readings in folders.items() if readings}
    names = [readings[0].name for readings in folders.values()]
    return {
        name if names.count(name) == 1 else folder.relative_to(directory).as_posix(): sorted(
            readings, key=lambda reading: reading.step
        )
        for (folder, readings), name in zip(folders.items(), names, strict=True)
    }
