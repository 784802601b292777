"""Weight files in and out, one tensor in memory at a time: safetensors (one file or shards) and torch's .pth.

    weights = open_safetensors(folder)  # or open_meta(folder, split_dim); only headers are read here
    tensor = weights.read(name)  # for each name of weights.tensors
    write_safetensors(folder, entries, read, max_shard_bytes=5 * 10**9)  # or write_pth(path, entries, read)

What a file claims is checked before its bytes are used, and nothing in it is ever run: one that cannot be right is a ValueError
of one line. The writers overwrite, and leave a torn file where they fail: give them a folder of their own, and rename it.

Reading order: stored.py (a tensor in files), safetensors.py, pth.py, hashed.py (a file hashed while it is written).
"""

from torchtitan_bio.weight_files.pth import open_meta, write_pth
from torchtitan_bio.weight_files.safetensors import open_safetensors, write_safetensors
from torchtitan_bio.weight_files.stored import Entry, Piece, WeightFiles

__all__ = ["Entry", "Piece", "WeightFiles", "open_meta", "open_safetensors", "write_pth", "write_safetensors"]
