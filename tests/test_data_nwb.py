"""Spike times of NWB files become counts: np.histogram agrees, and what is wrong in a file is counted and named."""

import sys

import numpy as np
import pytest
from nwb_files import poisson_units, write_nwb

from torchtitan_bio.data import nwb, rows

h5py = pytest.importorskip("h5py", reason="NWB files are read with h5py, the extra nwb")


def read(path, **settings):
    """(rows, notes) of the one file."""
    (file,) = rows.find(str(path))
    found, notes = rows.read(file, **settings)
    return list(found), notes


def histogram(times, origin_s, bins, width):
    """Each unit's, by NumPy; its last bin is closed on the right, so one more is made and left out."""
    edges = origin_s + width * np.arange(bins + 2)
    return np.stack([np.histogram(of_unit, edges)[0][:bins] for of_unit in times])


@pytest.mark.parametrize("width, kind", [(0.02, "f8"), (0.05, "f8"), (1 / 60, "f4")])
def test_a_sessions_counts_are_numpys_histogram_of_each_unit_from_its_first_spike_to_its_last(tmp_path, width, kind):
    times = [of_unit.astype(kind).astype(float) for of_unit in poisson_units()]
    (row,), notes = read(write_nwb(tmp_path / "a.nwb", times, kind=kind), bin_width_s=width, source_dataset="lab")
    everything = np.concatenate(times)
    assert row.origin_s <= everything.min() < row.origin_s + width and row.origin_s == pytest.approx(
        width * round(row.origin_s / width), abs=1e-9
    )
    last_bin = row.origin_s + width * (row.t - 1)
    assert last_bin <= everything.max() < last_bin + width
    assert (row.counts == histogram(times, row.origin_s, row.t, width)).all() and row.counts.sum() == len(everything)
    assert (row.n, row.name, row.split, row.bin_width_s, notes) == (7, "lab/m1/s1", "train", width, [])


def test_a_spike_on_an_edge_belongs_to_the_bin_that_begins_there(tmp_path):
    """0.58 / 0.02 is 28.999999999999996: floor alone would put it into bin 28."""
    edges = 0.02 * np.arange(3000)
    (row,), _ = read(write_nwb(tmp_path / "a.nwb", [edges, np.nextafter(edges[1:], 0)]), bin_width_s=0.02)
    assert row.origin_s == 0 and row.t == 3000
    assert (row.counts[0] == 1).all() and (row.counts[1] == np.append(np.ones(2999), 0)).all()
    for last in 0.02 * np.arange(1, 500):  # nor is there a bin too many or too few at the end
        for spike in (last, np.nextafter(last, 0)):
            ((_, origin_s, bins),) = nwb._whole_session([np.array([0.011, spike])], 0.02, [])[1]
            assert origin_s == 0.0 and 0.02 * (bins - 1) <= spike < 0.02 * bins
    starts = [0.58, 1.0]
    path = write_nwb(tmp_path / "b.nwb", [edges], intervals={"trials": (starts, [1.18, 1.6])})
    trials, _ = read(path, bin_width_s=0.02, interval="trials")
    assert [trial.t for trial in trials] == [30, 30]  # 0.6 s are 30 bins, though (1.18 - 0.58) / 0.02 is 29.999999999999996
    for trial, start in zip(trials, starts, strict=True):
        assert (trial.counts == histogram([edges], start, 30, 0.02)).all()


def test_each_interval_is_a_row_and_spikes_outside_of_all_are_in_none(tmp_path):
    times = poisson_units(first_s=-4.0)
    starts, stops = [-3.0, 0.13, 5.0, 5.2, 9.0, np.nan, 20.0, 12.0], [-1.0, 2.1, 5.01, 7.2, 9.5, 3.0, 25.0, 11.0]
    path = write_nwb(tmp_path / "a.nwb", times, intervals={"trials": (starts, stops), "epochs": ([0], [1])})
    found, notes = read(path, bin_width_s=0.02, interval="trials")
    assert notes == ["3 of 8 intervals hold no bin and are left out: 2, 5, 7"]
    assert [row.segment_id for row in found] == [f"trials-{number}" for number in (0, 1, 3, 4, 6)]
    for row in found:
        number = int(row.segment_id.split("-")[1])
        assert row.origin_s == starts[number] and row.t == round((stops[number] - starts[number]) / 0.02 - 0.4)
        assert (row.counts == histogram(times, row.origin_s, row.t, 0.02)).all()
    assert not found[-1].counts.any() and found[-1].t == 250  # silence is data too


def test_times_that_are_no_times_out_of_order_or_negative_are_counted_and_named(tmp_path):
    times = [[0.5, 0.1, 0.3], [], [np.nan, 0.2, np.inf], [-1.0, -0.5, 0.0, 0.65], [0.4, 0.35]]
    (row,), notes = read(write_nwb(tmp_path / "a.nwb", times), bin_width_s=0.1)
    assert notes == [
        "2 spike times are not numbers (NaN or infinite) and are left out: unit 2",
        "2 spike times are smaller than the one before and were sorted: units 0, 4",
        "2 spike times are before 0, the session's start, and are left out: unit 3",
    ]
    good = [[0.1, 0.3, 0.5], [], [0.2], [0.0, 0.65], [0.35, 0.4]]
    assert row.t == 7 and (row.counts == histogram(good, 0.0, 7, 0.1)).all()


