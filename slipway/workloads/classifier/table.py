"""What `ingest` found out about every file of the source, and which of them look alike, as the page shows it."""

# F files, P pairs
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slipway.errors import DataError
from slipway.workloads.classifier import images
from slipway.workloads.classifier.images import PARTS, Images

if TYPE_CHECKING:
    import pyarrow as pa

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Files:
    """The table of files, and which of them look alike."""

    data: Images
    table: pa.Table
    pairs: pa.Table

    @cached_property
    def fate(self) -> npt.NDArray[np.object_]:
        """What became of each file, [F]."""
        fate: npt.NDArray[np.object_] = self.table["fate"].to_numpy()
        return fate

    @cached_property
    def label(self) -> npt.NDArray[np.object_]:
        """Class of each file, [F]."""
        label: npt.NDArray[np.object_] = self.table["class"].to_numpy()
        return label

    @cached_property
    def ends(self) -> tuple[Ints, Ints]:
        """Files of each pair, [P] and [P]."""
        return self.pairs["first"].to_numpy(), self.pairs["second"].to_numpy()

    @cached_property
    def leaking(self) -> npt.NDArray[np.bool_]:
        """Pairs of a held-out picture and one that is, or would have been, trained on, [P]."""
        a, b = (self.fate[end] for end in self.ends)
        held, trained = PARTS[1:], ("train", "leak")
        found: npt.NDArray[np.bool_] = (np.isin(a, held) & np.isin(b, trained)) | (
            np.isin(b, held) & np.isin(a, trained)
        )
        return found


def read(folder: Path) -> Files:
    """Read the tables of `folder`.

    Raises:
        DataError: a file is missing or torn; names it.
    """
    import pyarrow.parquet

    data = images.load(folder)
    try:
        table, pairs = (pyarrow.parquet.read_table(folder / f"{name}.parquet") for name in ("files", "pairs"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: torn or incomplete ({error}); run `python -m tasks.ingest` again") from error
    return Files(data, table, pairs)
