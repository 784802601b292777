"""Synthetic populations that see a hidden walk on a ring, so that the best possible score is known exactly.

z_t walks on a ring of K states: it stays with 1 - 2p and steps either way with p. Neuron i fires at
lam_i(z) = A_i exp(kappa (cos(theta_z - phi_i) - 1)) + b, A_i log-uniform in (0.5, 2.5), phi_i uniform; its count is Poisson
given z, conditioned on being at most 7. z is uniform at a row's first bin, so where a window is a row (aligned, seq_len =
bins * (n + 1)) forward filtering from a uniform prior is the ideal observer.

Rows are made when they are read and nothing is stored: block(row, begin, end) costs what its size is, wherever it lies.
"""

from dataclasses import dataclass, fields

import numpy as np

from torchtitan_bio.data import keyed
from torchtitan_bio.data.recordings import Index

TRUNCATION = 7
SPLITS = ("train", "test")
# Names of the independent random streams, the second key after the seed.
AMPLITUDES, PHASES, WALK, COUNTS, SIZES = 101, 102, 103, 104, 105


@dataclass(frozen=True, kw_only=True)
class RingHMM:
    """One split. With a single n all rows of both splits share one population; with a range each row has its own, of a size
    drawn log-uniformly. Names follow the mathematics above, as they do in `ring-hmm:n=8,K=16,p=0.1`."""

    n: tuple[int, int] = (8, 8)
    K: int = 16
    p: float = 0.1
    kappa: float = 3.0
    b: float = 0.02
    bins: int = 32
    rows: int = 65536
    """Rows of the training split."""
    test_rows: int = 512
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        problems = [
            f"{name} {rule}"
            for name, holds, rule in [
                ("n", 1 <= self.n[0] <= self.n[1], "must be a number from 1 up, or a range like 10..1000"),
                ("K", self.K >= 3, "must be at least 3"),
                ("p", 0 <= self.p <= 0.5, "must lie in 0 .. 0.5"),
                ("b", self.b > 0, "must be positive"),
                ("bins", self.bins >= 1, "must be at least 1"),
                ("rows", self.rows >= 1, "must be at least 1"),
                ("test_rows", self.test_rows >= 1, "must be at least 1"),
                ("split", self.split in SPLITS, f"must be one of {', '.join(SPLITS)}, not {self.split!r}"),
            ]
            if not holds
        ]
        if problems:
            raise ValueError("ring-hmm: " + "; ".join(problems))

    @property
    def shared(self):
        """Whether all rows are of one population."""
        return self.n[0] == self.n[1]

    def index(self):
        num_rows = self.rows if self.split == "train" else self.test_rows
        low, high = np.log(self.n[0]), np.log(self.n[1] + 1)
        drawn = np.exp(low + (high - low) * keyed.uniform(num_rows, self.seed, SIZES, self._split_key))
        n = np.clip(drawn.astype(np.int64), *self.n)
        bins, zeros = np.full(num_rows, self.bins), np.zeros(num_rows, np.int64)
        names = [f"{self.split}-{row}" for row in range(num_rows)]
        return Index(
            id=[f"ring-hmm/{name}" for name in names],
            source_dataset=["ring-hmm"] * num_rows,
            subject_id=["ring-hmm"] * num_rows if self.shared else names,
            session_id=[f"population-{self.seed}"] * num_rows,
            segment_id=names,
            n=n,
            t=bins,
            clipped=zeros,
            checksum=zeros,  # the generator's settings name its counts
            fault=[""] * num_rows,
            chunk=zeros,
            offset=np.arange(num_rows),
            stored_bins=bins,
            first_bin=zeros,
        )

    @property
    def _split_key(self):
        return SPLITS.index(self.split)

    def rates(self, row, n=None):
        """lam_i(z) as (K, n): of the shared population, or of row `row` (the number in its name) that has n neurons."""
        population = (0, 0) if self.shared else (1 + self._split_key, row)
        n = self.n[0] if self.shared else n
        amplitude = 0.5 * 5.0 ** keyed.uniform(n, self.seed, AMPLITUDES, *population)
        phase = 2 * np.pi * keyed.uniform(n, self.seed, PHASES, *population)
        theta = 2 * np.pi * np.arange(self.K)[:, None] / self.K
        return amplitude * np.exp(self.kappa * (np.cos(theta - phase) - 1)) + self.b

    def distribution(self, rates):
        """P(y | z) of counts 0 .. 7, as (*rates.shape, 8)."""
        count = np.arange(TRUNCATION + 1)
        weight = rates[..., None] ** count / np.cumprod(np.maximum(count, 1))
        return weight / weight.sum(-1, keepdims=True)

    def states(self, row, end):
        """z of bins [0, end) of a row."""
        drawn = keyed.uniform(end, self.seed, WALK, self._split_key, row)
        steps = (drawn < self.p).astype(np.int64) - (drawn >= 1 - self.p)
        steps[:1] = drawn[:1] * self.K
        return np.cumsum(steps) % self.K

    def block(self, index, row, begin, end):
        """Counts (n, end - begin) of bins [begin, end) of an index row, uint8."""
        n, number = int(index.n[row]), int(index.offset[row])
        begin, end = begin + int(index.first_bin[row]), end + int(index.first_bin[row])
        z = self.states(number, end)[begin:]
        below = np.cumsum(self.distribution(self.rates(number, n)), -1)[..., :-1]
        drawn = keyed.uniform((end - begin) * n, self.seed, COUNTS, self._split_key, number, start=begin * n).reshape(-1, n)
        counts = np.zeros(drawn.shape, np.uint8)
        for level in range(TRUNCATION):
            counts += drawn >= below[z, :, level]
        return counts.T


def parse(source, split):
    """The RingHMM that a text like `ring-hmm:n=10..1000,K=16,rows=4096` describes."""
    types = {field.name: field.type for field in fields(RingHMM) if field.name != "split"}
    values = {}
    for part in filter(None, source.removeprefix("ring-hmm").removeprefix(":").split(",")):
        key, _, text = part.partition("=")
        if key not in types:
            raise ValueError(f"{source}: no setting {key!r}; there are {', '.join(types)}")
        try:
            if key == "n":
                low, _, high = text.partition("..")
                values[key] = (int(low), int(high or low))
            else:
                values[key] = types[key](text)
        except ValueError:
            raise ValueError(f"{source}: {key}={text} is not a number") from None
    return RingHMM(**values, split=split)
