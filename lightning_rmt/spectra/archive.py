"""Reading .npz files that may be damaged, foreign or half written; plain arrays only, no pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """The members of an .npz file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an archive of plain arrays, or it is damaged.
    """
    with open(path, "rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, Mapping):
                raise ValueError("it is a single array, not an archive")
            return {name: archive[name] for name in archive}
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
