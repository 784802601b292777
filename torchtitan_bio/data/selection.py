"""Which rows of an index are used: the split, the sources, the bound on rows that cannot be read."""

from collections import Counter
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from torchtitan_bio.data import keyed

TEST_SHARE_OF_SESSIONS = 0.01
SPLIT_BY = ("given", "session", "time")


def split_rows(index, split, split_by):
    """The rows of `split`. given: all. session: 1% of sessions, by a hash of subject and session, are test, the others train;
    no session is in both. time: the last fifth of each row's bins is test, the rest train; of a row of fewer than five bins all
    is train."""
    if split_by == "given":
        return index
    if split not in ("train", "test"):
        raise ValueError(f"data.split_by={split_by!r} makes the splits train and test, not {split!r}")
    if split_by == "time":
        cut = index.t - index.t // 5
        return index.between(0 * cut, cut) if split == "train" else index.between(cut, index.t)
    keys = group_keys(index, "session")
    is_test = keys < np.uint64(TEST_SHARE_OF_SESSIONS * 2**64)
    rows = np.flatnonzero(is_test == (split == "test"))
    if not len(rows):
        sessions = number_of(len(set(keys.tolist())), "session")
        raise ValueError(
            f"data.split_by='session' leaves no recording for {split!r}: of {sessions} none falls on that side "
            f"of {TEST_SHARE_OF_SESSIONS:.0%}. Use data.split_by='time' for few sessions"
        )
    return index.take(rows)


def group_keys(index, by):
    """A number below 2^64 for each row, by a hash of its subject, of its subject and session, or of its own name. It depends on
    nothing else, so a row keeps its side when others come or go."""
    names = {
        "subject": index.subject_id,
        "session": [f"{subject}/{session}" for subject, session in zip(index.subject_id, index.session_id, strict=True)],
        "row": index.id,
    }[by]
    return np.array([keyed.text_key(name) for name in names], dtype=np.uint64)


def draw_splits(index, by, *, test, validation=0.0):
    """The split of each row: those whose key lies in the lowest `test` of all keys are test, those in the next `validation` are
    validation, the rest train. ValueError where a row does not name what it is told by, or where a split that is asked for gets
    none."""
    if by == "subject" and not all(index.subject_id):
        raise ValueError(f"{_unnamed(index, index.subject_id)} name no subject; divide them by session or row")
    if by == "session" and not all(index.session_id):
        raise ValueError(f"{_unnamed(index, index.session_id)} name no session; divide them by subject or row")
    at = group_keys(index, by) * 2.0**-64
    splits = np.where(at < test, "test", np.where(at < test + validation, "validation", "train"))
    for name, share in (("test", test), ("validation", validation), ("train", 1 - test - validation)):
        if share > 0 and name not in splits:
            places = sorted(set(at.tolist()))
            rest = f" and {len(places) - 12} more" if len(places) > 12 else ""
            raise ValueError(
                f"by {by}, of {number_of(len(places), by)} none falls into {name!r} ({share:.3g} of all). In order of their "
                f"keys they lie at {', '.join(f'{place:.3f}' for place in places[:12])}{rest}"
                ": choose shares that part these, test from 0 up and validation after it"
            )
    return splits.tolist()


def _unnamed(index, names):
    return f"{sum(not name for name in names):,} of {number_of(len(index), 'row')}"


def keep_sources(index, include, exclude):
    """Rows whose source_dataset matches any of `include` (empty: all) and none of `exclude`; patterns as in a shell."""
    present = Counter(index.source_dataset)
    for name, patterns in (("include_sources", include), ("exclude_sources", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(source, pattern) for source in present):
                raise ValueError(f"data.{name}: {pattern!r} matches no source_dataset{_nearest(pattern, present)}")
    kept = {
        source
        for source in present
        if (not include or any(fnmatchcase(source, pattern) for pattern in include))
        and not any(fnmatchcase(source, pattern) for pattern in exclude)
    }
    if not kept:
        raise ValueError(
            f"data.include_sources={list(include)} and data.exclude_sources={list(exclude)} leave nothing{_list(present)}"
        )
    return index.take([row for row, source in enumerate(index.source_dataset) if source in kept])


def drop_malformed(index, max_malformed_rows):
    """(good rows, [(id, reason)]). More bad rows than allowed are an error that names the first ten."""
    malformed = [(name, fault) for name, fault in zip(index.id, index.fault, strict=True) if fault]
    if len(malformed) > max_malformed_rows:
        lines = [f"  {name}: {fault}" for name, fault in malformed[:10]]
        if len(malformed) > 10:
            lines.append(f"  ... and {len(malformed) - 10} more")
        raise ValueError(
            f"{len(malformed)} malformed of {number_of(len(index), 'row')}, data.max_malformed_rows={max_malformed_rows}:\n"
            + "\n".join(lines)
            + "\nMend them"
            + (f", or leave them out with data.max_malformed_rows={len(malformed)}" if len(malformed) < len(index) else "")
        )
    return index.take([row for row, fault in enumerate(index.fault) if not fault]), malformed


def row_weights(index, source_weights):
    """A weight for each row, or None when all are 1."""
    present = Counter(index.source_dataset)
    for source, weight in source_weights.items():
        if source not in present:
            raise ValueError(f"data.source_weights: no recording is of {source!r}{_nearest(source, present)}")
        if not 0 <= weight < 1e6:
            raise ValueError(
                f"data.source_weights: {source} = {weight}; a weight is 0 (left out), 1 (as it is) or any number from 0 up"
            )
    weights = np.array([float(source_weights.get(source, 1.0)) for source in index.source_dataset])
    if not weights.any():
        raise ValueError("data.source_weights leave nothing: all are 0")
    return None if (weights == 1).all() else weights


def number_sessions(index):
    """An int per row, equal for rows of one (source_dataset, subject_id, session_id) and neuron count: their neurons are the
    same. A row that names neither subject nor session is a session of its own."""
    numbers = {}
    keys = zip(index.source_dataset, index.subject_id, index.session_id, index.n.tolist(), range(len(index)), strict=True)
    return np.array(
        [numbers.setdefault((*named, n) if named[1] or named[2] else row, len(numbers)) for *named, n, row in keys],
        dtype=np.int64,
    )


def stored_twice(index):
    """The ids of recordings that the index holds more than once, with the same counts."""
    rows = zip(index.id, index.n.tolist(), index.t.tolist(), index.checksum.tolist(), strict=True)
    return [name for (name, *_), times in Counter(rows).items() if times > 1]


def number_of(num, noun):
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def _nearest(name, present):
    near = get_close_matches(name, present, n=1)
    return f"; did you mean {near[0]!r}?" if near else _list(present)


def _list(present):
    shown = ", ".join(repr(source) for source in sorted(present)[:10])
    return f". There {'are' if len(present) > 1 else 'is'} {shown}{' and more' if len(present) > 10 else ''}"
