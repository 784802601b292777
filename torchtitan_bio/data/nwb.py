"""Spike times of NWB files, counted in bins of equal width.

NWB is HDF5. `units/spike_times` holds the times of all units one after another, in seconds, and `units/spike_times_index` where
each unit's end. A file becomes one recording from its first spike to its last, or one for each entry of a table of intervals.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchtitan_bio.data import sources

MOST_COUNTS = 2**34  # of one recording; beyond it, a time that is no time is likelier than a session of months
WHOLE = (
    1e-6  # of a bin may be missing from an interval's last one: stop - start is seldom a multiple of the width to the last bit
)


@dataclass(frozen=True)
class Session:
    """`times` are each unit's, ascending, in seconds; `notes` say what was not as it should be, in words."""

    subject_id: str
    session_id: str
    times: list[np.ndarray]
    stretches: list[tuple[str, float, int]]
    """(segment, origin in seconds, bins) of each recording to be made."""
    notes: list[str]


def open_file(path: Path):
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"reading {path.name} needs h5py: pip install -e '.[nwb]'") from error
    return h5py.File(path, "r")


def count_recordings(path: Path, interval: str = "") -> int:
    """How many `read_session` will find at most, from the tables' sizes alone; ValueError where there are no units."""
    with sources.reading(path), open_file(path) as file:
        _unit_ends(file)
        return len(_interval(file, interval)[0]) if interval else 1


def read_session(path: Path, *, bin_width_s: float, interval: str = "") -> Session:
    """Spike times as they are to be counted: finite, in order, and where no interval says otherwise not before zero."""
    with sources.reading(path), open_file(path) as file:
        ends = _unit_ends(file)
        times = np.split(np.asarray(_column(file, "units/spike_times")[()], np.float64), ends[:-1])
        subject, session = (_text(file, name) for name in ("general/subject/subject_id", "general/session_id"))
        table = _interval(file, interval) if interval else None
    times, notes = _clean(times)
    with sources.reading(path):
        if table is None:
            times, stretches = _whole_session(times, bin_width_s, notes)
        else:
            stretches = _stretches(*table, interval, bin_width_s, notes)
        for segment, _, bins in stretches:
            if bins * len(times) > MOST_COUNTS:
                raise ValueError(
                    f"{segment or 'from its first spike to its last'} it has {bins:,} bins of {bin_width_s} s; a spike time or "
                    f"an interval must be wrong, or the bins too narrow. Mend it, or take parts of the session with --interval"
                )
    return Session(subject, session or path.stem, times, stretches, notes)


def count_spikes(times: list[np.ndarray], origin_s: float, bins: int, bin_width_s: float) -> np.ndarray:
    """Counts (units, bins), uint16: bin k has the spikes with origin + k * width <= time < origin + (k + 1) * width.

    The edges are compared as they are, since floor((time - origin) / width) puts some spikes on an edge into the bin before.
    """
    edges = origin_s + bin_width_s * np.arange(bins + 1)
    counts = np.empty((len(times), bins), np.uint16)
    for unit, all_times in enumerate(times):
        first, last = np.searchsorted(all_times, edges[[0, -1]])
        at = np.searchsorted(edges, all_times[first:last], side="right") - 1
        counts[unit] = np.minimum(np.bincount(at, minlength=bins), np.iinfo(np.uint16).max)
    return counts


def _unit_ends(file) -> np.ndarray:
    """Where each unit's spike times end."""
    if "units" not in file or "spike_times" not in file["units"]:
        raise ValueError("it has no units/spike_times: no sorted units are in this file")
    if "spike_times_index" not in file["units"]:
        raise ValueError("it has units/spike_times without units/spike_times_index, which says whose they are")
    total = len(_column(file, "units/spike_times"))
    ends = _column(file, "units/spike_times_index")[()].astype(np.int64)  # as small a type as holds them, often uint8
    if not len(ends):
        raise ValueError("its table of units is empty")
    if ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != total:
        raise ValueError(
            f"units/spike_times_index does not rise to {total:,}, the number of spike times, but ends at {ends[-1]:,}"
        )
    return ends


