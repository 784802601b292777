"""What a run folder tells of its run, whatever part of it is there, without what is private.

A run may have ended anywhere: before its first step, in the middle of a line of metrics.jsonl, between two checkpoints. What is
missing is None or empty, and what is there but cannot be read is among the notes.
"""

import json
import sys
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import torch

from torchtitan_bio import models, resume
from torchtitan_bio.checkpoint import commit
from torchtitan_bio.data import loader, spikes
from torchtitan_bio.science import ring_hmm_floor
from torchtitan_bio.science.disclosure import LEFT_OUT, public, public_config, public_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COLUMNS = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_wait_s", "mfu", "peak_memory_gib")
RECORDS = ("config.toml", "metrics.jsonl", "exit.json")
MOST_FILTERED = 2**21  # held-out counts; the ideal observer of the ring-HMM takes about a second for them
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    config: dict
    starts: list[dict]
    """As metrics.jsonl has them; the first is the beginning, and the others went on from a checkpoint."""
    steps: dict[str, np.ndarray]
    """A column for each of COLUMNS, NaN where there is no finite number."""
    skipped: np.ndarray
    """The steps that were not taken."""
    skipped_rows: dict[int, list[str]]
    """Whose recordings they had read, where that is on record."""
    validations: list[dict]
    exit: dict
    rungs: list[tuple[str, float]]
    """The baselines on the held-out data of the last validation, in bits/spike."""
    ideal: dict | None
    """The ideal observer of just the windows of the last validation: "nll" in nats/count, "bits_per_spike"."""
    model: dict | None
    data: dict
    """By "train" and "held_out", where a checkpoint says it."""
    evaluation: dict | None
    generated: list["Generated"]
    samples: list[Path]
    """Pictures drawn while it trained, in the order of their steps."""
    notes: list[str]

    @property
    def last(self) -> dict | None:
        return self.validations[-1] if self.validations else None


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What generate.py left in a folder of the run."""

    name: str
    record: dict
    pictures: list[Path]


def read(folder: Path) -> Run:
    """ValueError if the folder holds no run at all."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in RECORDS):
        raise ValueError(f"{folder} is no run folder: it holds none of {', '.join(RECORDS)}")
    notes = []
    lines = _metrics(folder / "metrics.jsonl", notes)
    by_kind = {kind: [line for line in lines if line.get("kind") == kind] for kind in ("start", "train", "validation", "skip")}
    config, validations = _config(folder / "config.toml", notes), by_kind["validation"]
    steps = {name: np.array([_number(line.get(name)) for line in by_kind["train"]], float) for name in COLUMNS}
    is_skipped = np.array([line.get("skipped") is True for line in by_kind["train"]], bool)
    checkpoints = folder / "checkpoint"
    newest = next((checkpoints / name for name in commit.names_like(checkpoints, commit.STEP)), None)
    if earlier := len(list(folder.glob("metrics.before-*.jsonl"))):
        notes.append(f"{earlier} earlier start(s) in this folder left no checkpoint; their metrics are kept beside it")
    return Run(
        name=name if (name := public_text(folder.resolve().name)) != LEFT_OUT else "a run",
        config=public_config(config) if config else {},
        starts=public(by_kind["start"]),
        steps=steps,
        skipped=steps["step"][is_skipped].astype(int),
        skipped_rows={line["step"]: public(line.get("rows", [])) for line in by_kind["skip"]},
        validations=public(validations),
        exit=public(_json(folder / "exit.json", notes) or {}),
        rungs=_rungs(_json(folder / "ladder.json", notes, "rungs"), validations[-1] if validations else None, notes),
        ideal=_ideal(config, validations[-1] if validations else None),
        model=_model(_json(newest / "model.json", notes)) if newest else None,
        data=public(_json(newest / "data.json", notes) or {}) if newest else {},
        evaluation=public(_json(folder / "evaluation" / "evaluation.json", notes, "checkpoints")),
        generated=_generated(folder, notes),
        samples=sorted(path for path in folder.glob("samples/step-*.png") if _is_png(path)),
        notes=notes,
    )