def test_counts_above_254_are_found_with_their_bins_and_none_wraps(tmp_path):
    times = [np.repeat([0.05, 0.25], [300, 254]), np.repeat([0.05, 0.15], [255, 70_000])]
    (row,), _ = read(write_nwb(tmp_path / "a.nwb", times), bin_width_s=0.1)
    assert row.clipped_at.tolist() == [0, 0, 1]
    assert row.counts.tolist() == [[300, 0, 254], [255, 65535, 0]]


def change(path, edit):
    with h5py.File(path, "r+") as file:
        edit(file)


def drop(*names):
    def edit(file):
        for name in names:
            del file[name]

    return edit


def replace(name, value):
    def edit(file):
        del file[name]
        file[name] = value

    return edit


BROKEN = {
    "it has no units/spike_times": drop("units"),
    "it has no units/spike_times: no sorted": drop("units/spike_times"),
    "without units/spike_times_index": drop("units/spike_times_index"),
    "table of units is empty": replace("units/spike_times_index", np.zeros(0, np.uint8)),
    "does not rise to 7, the number of spike times, but ends at 9": replace("units/spike_times_index", [3, 9]),
    "does not rise to 7": replace("units/spike_times_index", [5, 3, 7]),
    "units/spike_times is not a column: it has 0 dimensions": replace("units/spike_times", 0.1),
    "units/spike_times is not a column: it has 2 dimensions": replace("units/spike_times", np.ones((7, 2))),
    "units/spike_times_index is not a column": replace("units/spike_times_index", 7),
    "intervals/trials/start_time is not a column": replace("intervals/trials/start_time", [[0.0]]),
    "general/subject/subject_id is not one text": replace("general/subject/subject_id", ["m1", "m2"]),
    "no intervals 'trials'; it has epochs": drop("intervals/trials"),
    "no intervals 'trials'; it has none": drop("intervals"),
    "intervals/trials has no column stop_time": drop("intervals/trials/stop_time"),
    "1 start times and 2 stop times": replace("intervals/trials/stop_time", [1.0, 2.0]),
    "none of its 1 intervals 'trials' is as long as a bin of 0.02 s": replace("intervals/trials/stop_time", [0.01]),
    r"trials-0 it has 50,000,000,000,000 bins of 0.02 s; a spike time": replace("intervals/trials/stop_time", [1e12]),
}


def test_a_name_in_a_list_of_one_is_that_name_and_an_empty_one_is_none(tmp_path):
    path = write_nwb(tmp_path / "a.nwb", [[0.1]])
    change(path, replace("general/subject/subject_id", [b"m1"]))
    change(path, replace("general/session_id", h5py.Empty("S1")))
    (row,) = read(path)[0]
    assert (row.subject_id, row.session_id) == ("m1", "a")


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_file_that_cannot_become_counts_is_named_with_the_reason(tmp_path, complaint):
    path = write_nwb(tmp_path / "a.nwb", [[0.1] * 3, [0.2] * 4], intervals={"trials": ([0], [1]), "epochs": ([0], [1])})
    change(path, BROKEN[complaint])
    with pytest.raises(ValueError, match=f"a.nwb cannot be read: .*{complaint}"):
        read(path, interval="trials")


def test_files_that_are_no_hdf5_hold_no_spike_or_a_time_of_years_are_named(tmp_path):
    (tmp_path / "text.nwb").write_text("spikes")
    write_nwb(tmp_path / "silent.nwb", [[], [np.nan]])
    write_nwb(tmp_path / "years.nwb", [[0.1, 1e12]])
    for name, complaint in {
        "text": "file signature",
        "silent": "none of its 2 units has a spike",
        "years": "must be wrong",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.nwb cannot be read: .*{complaint}"):
            read(tmp_path / f"{name}.nwb")
    with pytest.raises(ValueError, match="none.nwb does not exist"):
        rows.find(str(tmp_path / "none.nwb"))


def test_the_number_of_rows_is_known_before_spike_times_are_read(tmp_path, monkeypatch):
    path = write_nwb(tmp_path / "a.nwb", [[0.1]], intervals={"trials": ([0, 1, 2], [1, 2, 3])})
    monkeypatch.setattr(nwb, "_clean", None)
    (file,) = rows.find(str(path))
    assert (rows.count(file), rows.count(file, "trials")) == (1, 3)
    with pytest.raises(ValueError, match="no intervals 'blocks'"):
        rows.count(file, "blocks")


def test_without_h5py_the_package_that_is_missing_is_named(tmp_path, monkeypatch):
    path = write_nwb(tmp_path / "a.nwb", [[0.1]])
    monkeypatch.setitem(sys.modules, "h5py", None)  # importing it now raises
    with pytest.raises(ValueError, match=r"reading a.nwb needs h5py: pip install -e '\.\[nwb\]'"):
        read(path)


def test_a_folder_of_nwb_files_is_read_in_order_and_a_session_without_a_name_is_called_by_its_file(tmp_path):
    (tmp_path / "sub-b").mkdir()
    write_nwb(tmp_path / "sub-b" / "x.nwb", poisson_units(), session="")
    write_nwb(tmp_path / "a.nwb", poisson_units())
    files = rows.find(str(tmp_path))
    assert [file.name for file in files] == ["a.nwb", "x.nwb"]
    assert [row.session_id for file in files for row in rows.read(file)[0]] == ["s1", "x"]
    np.savez(tmp_path / "more.npz", spike_counts=np.ones((2, 2), int))
    with pytest.raises(ValueError, match="mixes .nwb and .npz"):
        rows.find(str(tmp_path))
