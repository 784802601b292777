"""What the two converters share: how they refuse, how they show progress, how they end."""

import glob
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from torchtitan_bio import models
from torchtitan_bio.checkpoint import CheckpointError, enumerate_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def refuse_existing(folder: Path, source: Path):
    """ValueError unless the folder can be made of the source: nothing of that name, or an empty folder, and elsewhere.

    Tells what an earlier kill left.
    """
    if folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{folder} lies inside {source}, where nothing is written; name a folder elsewhere")
    if folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is the folder that this command runs in; name one that it can make")
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and is no empty folder; delete it or name another folder")
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.partial-*"):
        print(f"{left} is an interrupted conversion's, to be deleted, or one's that is running now", file=sys.stderr)


@contextmanager
def progress(num_bytes: int, title: str):
    """A bar on a terminal, nothing elsewhere; gives the function that is told of each further byte."""
    from tqdm import tqdm

    with tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update


def shapes_of(family: str, architecture) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, in its own order."""
    with torch.device("meta"):
        model = models.build(family, architecture)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_shapes(folder: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]):
    """ValueError where a tensor is missing, unknown or of another shape."""
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {tuple(found[name])} instead of {shape}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != shape
        ],
    }
    words = [f"{kind}: {enumerate_names(names)}" for kind, names in problems.items() if names]
    if words:
        raise ValueError(f"the tensors of {folder} are not those of its architecture; {'; '.join(words)}")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no table of settings")
    return content


def run(main: Callable[[], None]) -> int:
    """The exit code: 0, 2 with what is to be mended, 130 interrupted, 1 for a mistake of ours."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, OSError, CheckpointError) as error:
        print(f"{script}: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted; what was there before is as it was", file=sys.stderr)
        return 130
    return 0
