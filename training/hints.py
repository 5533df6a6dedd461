"""The second picture of each row: a sketch, a depth map, what is to be edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .index import IN_MEMORY, SAME_SHAPE, threaded
from .pictures import decode, dimensions, one_line
from .sources import Split, open_split
from .tables import Beside, DataError, Table

if TYPE_CHECKING:
    from .data import Rows


class Hints:
    """Called with rows of one bucket: their second pictures, uint8 (B, 3, H, W), cut as the first ones are.

    Args:
        rows: as ``open_rows`` gives them for ``split``.
        column: of the sources, beside their column of pictures, as ``data.mask_column`` is: in an imagefolder's
            metadata its ``…_file_name``, in tars an ending.
        suffix: in an imagefolder, the ending that takes the place of the picture's, as in ``-edges.png``.
        check: look at the header of each.
    Raises:
        DataError: a source has no such column; a row has no second picture, or one of another shape.
    """

    def __init__(
        self,
        rows: Rows,
        column: str | None = None,
        suffix: str | None = None,
        *,
        split: Split = "train",
        check: bool = True,
    ):
        if (column is None) == (suffix is None):
            raise DataError("hints: expected a column or a suffix, by which the second pictures are found")
        self.rows, self.beside = rows, None if suffix is None else Beside(suffix, text=False)
        self.tables = [] if column is None else _tables(rows, column, split)
        if check:
            self._check()

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Raises DataError where one no longer decodes, naming its row."""
        height, width = self.rows.shape(indices)
        out = np.empty((len(indices), 3, height, width), np.uint8)

        def fill(place: int) -> None:
            index = indices[place]
            try:
                out[place] = decode(self.encoded(index), (height, width), self.rows.center_crop)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.rows.name(index)}: its second picture {one_line(error)}; mend it") from error

        threaded(fill, len(indices))
        return torch.from_numpy(out)

    def encoded(self, index: int) -> bytes:
        """As it is in the source. Raises OSError or ValueError."""
        if self.beside is None:
            found = self.tables[int(self.rows._table[index])].mask(int(self.rows._row[index]))
            if found is None:
                raise ValueError("is missing")
            return found
        table, row = self.rows._at(index)
        path = table.path(row)
        if path is None:
            raise ValueError("has no file to be beside; name a column in the place of a suffix")
        found = self.beside(path)
        if found is None:
            raise ValueError(f"{self.beside.file(path).name} is missing")
        return found

    def _check(self) -> None:
        wrong: dict[int, str] = {}

        def look(index: int) -> None:
            own = tuple(int(x) for x in self.rows.sizes[index])
            try:
                height, width = dimensions(self.encoded(index))
            except (OSError, ValueError) as error:
                wrong[index] = one_line(error)
                return
            if abs(height * own[1] / (width * own[0]) - 1) > SAME_SHAPE:
                wrong[index] = f"is {width} × {height}, of another shape than the picture, {own[1]} × {own[0]}"

        threaded(look, len(self.rows))
        if wrong:
            first = min(wrong)
            raise DataError(
                f"{self.rows.name(first)}: its second picture {wrong[first]}; {len(wrong)} of {len(self.rows)} rows "
                "have none that can be used. Mend them, or take the rows out"
            )


def _tables(rows: Rows, column: str, split: Split) -> list[Table]:
    """The sources once more, with the column in the place of their masks: rows have the same numbers."""
    found, data = [], rows.data.model_copy(update={"mask_suffix": None})
    for place, table in zip(rows.data.places, rows._tables, strict=True):
        told = place.model_copy(update={"caption_column": None, "mask_column": column})
        own = open_split(told, data, split, IN_MEMORY)[0]
        if len(own) != len(table):
            raise DataError(f"{place.path}: {len(own)} second pictures in {column!r} for {len(table)} rows")
        found.append(own)
    return found
