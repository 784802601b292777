"""What a data family hands to the trainer: inputs for a model, and how many targets each loss term has."""

from dataclasses import dataclass, field

IGNORED = -100  # a label that no loss and no score counts


@dataclass(frozen=True)
class Batch:
    """One microbatch. `inputs` are tensors by name (or None); `origins` is, of each sample, (row of the dataset's index, offset
    in it), for logs and for the scorer.

    `counts` are targets of each loss term, {"next_token": 511}. Every batch on every rank names every term of its family, with
    0 where it has no target: counts travel between ranks as plain numbers in the order of their names, and a term that one rank
    leaves out would shift the others.
    """

    inputs: dict
    counts: dict[str, int]
    origins: list[tuple[int, int]] = field(default_factory=list)
