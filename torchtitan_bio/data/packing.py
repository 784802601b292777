"""Where windows lie: which stretch of which recordings sample i covers. Pure arithmetic on shapes; no count is read here.

A recording of n neurons and t bins is (n + 1) * t tokens: of each bin the separator, then the neurons. A window is seq_len + 1
tokens, of which the first seq_len are inputs and the last seq_len labels. Every scheme below answers `window(i)` for any i in
about the same time, so resuming at step one million costs what starting costs.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from torchtitan_bio.data import keyed

# Names of the independent random streams, the second key after the seed.
ROW_ORDER, WINDOW_ORDER, REPEATS = 1, 2, 3


@dataclass(frozen=True)
class Window:
    """`pieces` are (row, first token, end token) in the row's own tokens, in order. `labels` is the range of positions in the
    window whose token may be predicted from the one before. What the pieces leave of seq_len + 1 is padding."""

    epoch: int
    pieces: list[tuple[int, int, int]]
    labels: tuple[int, int]
    origin: tuple[int, int]


class Draws:
    """Which rows an epoch takes, in file order. A row of weight 2.3 is taken twice, and in 30% of the epochs a third time:
    when a number keyed by (seed, epoch, row) is below 0.3. Epochs can differ in length; sample i remains a pure function."""

    def __init__(self, num_rows, *, seed, weights=None):
        weights = np.ones(num_rows) if weights is None else np.asarray(weights, float)
        self.seed, self.whole, self.part = seed, weights.astype(np.int64), weights % 1.0
        self.equal_epochs = not self.part.any()

    def __call__(self, epoch):
        extra = keyed.uniform(len(self.part), self.seed, REPEATS, epoch) < self.part
        return np.repeat(np.arange(len(self.part)), self.whole + extra)


@dataclass(frozen=True)
class Epoch:
    rows: np.ndarray  # of each draw, in the epoch's order
    ends: np.ndarray  # tokens (of aligned windows: windows) up to and with each draw
    buffers: np.ndarray  # first window of each buffer, and the number of windows
    num_windows: int


class Epochs:
    """Tables of the last two epochs that were asked for, and which epoch a sample falls in: by division, or where epochs differ
    in length by counting them, once."""

    def __init__(self, make, *, equal):
        self.make, self.equal = make, equal
        self.tables, self.ends = {}, []

    def table(self, epoch):
        if epoch not in self.tables:
            if len(self.tables) == 2:
                del self.tables[max(self.tables, key=lambda other: abs(other - epoch))]
            self.tables[epoch] = self.make(epoch)
        return self.tables[epoch]

    def locate(self, i):
        """(epoch, number of the window inside it) of sample i."""
        if self.equal:
            return divmod(i, self.table(0).num_windows)
        while not self.ends or self.ends[-1] <= i:
            if len(self.ends) == 1000 and not self.ends[-1]:
                raise ValueError("source_weights draw no recording in 1000 epochs: raise them")
            self.ends.append((self.ends[-1] if self.ends else 0) + self.table(len(self.ends)).num_windows)
        epoch = bisect_right(self.ends, i)
        return epoch, i - (self.ends[epoch - 1] if epoch else 0)


def _edges(ends, shuffle_rows):
    """Where each buffer of `shuffle_rows` draws begins, and where the last one ends, in the unit of `ends`."""
    return np.concatenate([[0], ends[shuffle_rows - 1 : -1 : shuffle_rows], ends[-1:]])


def _shuffle(i, buffers, *keys):
    """The window that is shown as number i: one of the same buffer."""
    buffer = int(np.searchsorted(buffers, i, side="right")) - 1
    first, end = int(buffers[buffer]), int(buffers[buffer + 1])
    return first + keyed.permutation(end - first, *keys, buffer)[i - first]


class Stream:
    """Recordings in an order keyed by (seed, epoch), end to end, cut every seq_len tokens.

    Each token but an epoch's first is a label position once. Windows are permuted inside consecutive buffers of `shuffle_rows`
    recordings: permuting them over everything would read each page of a neuron-major file some 76 times, and not at all would
    show a step one to three recordings. A window belongs to the buffer that its first token lies in.
    """

    def __init__(self, tokens, draws, *, seq_len, seed, shuffle_rows):
        self.tokens, self.draws, self.seq_len, self.seed, self.shuffle_rows = tokens, draws, seq_len, seed, shuffle_rows
        self.epochs = Epochs(self._table, equal=draws.equal_epochs)

    def __len__(self):
        return self.epochs.table(0).num_windows

    def _table(self, epoch):
        rows = self.draws(epoch)
        rows = rows[keyed.order(len(rows), self.seed, ROW_ORDER, epoch)]
        ends = np.cumsum(self.tokens[rows])
        total = int(ends[-1]) if len(rows) else 0
        num_windows = -(-max(total - 1, 0) // self.seq_len)
        buffers = np.minimum(-(-_edges(ends, self.shuffle_rows) // self.seq_len), num_windows)
        return Epoch(rows, ends, buffers, num_windows)

    def window(self, i):
        epoch, i = self.epochs.locate(i)
        table = self.epochs.table(epoch)
        begin = _shuffle(i, table.buffers, self.seed, WINDOW_ORDER, epoch) * self.seq_len
        pieces = _pieces(table.rows, table.ends, begin, begin + self.seq_len + 1)
        num_tokens = sum(end - begin for _, begin, end in pieces)
        return Window(epoch, pieces, (1, num_tokens), pieces[0][:2])


def _pieces(rows, ends, begin, end):
    """Tokens [begin, end) of the rows laid end to end, as far as they go."""
    draw = int(np.searchsorted(ends, begin, side="right"))
    pieces = []
    while begin < end and draw < len(rows):
        row_begin = int(ends[draw - 1]) if draw else 0
        stop = min(end, int(ends[draw]))
        pieces.append((int(rows[draw]), begin - row_begin, stop - row_begin))
        begin, draw = stop, draw + 1
    return pieces


class Legacy:
    """The predecessor's windows: tokens [i * (seq_len + 1), (i + 1) * (seq_len + 1)) of the rows in file order, for ever."""

    def __init__(self, tokens, *, seq_len):
        self.seq_len, self.rows, self.ends = seq_len, np.arange(len(tokens)), np.cumsum(tokens)

    def __len__(self):
        return -(-int(self.ends[-1]) // (self.seq_len + 1))

    def window(self, i):
        epoch, begin = divmod(i * (self.seq_len + 1), int(self.ends[-1]))
        pieces, missing = [], self.seq_len + 1
        while missing:
            pieces += _pieces(self.rows, self.ends, begin, begin + missing)
            missing = self.seq_len + 1 - sum(end - begin for _, begin, end in pieces)
            begin = 0
        return Window(epoch, pieces, (1, self.seq_len + 1), pieces[0][:2])


class Aligned:
    """Windows of m = seq_len // (n + 1) whole bins of one recording, from a separator; what is left of seq_len is padding.

    For training they do not overlap, recordings are in an order keyed by (seed, epoch), and windows are permuted inside buffers
    of `shuffle_rows` recordings, as in Stream. With `overlap` they are the exact finite set for evaluation, in file order,
    max(1, m // 2) bins apart: each window scores the bins that none before it scored. Rows whose windows would be shorter than
    a bin (with `overlap`, than two) get none.
    """

    def __init__(self, neurons, bins, draws, *, seq_len, seed, shuffle_rows, overlap=False):
        self.neurons, self.bins, self.draws, self.overlap = neurons, bins, draws, overlap
        self.seq_len, self.seed, self.shuffle_rows = seq_len, seed, shuffle_rows
        self.window_bins = seq_len // (neurons + 1)
        self.stride = np.maximum(1, self.window_bins // 2 if overlap else self.window_bins)
        beyond_first = np.maximum(0, bins - (self.window_bins if overlap else self.stride))
        self.num_windows = np.where(self.window_bins < (2 if overlap else 1), 0, 1 + -(-beyond_first // self.stride))
        self.epochs = Epochs(self._table, equal=overlap or draws.equal_epochs)

    def __len__(self):
        return self.epochs.table(0).num_windows

    def _table(self, epoch):
        rows = self.draws(epoch)
        if not self.overlap:
            rows = rows[keyed.order(len(rows), self.seed, ROW_ORDER, epoch)]
        ends = np.cumsum(self.num_windows[rows])
        return Epoch(rows, ends, _edges(ends, self.shuffle_rows), int(ends[-1]) if len(rows) else 0)

    def window(self, i):
        if self.overlap and not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}: the evaluation set is finite")
        epoch, i = self.epochs.locate(i)
        table = self.epochs.table(epoch)
        if not self.overlap:
            i = _shuffle(i, table.buffers, self.seed, WINDOW_ORDER, epoch)
        draw = int(np.searchsorted(table.ends, i, side="right"))
        row = int(table.rows[draw])
        number = i - (int(table.ends[draw - 1]) if draw else 0)
        width, stride, window_bins = int(self.neurons[row]) + 1, int(self.stride[row]), int(self.window_bins[row])
        begin = number * stride
        end = min(begin + window_bins, int(self.bins[row]))
        context = window_bins - stride if self.overlap and number else 0
        return Window(
            epoch, [(row, begin * width, end * width)], (max(1, context * width), (end - begin) * width), (row, begin)
        )
