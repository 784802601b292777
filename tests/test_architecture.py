"""The imports, read from the source, run in the agreed directions."""

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "torchtitan_bio"

# What a module may import of the package: the first pattern that fits decides. A root script may import anything; a module that
# no pattern fits needs a line here, and a thought.
MAY_IMPORT = [
    ("config_loader", ["config", "config_moved"]),
    ("config_moved", []),
    ("config", []),
    ("command_line", []),
    (
        "assembly",
        ["attention", "checkpoint", "config*", "context_parallel", "data*", "distributed", "metrics", "models", "parallelize"]
        + ["recompute", "resume", "stop"],
    ),
    ("attention", ["kernels"]),
    ("kernels", []),
    ("distributed", ["exits"]),
    ("exits", ["config"]),
    ("resume", []),
    ("attempt", ["config", "distributed", "run_lock", "watchdog"]),
    ("run_lock", []),
    ("watchdog", []),
    ("stop", []),
    ("work", ["costs", "models"]),
    ("data.batch", []),
    ("context_parallel", ["distributed", "attention"]),
    ("recompute", []),
    ("convert", []),
    ("weight_files*", ["weight_files*"]),
    ("hub", []),
    ("bridge", ["models", "checkpoint*"]),
    ("chips", []),
    ("costs", ["chips"]),
    ("remedies", ["chips", "costs"]),
    ("live_memory", []),
    ("models", ["models.*"]),  # the table of families
    ("models.procyon", ["attention", "context_parallel", "recompute", "models.layers", "models.llama3", "models.esm2"]),
    ("models.*", ["attention", "context_parallel", "recompute", "models.layers"]),
    ("data", ["data.*"]),
    ("data.*", ["data", "data.*"]),
    ("parallelize", ["distributed", "recompute", "context_parallel"]),
    ("checkpoint*", ["distributed", "command_line", "checkpoint*"]),
    ("metrics", ["distributed"]),
    ("profiling", ["distributed"]),
    ("optimizer", ["distributed"]),
    ("science*", ["*"]),
]
# tomli is the standard library's tomllib on Python 3.10.
CORE_LIBRARIES = {"torch", "numpy", "pyarrow", "tomli", "tomllib", PACKAGE} | set(sys.stdlib_module_names)


