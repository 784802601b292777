"""What simple models reach on held-out counts: the ladder that a trained model has to climb.

Each baseline is fitted to the training counts of a session (one source, subject and session) and scored on the held-out counts
of the same session, in bits/spike over the oracle Poisson null: the score that science/scores.py gives a model. Every held-out
count is scored once. History is empty at a row's first bin.

    python -m torchtitan_bio.science.baselines SOURCE
"""

import time
from math import lgamma, log

import numpy as np
import torch

LARGEST_COUNT = 254
NUM_LAGS = 3  # bins of history
BLOCK_COUNTS = 2**22  # counts of a block of neurons, which bounds the memory of the n-grams
LN_FACTORIAL = np.array([lgamma(count + 1) for count in range(LARGEST_COUNT + 1)])


def ladder(train, test, say=print) -> list[tuple[str, float]]:
    """(name, held-out bits/spike) of each baseline, pooled over the sessions that both datasets hold.

    `say` gets a line about what is left out, and one every few seconds of a long fit.
    """
    sessions = match(train, test)
    num_matched = sum(len(test_rows) for _, test_rows in sessions)
    if num_matched < len(test.index.n):
        say(f"baselines: {len(test.index.n) - num_matched} held-out recordings are of sessions without training data: not scored")
    if not sessions:
        return []
    null, spikes, nats = 0.0, 0, dict.fromkeys(BASELINES, 0.0)
    tokens = TokenTrigram()
    for train_rows, _ in sessions:
        for row in train_rows:
            tokens.add(train.counts(row))
    for number, (train_rows, test_rows) in enumerate(sessions):
        progress = Progress(f"baselines: session {number + 1} of {len(sessions)}", say)
        seen, held_out = [train.counts(row) for row in train_rows], [test.counts(row) for row in test_rows]
        null += poisson_null(held_out)
        spikes += sum(int(counts.sum(dtype=np.int64)) for counts in held_out)
        for name, fit in BASELINES.items():
            nats[name] += fit(seen, held_out, progress)
        nats["x"] = sum(map(tokens.nats, held_out))
    return nats