def _number(value) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _metrics(path: Path, notes: list[str]) -> list[dict]:
    if not path.is_file():
        notes.append("there is no metrics.jsonl: the run ended before its first step, or its record was moved")
        return []
    lines, torn = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                torn += not isinstance(entry, dict)
                lines += [entry] if isinstance(entry, dict) else []
            except ValueError:
                torn += 1
    if torn:
        notes.append(f"{torn} line(s) of metrics.jsonl cannot be read, as where a run was killed in the middle of one")
    return lines


def _config(path: Path, notes: list[str]) -> dict | None:
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
        return config if {"data", "training", "validation"} <= config.keys() else None
    except FileNotFoundError:
        notes.append("there is no config.toml: the run ended before it wrote down what it was asked to do")
    except (OSError, ValueError) as error:
        notes.append(f"config.toml cannot be read ({type(error).__name__})")
    return None


def _json(path: Path, notes: list[str], key: str | None = None) -> dict | None:
    """None where it is not there, or no object, or one without the key that makes it what its name says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found if isinstance(found, dict) else None
        if key and key not in (found or {}):
            notes.append(f"{path.name} is not of this version: it has no {key!r}")
            return None
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
        return None


def _rungs(ladder: dict | None, validation: dict | None, notes: list[str]) -> list[tuple[str, float]]:
    """None of them, if they were scored on other data than the model."""
    if not ladder or not validation or resume.sha256(ladder.get("held_out")) != validation.get("held_out"):
        return []
    try:
        return [(public_text(name), float(value)) for name, value in ladder["rungs"]]
    except (TypeError, ValueError):
        notes.append("ladder.json is not of this version: its rungs are no list of names with numbers")
        return []


def _model(identity: dict | None) -> dict | None:
    if not identity:
        return None
    try:
        with torch.device("meta"):
            model = models.build(identity["family"], models.restore(identity["family"], identity["architecture"]))
        parameters = sum(parameter.numel() for parameter in model.parameters())
    except (ValueError, KeyError, TypeError, ImportError):  # of another version of the family
        parameters = None
    return public(identity) | {"parameters": parameters}


def _ideal(config: dict | None, validation: dict | None) -> dict | None:
    """Only where the data can be made again, is small, and is just what was scored."""
    source = config and (config["validation"].get("source") or config["data"].get("source", ""))
    if not source or not source.startswith("ring-hmm") or not validation or not validation.get("spikes"):
        return None
    names = ("split_by", "shuffle_rows", "cross_recordings")
    names += ("include_sources", "exclude_sources") if source == config["data"]["source"] else ()
    try:
        dataset = spikes.build(
            source=source,
            **{name: config["data"][name] for name in names},
            split=config["validation"]["split"],
            mode="aligned",
            overlap=True,
            seq_len=config["training"]["seq_len"],
            seed=config["training"]["seed"],
        )
    except (ValueError, KeyError, TypeError):
        return None
    if resume.sha256(dataset.fingerprint) != validation.get("held_out") or validation["counts"] > MOST_FILTERED:
        return None
    windows = ring_hmm_floor.window_nll(dataset, loader.subset(len(dataset), validation["windows"]))
    counts = sum(number for _, _, number in windows)
    if counts != validation["counts"]:
        return None
    nll = sum(nats for _, nats, _ in windows) / counts
    return {"nll": nll, "bits_per_spike": (validation["null_nll"] - nll) * counts / (validation["spikes"] * log(2))}


def _generated(folder: Path, notes: list[str]) -> list[Generated]:
    found = []
    for path in sorted(folder.glob("*/generated.json")):
        if record := _json(path, notes):
            pictures = [path.with_name(name) for name in ("raster.png", "realism.png")]
            found.append(
                Generated(
                    name=public_text(path.parent.name),
                    record=public(record),
                    pictures=[each for each in pictures if _is_png(each)],
                )
            )
    return found


def _is_png(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(PNG)) == PNG
    except OSError:
        return False
