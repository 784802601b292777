"""Checkpoints: committed whole or not at all, found, verified, loaded strictly, and usable as a warm start.

Reading order: checkpointer.py (the calls a run makes), commit.py (how a folder comes to be), load.py (how it is trusted again),
warm_start.py (weights only), dcp.py (the wall around pickles), tensors.py (names), peers.py (how ranks agree).
"""

from torchtitan_bio.checkpoint.checkpointer import Checkpointer
from torchtitan_bio.checkpoint.commit import verify
from torchtitan_bio.checkpoint.load import load_model
from torchtitan_bio.checkpoint.peers import CheckpointError
from torchtitan_bio.checkpoint.tensors import num_bytes
from torchtitan_bio.checkpoint.warm_start import init_from

__all__ = ["CheckpointError", "Checkpointer", "init_from", "load_model", "num_bytes", "verify"]
