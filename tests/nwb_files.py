"""NWB files as labs have them, made by h5py alone: the part of the format that is read."""

import numpy as np


def write_nwb(path, times, *, intervals=None, subject="m1", session="s1", kind="f8"):
    """times: of each unit, in seconds. intervals: {name: (starts, stops)}."""
    import h5py

    with h5py.File(path, "w") as file:
        file["general/subject/subject_id"] = subject
        if session:
            file["general/session_id"] = session
        file["units/id"] = np.arange(len(times))
        file["units/spike_times"] = np.concatenate([np.asarray(of_unit, kind) for of_unit in [*times, []]])
        ends = np.cumsum([len(of_unit) for of_unit in times])
        # hdmf takes the smallest unsigned type that holds the number of spikes.
        file["units/spike_times_index"] = ends.astype(np.min_scalar_type(int(ends[-1])) if len(times) else np.uint8)
        for name, (starts, stops) in (intervals or {}).items():
            file[f"intervals/{name}/start_time"] = np.asarray(starts, float)
            file[f"intervals/{name}/stop_time"] = np.asarray(stops, float)
    return path


def poisson_units(num_units=7, seconds=20.0, seed=0, first_s=3.0):
    """Sorted times, of rates from silence to 60 spikes a second."""
    rng = np.random.default_rng(seed)
    rates = np.linspace(0, 60, num_units)
    return [np.sort(rng.uniform(first_s, first_s + seconds, rng.poisson(rate * seconds))) for rate in rates]
