"""What a score is summed over, and what its standard error takes as independent.

Sums are kept by cell: a session in a run's own validation, a recording or a stretch of one where standard errors are wanted. A
cell lies in one group (a source_dataset, say), which has scores of its own, and in one population: the neurons that share a
null, which are those of a session with all its rows.
"""

from dataclasses import dataclass

import numpy as np

GROUPINGS = ("source_dataset", "subject", "session", "recording")
ENOUGH_RECORDINGS = 10
"""A group of so many recordings is judged by how they differ; of fewer, by how stretches of them do."""
STRETCHES = 20
"""Of consecutive windows in such a group, together. Neighbouring windows are alike, and one by one they would make an error far
too small; docs/evaluation.md has a figure."""


@dataclass(frozen=True, kw_only=True)
class Units:
    groups: list[str]
    group: np.ndarray
    """The group's number, of each cell. The next two are of each cell too."""
    populations: list[tuple[int, int]]
    """(session, neurons)."""
    population: np.ndarray
    row: np.ndarray
    """Its recording; of a session one of them."""
    first_cell: np.ndarray
    """Of each recording."""
    bins_a_cell: np.ndarray
    """Of each recording: a window that begins within the first so many bins of a block is in its first cell, and so on."""
    bins_a_block: np.ndarray
    """Of each recording: a block is a stretch of all recordings together, and a whole number of cells."""

    def cell(self, origin) -> int:
        """Of a window by its origin, (row, first bin)."""
        row, begin = origin
        block, inside = divmod(begin, self.bins_a_block[row])
        cells_a_block = -(-self.bins_a_block[row] // self.bins_a_cell[row])
        return int(self.first_cell[row] + block * cells_a_block + inside // self.bins_a_cell[row])

    def clusters(self, cells) -> tuple[str, np.ndarray]:
        """(what is taken as independent among these cells of one group or all, the cluster of each).

        Cells are as fine as their group wants. All together are of more recordings, each in fewer and longer stretches, and an
        error by the cells would depend on how they are grouped: so neighbours are merged.
        """
        row = self.row[cells]
        num_recordings = len(np.unique(row))
        if num_recordings >= ENOUGH_RECORDINGS:
            return "recordings", row
        first, num_cells = self.first_cell[row], np.bincount(self.row, minlength=len(self.first_cell))[row]
        merged = -(-num_cells // stretches_of(num_recordings))
        return "stretches of consecutive windows", first + (cells - first) // merged


def by_session(dataset) -> Units:
    """A cell for each session: the least that scores can be made of. Groups are the source_datasets."""
    populations = populations_of(dataset)
    distinct, first_row, cell = np.unique(populations, axis=0, return_index=True, return_inverse=True)
    groups, group = np.unique(dataset.index.source_dataset, return_inverse=True)
    return Units(
        groups=groups.tolist(),
        group=group[first_row],
        populations=[tuple(each) for each in distinct.tolist()],
        population=np.arange(len(distinct)),
        row=first_row,
        first_cell=cell.reshape(-1),
        bins_a_cell=np.full(len(populations), np.iinfo(np.int64).max),
        bins_a_block=np.full(len(populations), np.iinfo(np.int64).max),
    )


def by_recording(dataset, by: str = "source_dataset") -> Units:
    """Cells from which standard errors can be told, for an evaluation set; groups by one of GROUPINGS."""
    windows = dataset.windows
    distinct, population = np.unique(populations_of(dataset), axis=0, return_inverse=True)
    groups, group = np.unique(labels(dataset.index, by), return_inverse=True)
    is_read = windows.num_windows > 0
    of_group = stretches_of(np.bincount(group[is_read], minlength=len(groups)))[group]
    of_all = stretches_of(is_read.sum())
    windows_a_block = np.maximum(1, -(-windows.num_windows // of_all))
    windows_a_cell = -(-windows_a_block // (of_group // of_all))
    blocks, rest = np.divmod(windows.num_windows, windows_a_block)
    num_cells = blocks * -(-windows_a_block // windows_a_cell) + -(-rest // windows_a_cell)
    row = np.repeat(np.arange(len(num_cells)), num_cells)
    return Units(
        groups=groups.tolist(),
        group=group[row],
        populations=[tuple(each) for each in distinct.tolist()],
        population=population.reshape(-1)[row],
        row=row,
        first_cell=np.cumsum(num_cells) - num_cells,
        bins_a_cell=windows_a_cell * windows.stride,
        bins_a_block=windows_a_block * windows.stride,
    )


def stretches_of(num_recordings):
    """Into how many stretches each of so many recordings is cut."""
    return np.where(num_recordings >= ENOUGH_RECORDINGS, 1, -(-STRETCHES // np.maximum(1, num_recordings)))


def populations_of(dataset) -> np.ndarray:
    """(session, neurons) of each recording. Rows of another width are other neurons."""
    widths = [dataset.width(row) - 1 for row in range(len(dataset.index.id))]
    return np.stack([dataset.session, np.array(widths)], axis=1)


def labels(index, by: str) -> list[str]:
    """The name of each recording's group."""
    if by not in GROUPINGS:
        raise ValueError(f"by={by!r}; there are {', '.join(GROUPINGS)}")
    if by == "recording":
        return list(index.id)
    columns = (index.source_dataset, index.subject_id, index.session_id)[: 1 + GROUPINGS.index(by)]
    return ["/".join(filter(None, names)) for names in zip(*columns, strict=True)]


def standard_error(numerators, denominators, clusters) -> float | None:
    """Of sum(numerators) / sum(denominators), as a ratio of sums over clusters that are drawn independently (the sandwich).

    None where there are fewer than two clusters.
    """
    total = denominators.sum()
    if not total:
        return None
    ratio = numerators.sum() / total
    _, place = np.unique(clusters, return_inverse=True)
    spread = np.bincount(place, numerators - ratio * denominators)
    if len(spread) < 2:
        return None
    return float(np.sqrt((spread**2).sum() * len(spread) / (len(spread) - 1)) / abs(total))