def _interval(file, name):
    """(starts, stops) of a table of intervals, in seconds."""
    tables = sorted(file["intervals"]) if "intervals" in file else []
    if name not in tables:
        raise ValueError(f"it has no intervals {name!r}; it has {', '.join(tables) or 'none'}")
    columns = []
    for column in ("start_time", "stop_time"):
        if column not in file["intervals"][name]:
            raise ValueError(f"intervals/{name} has no column {column}")
        columns.append(np.asarray(_column(file, f"intervals/{name}/{column}")[()], np.float64))
    if len(columns[0]) != len(columns[1]):
        raise ValueError(f"intervals/{name} has {len(columns[0])} start times and {len(columns[1])} stop times")
    return columns


def _column(file, name):
    """A data set of one dimension."""
    dimensions = getattr(file[name], "ndim", "no")  # a group has none
    if dimensions != 1:
        raise ValueError(f"{name} is not a column: it has {dimensions} dimensions, not 1")
    return file[name]


def _text(file, name) -> str:
    if name not in file or getattr(file[name], "shape", ()) is None:  # not there, or written as an empty one
        return ""
    if getattr(file[name], "size", 0) != 1:
        raise ValueError(f"{name} is not one text")
    value = np.asarray(file[name][()], object).item()
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _clean(times):
    """(each unit's finite times in order, notes on what was neither)."""
    notes, lost, unsorted, clean = [], {}, {}, []
    for unit, of_unit in enumerate(times):
        finite = np.isfinite(of_unit)
        if not finite.all():
            lost[unit] = int(np.count_nonzero(~finite))
            of_unit = of_unit[finite]
        if backwards := int(np.count_nonzero(np.diff(of_unit) < 0)):
            unsorted[unit] = backwards
            of_unit = np.sort(of_unit)
        clean.append(of_unit)
    if lost:
        notes.append(f"{sum(lost.values()):,} spike times are not numbers (NaN or infinite) and are left out: {_units(lost)}")
    if unsorted:
        notes.append(
            f"{sum(unsorted.values()):,} spike times are smaller than the one before and were sorted: {_units(unsorted)}"
        )
    return clean, notes


def _whole_session(times, bin_width_s, notes):
    """(times from zero on, the one stretch from the bin of the first to that of the last)."""
    negative = {unit: int(np.searchsorted(of_unit, 0.0)) for unit, of_unit in enumerate(times)}
    negative = {unit: number for unit, number in negative.items() if number}
    if negative:
        notes.append(
            f"{sum(negative.values()):,} spike times are before 0, the session's start, and are left out: {_units(negative)}"
        )
        times = [of_unit[negative.get(unit, 0) :] for unit, of_unit in enumerate(times)]
    if not any(map(len, times)):
        raise ValueError(f"none of its {len(times)} units has a spike" + (f"; {notes[-1]}" if notes else ""))
    first, last = (edge(of_unit[place] for of_unit in times if len(of_unit)) for edge, place in ((min, 0), (max, -1)))
    origin_s = _bin_of(first, 0.0, bin_width_s) * bin_width_s
    return times, [("", origin_s, _bin_of(last, origin_s, bin_width_s) + 1)]


def _bin_of(time_s, origin_s, bin_width_s) -> int:
    """The bin that has the time by its edges, which a division may miss by one."""
    at = int((time_s - origin_s) // bin_width_s)
    return at + int(origin_s + (at + 1) * bin_width_s <= time_s) - int(origin_s + at * bin_width_s > time_s)


def _stretches(starts, stops, name, bin_width_s, notes):
    stretches, too_short = [], []
    for number, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        bins = (stop - start) / bin_width_s + WHOLE
        if np.isfinite(bins) and bins >= 1:
            stretches.append((f"{name}-{number}", start, int(bins)))
        else:
            too_short.append(number)
    if too_short:
        notes.append(f"{len(too_short):,} of {len(starts):,} intervals hold no bin and are left out: {_first(too_short)}")
    if not stretches:
        raise ValueError(f"none of its {len(starts):,} intervals {name!r} is as long as a bin of {bin_width_s} s")
    return stretches


def _units(numbers) -> str:
    return f"unit{'' if len(numbers) == 1 else 's'} {_first(list(numbers))}"


def _first(numbers) -> str:
    return ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
