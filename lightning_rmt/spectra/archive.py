"""Reading .npz files that may be damaged, foreign or half written; plain arrays only, no pickle."""

from __future__ import annotations

import zipfile
import zlib
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
            if not zipfile.is_zipfile(file):  # NumPy would advise to allow pickles
                raise ValueError("it is not an .npz archive, or not a whole one")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            return {name: archive[name] for name in archive}
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise ValueError(f"{path} is not a saved spectrum or reading: {error}") from error
