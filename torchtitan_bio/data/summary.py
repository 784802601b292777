"""What the world may know of a dataset: its sums by source, and where it comes from without where it lies."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from torchtitan_bio.data import sources

SOURCES_SHOWN = 200


def summarize(index, tokens) -> dict:
    """Sums over all recordings, and by source_dataset, largest first, as JSON. Each recording is taken once.

    index: of recordings.Index. tokens: of each recording; counts are those without the separators. No recording, subject or
    session is named.
    """
    by_source = Counter()
    for source, number in zip(index.source_dataset, tokens.tolist(), strict=True):
        by_source[source] += number
    order = [source for source, _ in by_source.most_common()]
    rest = f"({len(order) - SOURCES_SHOWN:,} smaller ones)"
    label = {source: source if place < SOURCES_SHOWN else rest for place, source in enumerate(order)}
    rows = {label[source]: [] for source in order}
    for row, source in enumerate(index.source_dataset):
        rows[label[source]].append(row)
    return _sums(index, tokens, list(range(len(index)))) | {
        "num_sources": len(order),
        "sources": [{"source_dataset": source} | _sums(index, tokens, some) for source, some in rows.items()],
    }


def _sums(index, tokens, rows):
    named = [(index.source_dataset[row], index.subject_id[row], index.session_id[row]) for row in rows]
    return {
        "recordings": len(rows),
        "counts": int((tokens[rows] - index.t[rows]).sum()),
        "tokens": int(tokens[rows].sum()),
        "neurons": [int(np.min(index.n[rows])), int(np.max(index.n[rows]))],
        "subjects": len({name[:2] for name in named if name[1]}),
        "sessions": len({name for name in named if name[2]}),
        "clipped": int(index.clipped[rows].sum()),
    }


def public_name(source: str) -> str:
    """A data source as the world may read it: of a file or folder the last name alone, and not that where it is a person's.

    Only what is not a file or folder keeps a slash: that is a name on the Hugging Face hub.
    """
    if re.fullmatch(r"(embedded:|ring-hmm)[\w:=.,+-]*", source):
        return source
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not source.endswith(sources.SUFFIXES)
    if on_hub and not os.path.exists(source):
        return source
    *folders, last = [part for part in re.split(r"[/\\]+", source) if part not in ("", ".", "..")] or [""]
    is_owner = last.startswith("~") or folders[-1:] in (["home"], ["Users"]) or re.search("[@:]", last)
    return "" if is_owner else last


def provenance(source: str) -> dict:
    """What the package knows of a recording embedded in it, such as licence and bin width; nothing of any other source, since
    no file that is read has a place for it."""
    name = re.fullmatch(r"embedded:(\w+)", source)
    path = Path(__file__).parent / name[1] / "provenance.json" if name else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
