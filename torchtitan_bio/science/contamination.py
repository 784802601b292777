"""Whether held-out recordings are in what a model was trained on, by shape and checksum, and of whose benchmark they are."""

from collections import defaultdict

from torchtitan_bio.data import ring_hmm
from torchtitan_bio.science import caveats


def warnings(train, held_out) -> list[str]:
    """What limits the scores of a model trained on `train` (a data set, or None where that is unknown), in lines."""
    of_held_out, lines = held_out.summary(), []
    if isinstance(held_out.store, ring_hmm.RingHMM):
        return lines  # its recordings are drawn independently of all others
    if train is None:
        lines.append("nothing is known of the model's training data: the held-out recordings may be among it")
    else:
        total = len(held_out.index)
        if seen := seen_again(train.index, held_out.index):
            lines.append(
                f"{len(seen):,} of {total:,} held-out recordings are in the training data, {held_out.index.id[seen[0]]} first"
            )
        if known := of_known_sessions(train.index, held_out.index):
            lines.append(
                f"{len(known):,} of {total:,} held-out recordings are of sessions that are also in the training data: their "
                "scores say little of new sessions (data.split_by=session holds whole sessions out)"
            )
        if benchmarks := caveats.sources_among(caveats.BENCHMARKS, train.summary()):
            lines.append(f"test data of public benchmarks was trained on: {benchmarks}. Scores there are contaminated")
    if benchmarks := caveats.sources_among(caveats.BENCHMARKS, of_held_out):
        lines.append(
            f"the held-out data holds recordings of public benchmarks: {benchmarks}. These are not that benchmark's scores"
        )
    return lines


def seen_again(train, held_out) -> list[int]:
    """The rows of one index of which bins are in the other: the same counts, by checksum and neurons, at the same place."""
    stretches = defaultdict(list)
    for checksum, n, first, t in _stretches(train):
        stretches[checksum, n].append((first, first + t))
    return [
        row
        for row, (checksum, n, first, t) in enumerate(_stretches(held_out))
        if checksum and any(begin < first + t and first < end for begin, end in stretches.get((checksum, n), ()))
    ]


def _stretches(index):
    return zip(*(column.tolist() for column in (index.checksum, index.n, index.first_bin, index.t)), strict=True)


def of_known_sessions(train, held_out) -> list[int]:
    """The rows of one index whose session the other has too, of those that name a subject or a session."""
    known = set(_sessions(train))
    return [row for row, name in enumerate(_sessions(held_out)) if any(name[1:]) and name in known]


def _sessions(index):
    return zip(index.source_dataset, index.subject_id, index.session_id, strict=True)
