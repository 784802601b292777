"""Checkpoints: committed whole or not at all, found, verified, loaded strictly, and usable as a warm start.

Reading order: checkpointer.py (the calls a run makes), commit.py (how a folder comes to be), load.py (how it is trusted again),
warm_start.py (weights only), weights.py (one tensor at a time), dcp.py (the wall around pickles), tensors.py (names), peers.py
(how ranks agree). `python -m torchtitan_bio.checkpoint` looks at folders.
"""

from torchtitan_bio.checkpoint.checkpointer import Checkpointer, newest_step, refuse_full_disk
from torchtitan_bio.checkpoint.commit import fingerprint, verify
from torchtitan_bio.checkpoint.load import load_model
from torchtitan_bio.checkpoint.peers import CheckpointError
from torchtitan_bio.checkpoint.tensors import enumerate_names, num_bytes
from torchtitan_bio.checkpoint.warm_start import init_from
from torchtitan_bio.checkpoint.weights import Weights, left_aside, open_weights, write_weights

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Weights",
    "enumerate_names",
    "fingerprint",
    "init_from",
    "left_aside",
    "load_model",
    "newest_step",
    "num_bytes",
    "open_weights",
    "refuse_full_disk",
    "verify",
    "write_weights",
]