def sources() -> dict[str, str]:
    """The text of every root script and module of the package, by its path in the repository."""
    files = [*ROOT.glob("*.py"), *(ROOT / PACKAGE).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def module_name(path: str) -> str:
    """torchtitan_bio/data/spikes.py -> data.spikes; the package itself is ""."""
    parts = list(Path(path).with_suffix("").parts[1:])
    return ".".join(parts[:-1] if parts[-1:] == ["__init__"] else parts)


def first_party_imports(path: str, tree: ast.Module, modules: set[str]) -> list[tuple[int, str]]:
    """(line, module of the package) of each first-party import, inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # The package that a relative import starts from, one level up for each dot beyond the first.
                folders = list(Path(path).parent.parts)
                base = ".".join([*folders[: len(folders) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
                continue
            inner = name[len(PACKAGE) + 1 :]
            while inner and inner not in modules:  # `from torchtitan_bio.data.batch import Batch` is an import of data.batch
                inner = inner.rpartition(".")[0]
            found.append((node.lineno, inner))
    return found


def top_level(body: list[ast.stmt]):
    """The statements that run on import, those inside if, try and with included."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level(handler.body)


def violations(files: dict[str, str]) -> list[str]:
    """Every breach of the house's rules in these sources, as `path:line: what`."""
    trees = {path: ast.parse(text) for path, text in files.items()}
    modules = {module_name(path) for path in trees if path.startswith(f"{PACKAGE}/")}
    scripts = {Path(path).stem for path in trees if "/" not in path}
    classes = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = []
    for path, tree in trees.items():
        inside = path.startswith(f"{PACKAGE}/")
        name = module_name(path)
        if path.count("/") > 2:
            found.append(f"{path}:1: lies deeper than two levels")
        if inside and name:
            allowed = next((targets for pattern, targets in MAY_IMPORT if fnmatchcase(name, pattern)), None)
            if allowed is None:
                found.append(f"{path}:1: {name} has no line in MAY_IMPORT")
            for line, target in first_party_imports(path, tree, modules):
                if target != name and not any(fnmatchcase(target, pattern) for pattern in allowed or []):
                    found.append(f"{path}:{line}: {name} imports {target or PACKAGE}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                found.append(f"{path}:{node.lineno}: global {', '.join(node.names)}")
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    base_name = ast.unparse(base).rpartition(".")[2]
                    if base_name in classes:
                        found.append(f"{path}:{node.lineno}: {node.name} inherits from {base_name}, which is ours")
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for target in imported:
                if inside and target.partition(".")[0] in scripts:
                    found.append(f"{path}:{node.lineno}: imports the script {target}")
                if name.split(".")[0] in ("data", "models") and target == "torch.distributed":
                    found.append(
                        f"{path}:{node.lineno}: {name} imports torch.distributed; ranks arrive as integers or callables"
                    )
        for node in top_level(tree.body):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for target in names:
                if target.partition(".")[0] not in CORE_LIBRARIES | scripts:
                    found.append(f"{path}:{node.lineno}: imports {target} at the top; only torch, numpy and pyarrow may be")
    return sorted(set(found))


def test_every_import_runs_in_the_agreed_direction_and_the_house_rules_hold():
    assert violations(sources()) == []


CLEAN = {
    "train.py": "from torchtitan_bio import config, metrics\n",
    "torchtitan_bio/__init__.py": "",
    "torchtitan_bio/config.py": "import json\n",
    "torchtitan_bio/distributed.py": "import torch\n",
    "torchtitan_bio/metrics.py": "from torchtitan_bio.distributed import World\ndef f():\n    import tensorboard\n",
    "torchtitan_bio/optimizer.py": "class Rule: pass\n",
    "torchtitan_bio/data/__init__.py": "",
    "torchtitan_bio/data/batch.py": "import numpy as np\n",
    "torchtitan_bio/data/loader.py": "from torchtitan_bio.data.batch import Batch\nfrom . import batch\n",
    "torchtitan_bio/models/__init__.py": "",
    "torchtitan_bio/models/layers.py": "import torch.nn\n",
    "torchtitan_bio/models/llama3.py": "from torchtitan_bio.models import layers\n",
    "torchtitan_bio/science/__init__.py": "",
    "torchtitan_bio/science/scores.py": "import torchtitan_bio.data.batch\n",
}

PLANTED = [
    ("torchtitan_bio/metrics.py", "from torchtitan_bio import optimizer", "metrics imports optimizer"),
    ("torchtitan_bio/metrics.py", "def f():\n    from .data import batch", "metrics imports data.batch"),
    ("torchtitan_bio/metrics.py", "import torchtitan_bio.science.scores", "metrics imports science.scores"),
    ("torchtitan_bio/config.py", "from torchtitan_bio.distributed import World", "config imports distributed"),
    ("torchtitan_bio/data/batch.py", "from torchtitan_bio.data import loader", "data.batch imports data.loader"),
    ("torchtitan_bio/data/loader.py", "from ..models.layers import Linear", "data.loader imports models.layers"),
    ("torchtitan_bio/data/loader.py", "from torchtitan_bio import models", "data.loader imports models"),
    ("torchtitan_bio/data/loader.py", "import torch.distributed as dist", "data.loader imports torch.distributed"),
    ("torchtitan_bio/models/llama3.py", "from torch import distributed", "models.llama3 imports torch.distributed"),
    ("torchtitan_bio/models/llama3.py", "import torchtitan_bio.config", "models.llama3 imports config"),
    ("torchtitan_bio/models/layers.py", "from torchtitan_bio.models import llama3", "models.layers imports models.llama3"),
    ("torchtitan_bio/science/scores.py", "import train", "imports the script train"),
    ("torchtitan_bio/metrics.py", "def f():\n    global x\n    x = 1", "global x"),
    ("torchtitan_bio/metrics.py", "class Strict(optimizer.Rule): pass", "Strict inherits from Rule"),
    ("torchtitan_bio/metrics.py", "try:\n    import tensorboard\nexcept ImportError: pass", "imports tensorboard at the top"),
    ("train.py", "from datasets import load_dataset", "imports datasets at the top"),
    ("torchtitan_bio/novel.py", "", "novel has no line in MAY_IMPORT"),
    ("torchtitan_bio/data/spikes/rows.py", "", "lies deeper than two levels"),
]


def test_the_checker_passes_sources_that_keep_the_rules():
    assert violations(CLEAN) == []


@pytest.mark.parametrize("path, text, complaint", PLANTED, ids=[complaint for _, _, complaint in PLANTED])
def test_the_checker_finds_a_planted_violation(path, text, complaint):
    found = violations(CLEAN | {path: text + "\n"})
    assert any(line.startswith(f"{path}:") and complaint in line for line in found), found


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_has_nothing_to_say(command):
    answer = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
