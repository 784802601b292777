"""The table of data families: model family -> the module whose build() makes its datasets."""

FAMILIES = {"llama3": "torchtitan_bio.data.spikes"}
