"""Spiking recordings as a language: 256 tokens, 255 separates the bins and 0 .. 254 are spike counts.

A recording of n neurons reads [255, y_0, .., y_{n-1}, 255, ...]; there are no neuron names and no end marker. `build` makes the
dataset: an endless sequence whose sample i is a pure function of (fingerprint, seed, i).
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from torchtitan_bio.data import keyed, packing, ring_hmm, selection, sources, summary
from torchtitan_bio.data.batch import IGNORED, Batch
from torchtitan_bio.data.recordings import LARGEST_COUNT, Recordings, decode
from torchtitan_bio.data.selection import number_of
from torchtitan_bio.data.store import Store

SEPARATOR = 255
CODEC = "bin-separator-255, counts to 254"
MODES = ("stream", "aligned", "legacy")
BLOCK_TOKENS = 2**17  # transposed at a time, so that a block stays in the cache between its two copies
DIRECT_TOKENS = 2**14
CROP, SESSION_CROP = 4, 5  # names of random streams, beside those of packing


@dataclass(frozen=True)
class Sample:
    """seq_len + 1 tokens. Positions [labels[0], labels[1]) are predicted, each from the one before it, but for `starts`: there
    a recording begins, and nothing of it precedes."""

    tokens: np.ndarray
    labels: tuple[int, int]
    starts: list[int]
    origin: tuple[int, int]


class Spikes:
    """Windows of recordings. `index` has a row for each recording in use, `session` its session's number; `malformed` are the
    rows that cannot be read, `not_scored` those too wide for a window and `skipped` the files left out, as (name, reason);
    `clipped` counts, by source, what was read as 254; `about` says in words of the settings what this is."""

    vocab_size = 256
    scorer = "torchtitan_bio.science.scores:SpikeScores"
    headline = "bits_per_spike"
    ladder = "torchtitan_bio.science.ladder:show"
    sampler = "torchtitan_bio.science.training_samples:TrainingSamples"
    run_report = "torchtitan_bio.science.report:write"

    def __init__(
        self,
        store,
        index,
        windows,
        fingerprint,
        *,
        mode,
        seq_len,
        seed,
        num_neurons,
        cross_recordings,
        malformed,
        not_scored,
        skipped,
        about,
    ):
        self.about = about
        self.store, self.index, self.windows, self.fingerprint = store, index, windows, fingerprint
        self.mode, self.seq_len, self.seed, self.num_neurons = mode, seq_len, seed, num_neurons
        self.cross_recordings, self.malformed, self.not_scored, self.skipped = cross_recordings, malformed, not_scored, skipped
        self.session = selection.number_sessions(index)
        self.clipped = Counter()
        for source, clipped in zip(index.source_dataset, index.clipped.tolist(), strict=True):
            self.clipped.update({source: clipped} if clipped else {})

    def __len__(self):
        """Samples in an epoch (in the first, where fractional source_weights make epochs differ)."""
        return len(self.windows)

    def width(self, row):
        """Tokens a bin: the separator and the neurons in use."""
        return 1 + (int(self.index.n[row]) if self.num_neurons is None else min(int(self.index.n[row]), self.num_neurons))

    def neurons(self, row, epoch=None):
        """Which neurons of a row are used, ascending; None for all. Training draws them by (seed, epoch, row). Evaluation and
        `counts` (no epoch) draw them by (seed, session), so that a neuron is the same one in all rows of its session."""
        n = int(self.index.n[row])
        if self.num_neurons is None or n <= self.num_neurons:
            return None
        keys = (self.seed, SESSION_CROP, self._session_key(row)) if epoch is None else (self.seed, CROP, epoch, row)
        return np.sort(keyed.order(n, *keys)[: self.num_neurons])

    def _session_key(self, row):
        parts = (self.index.source_dataset, self.index.subject_id, self.index.session_id)
        return keyed.text_key("/".join(part[row] for part in parts))

    def counts(self, row):
        """(neurons, bins) of a whole recording as uint8, at most 254."""
        return self._block(row, 0, int(self.index.t[row]), self.neurons(row))

    def _block(self, row, begin, end, neurons):
        block = self.store.block(self.index, row, begin, end)
        if neurons is not None:
            block = block[neurons]
        return decode(block, self.index.clipped[row])

    def _write_tokens(self, row, begin, end, neurons, out):
        """Tokens [begin, end) of a row into out."""
        width = self.width(row)
        first_bin, last_bin = begin // width, -(-end // width)
        block_bins = BLOCK_TOKENS // width + 2  # a window of BLOCK_TOKENS is one block, with the two bins that it cuts
        for at in range(first_bin, last_bin, block_bins):
            stop = min(at + block_bins, last_bin)
            block = self._block(row, at, stop, neurons)
            cuts_first, cuts_last = at * width < begin, stop * width > end
            if cuts_first:
                skipped = begin - at * width
                part = block[skipped - 1 : end - at * width - 1, 0]
                out[: len(part)] = part
            if cuts_last and not (cuts_first and stop - at == 1):
                part = block[: end - (stop - 1) * width - 1, -1]
                out[(stop - 1) * width - begin] = SEPARATOR
                out[end - begin - len(part) : end - begin] = part
            first, last = at + cuts_first, stop - cuts_last
            if first < last:
                whole_bins = out[first * width - begin : last * width - begin].reshape(-1, width)
                _transpose(block[:, first - at : last - at], whole_bins)

    def origin(self, i):
        """(row, offset) of sample i without reading it; what `describe` puts in words."""
        return self.windows.window(i).origin

    def sample(self, i):
        window = self.windows.window(i)
        tokens, at, starts = np.empty(self.seq_len + 1, np.uint8), 0, []
        epoch = None if getattr(self.windows, "overlap", False) else window.epoch
        for row, begin, end in window.pieces:
            if begin == 0 and self.mode != "legacy":
                starts.append(at)
            try:
                self._write_tokens(row, begin, end, self.neurons(row, epoch), tokens[at : at + end - begin])
            except Exception as error:  # the sample's origin names its first recording only
                raise RuntimeError(f"recording {self.index.id[row]} (row {row}): {type(error).__name__}: {error}") from error
            at += end - begin
        tokens[at:] = SEPARATOR
        return Sample(tokens, window.labels, starts, window.origin)

    def collate(self, samples):
        """tokens uint8 and labels int16 (B, seq_len), shifted against each other here and nowhere else; cu_seqlens."""
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        labels = tokens[:, 1:].to(torch.int16)
        boundaries, inner, num_targets = [], False, 0
        for number, sample in enumerate(samples):
            begin, end = sample.labels
            firsts = [start for start in sample.starts if begin <= start < end]
            labels[number, : begin - 1] = IGNORED
            labels[number, end - 1 :] = IGNORED
            if firsts:
                labels[number, [start - 1 for start in firsts]] = IGNORED
            num_targets += end - begin - len(firsts)
            within = [start for start in sample.starts if 0 < start < self.seq_len]
            boundaries += [number * self.seq_len + start for start in (0, *within)]
            inner = inner or bool(within)
        packed = inner and not self.cross_recordings
        inputs = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": labels,
            "cu_seqlens": torch.tensor([*boundaries, len(samples) * self.seq_len], dtype=torch.int32) if packed else None,
        }
        return Batch(inputs, {"next_token": num_targets}, [sample.origin for sample in samples])

    def describe(self, origin):
        row, offset = origin
        bins = offset if self.mode == "aligned" else offset // self.width(row)
        source, name = self.index.source_dataset[row], self.index.id[row]
        return f"{name if name.startswith(source) else f'{source} {name}'} (row {row}) from bin {bins}"

    def report(self):
        """What a person should know of the recordings, in lines."""
        index = self.index
        least, most = int(index.n.min()), int(index.n.max())
        lines = [
            f"data: {number_of(len(index), 'recording')} of {'' if least == most else f'{least:,} to '}"
            f"{number_of(most, 'neuron')}, {number_of(int((index.n * index.t).sum()), 'count')}, "
            f"{number_of(len(set(index.source_dataset)), 'source')}, split {self.fingerprint['split']}, "
            f"{number_of(len(self), 'window')} an epoch ({self.mode})"
        ]
        lines += [_some("file", "left out", self.skipped)] if self.skipped else []
        if twice := selection.stored_twice(index):
            lines.append(_some("recording", "stored more than once under one name, with the same counts", twice))
        lines += [f"data: malformed and left out: {name}: {reason}" for name, reason in self.malformed]
        if self.not_scored:
            lines.append(_some("row", "too wide for a window", self.not_scored))
        if self.clipped:
            clipped = ", ".join(f"{count:,} of {source}" for source, count in self.clipped.items())
            lines.append(f"data: counts above {LARGEST_COUNT} are read as {LARGEST_COUNT}: {clipped}")
        return lines

    def summary(self):
        """What goes with a model into the world, as JSON: where recordings come from, and how many there are of each source.
        Counts and tokens are of the neurons in use. No count is read for it."""
        widths = np.array([self.width(row) for row in range(len(self.index))])
        return self.about | {
            "mode": self.fingerprint["mode"],
            "codec": CODEC,
            "num_neurons": "all" if self.num_neurons is None else self.num_neurons,
            "malformed": len(self.malformed),
            "too_wide": len(self.not_scored),
            "files_left_out": len(self.skipped),
            **summary.summarize(self.index, widths * self.index.t),
        }


def build(
    *,
    source,
    seq_len,
    split="train",
    split_by="given",
    mode="stream",
    seed=0,
    shuffle_rows=256,
    cross_recordings=False,
    include_sources=(),
    exclude_sources=(),
    source_weights=None,
    num_neurons="all",
    max_malformed_rows=0,
    index_folder=None,
    overlap=False,
    heed=lambda: None,
):
    """The dataset that the settings of [data] describe. With `overlap` (mode aligned) it is the finite set for evaluation, in
    which each count is scored once and source_weights have no say.

    The index of large files is kept in the user's cache, or that of any files in `index_folder` where one is named. The process
    that builds first does the work: one pass over the data. The others read what it left. heed: see Recordings.
    """
    _check(mode, split_by, overlap, source_weights, num_neurons)
    found = find(source, split, split_by)
    store = Recordings(found, index_folder, heed) if isinstance(found, list) else found
    index = store.index()
    if not len(index):
        raise ValueError(f"{source} has no rows in split {split!r}")
    index = selection.keep_sources(index, include_sources, exclude_sources)
    index, malformed = selection.drop_malformed(index, max_malformed_rows)
    index = selection.split_rows(index, split, split_by)
    if split_by == "time":  # until here they are clips of whole rows, train and test together
        index = replace(index, clipped=store.count_clipped(index))
    if not len(index):
        raise ValueError(f"{source} has no readable recording in split {split!r} by {split_by}")
    crop = None if num_neurons == "all" else num_neurons
    n = index.n if crop is None else np.minimum(index.n, crop)
    weights = None if overlap else selection.row_weights(index, source_weights or {})
    draws = packing.Draws(len(index), seed=seed, weights=weights)
    not_scored = []
    if mode == "aligned":
        windows = packing.Aligned(n, index.t, draws, seq_len=seq_len, seed=seed, shuffle_rows=shuffle_rows, overlap=overlap)
        used = np.flatnonzero(np.ones(len(n)) if weights is None else weights)
        not_scored = _too_wide(index, n, used, seq_len, 2 if overlap else 1)
    elif mode == "stream":
        windows = packing.Stream((n + 1) * index.t, draws, seq_len=seq_len, seed=seed, shuffle_rows=shuffle_rows)
    else:
        windows = packing.Legacy((n + 1) * index.t, seq_len=seq_len)
    fingerprint = {
        "ids, shapes and counts": _digest(
            [index.id, index.source_dataset, *(column.tolist() for column in (index.n, index.t, index.checksum))]
        ),
        "num_rows": len(index),
        "num_counts": int((index.n * index.t).sum()),
        "generator": str(store) if isinstance(store, ring_hmm.RingHMM) else None,
        "codec": CODEC,
        "seq_len": seq_len,
        "mode": "aligned, overlapping" if overlap else mode,
        "seed": seed,
        "shuffle_rows": None if overlap or mode == "legacy" else shuffle_rows,
        "cross_recordings": cross_recordings,
        "split": f"{split}, by {split_by}",
        "include_sources": _brief(list(include_sources)),
        "exclude_sources": _brief(list(exclude_sources)),
        "source_weights": _brief({} if overlap else dict(source_weights or {})),
        "num_neurons": num_neurons,
    }
    return Spikes(
        store,
        index,
        windows,
        fingerprint,
        mode=mode,
        seq_len=seq_len,
        seed=seed,
        num_neurons=crop,
        cross_recordings=cross_recordings,
        malformed=malformed,
        not_scored=not_scored,
        skipped=sources.skipped_files(source),
        about={
            "source": summary.public_name(source),
            "split": split,
            "split_by": split_by,
            "bin_width_s": store.bin_width_s if isinstance(store, Store) else summary.provenance(source).get("bin_width_s"),
        },
    )


def _transpose(block, bins):
    """Counts (n, m) into the bins (m, 1 + n), behind a separator in each."""
    bins[:, 0] = SEPARATOR
    if block.flags.f_contiguous:
        # Of a prepared store, bins one after another: copied as so many things of n bytes, 1.5x faster for few neurons.
        things = np.ndarray(len(bins), f"V{len(block)}", bins, offset=1, strides=bins.strides[:1])
        things[:] = block.T.reshape(-1).view(things.dtype)
    else:
        # Transposing straight from the file is up to 2.8x slower on large blocks, and up to 2x faster on those that fit L1.
        bins[:, 1:] = (block if block.size <= DIRECT_TOKENS else np.ascontiguousarray(block)).T


def _check(mode, split_by, overlap, source_weights, num_neurons):
    if mode not in MODES:
        raise ValueError(f"data.mode={mode!r}; there are {', '.join(MODES)}")
    if split_by not in selection.SPLIT_BY:
        raise ValueError(f"data.split_by={split_by!r}; there are {', '.join(selection.SPLIT_BY)}")
    if overlap and mode != "aligned":
        raise ValueError(f"overlap=True makes an evaluation set and needs mode='aligned', not {mode!r}")
    if num_neurons != "all" and num_neurons < 1:
        raise ValueError(f'data.num_neurons={num_neurons}; it must be at least 1, or "all"')
    if mode == "legacy" and (source_weights or num_neurons != "all"):
        raise ValueError(
            "data.mode='legacy' repeats the predecessor's order: source_weights and num_neurons have no place in it"
        )


def find(source, split, split_by):
    """The generator, the prepared store or the files of a split; ValueError where there is none. No network is asked.

    split_by other than given pools the splits of the files, to divide them anew.
    """
    if source.startswith("ring-hmm"):
        if split_by != "given":
            raise ValueError(f"{source} makes its own splits train and test: data.split_by must be 'given', not {split_by!r}")
        return ring_hmm.parse(source, split)
    splits = sources.find_files(source, split)
    if split_by == "given" and split not in splits:
        raise ValueError(
            f"{source} has no split {split!r}; it has {', '.join(sorted(splits))}. "
            f"data.split_by='session' or 'time' makes train and test of it"
        )
    if sources.is_store(source):
        return Store(source, split if split_by == "given" else None)
    return splits[split] if split_by == "given" else [file for name in sorted(splits, reverse=True) for file in splits[name]]


def _too_wide(index, n, used, seq_len, least_bins):
    """(id, reason) of those of the rows `used` that a window of seq_len does not hold `least_bins` bins of; not of all."""
    wide = used[seq_len // (n[used] + 1) < least_bins]
    if len(wide) == len(used):
        least = int(n[used].min())
        raise ValueError(
            f"training.seq_len={seq_len} holds {number_of(least_bins, 'bin')} of no recording in use; the smallest, of "
            f"{number_of(least, 'neuron')}, needs {least_bins * (least + 1)}. A recording is an array (neurons, bins)"
        )
    return [
        (index.id[row], f"{n[row]} neurons need seq_len >= {least_bins * (int(n[row]) + 1)}, it is {seq_len}")
        for row in wide.tolist()
    ]


def _some(noun, state, entries):
    """A line of a report: how many are in that state, and the first ten, names or (name, reason)."""
    shown = "; ".join(entry if isinstance(entry, str) else f"{entry[0]}: {entry[1]}" for entry in entries[:10])
    verb = "is" if len(entries) == 1 else "are"
    return f"data: {number_of(len(entries), noun)} {verb} {state}: {shown}{'; ...' if len(entries) > 10 else ''}"


def _brief(value):
    """A setting as it is, or its digest where it is too long for a fingerprint."""
    return value if len(json.dumps(value)) <= 120 else f"{len(value)} entries, sha256 {_digest(value)}"


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
