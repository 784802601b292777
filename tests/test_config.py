"""The configuration: what is understood reaches the run unchanged, what is not stops it with the remedy."""

import ast
import inspect
import re
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from torchtitan_bio import data, models
from torchtitan_bio.config import Config, ConfigError, Model, Optimizer
from torchtitan_bio.config_loader import KINDS, dump, load, manual_page, run_folder
from torchtitan_bio.config_moved import GONE, GONE_SECTIONS, MOVED, REWORDED
from torchtitan_bio.data import ring_hmm

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "train_configs").glob("*.toml"))
PROMISED = """quickstart debug ring_hmm primate_8B rodent_8B synthetic_8B synthetic_primate_8B lang_primate_8B
primate_8B_h100 primate_8B_mi250x primate_8B_1gpu primate_8B_1M primate_250M primate_870M primate_2B"""


def write(folder, text) -> str:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def value_of(config, key):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def command(*argv, env=None):
    """A root script's first lines, in a process of its own."""
    code = "import sys; from torchtitan_bio import config_loader; config_loader.load_or_exit(sys.argv[1:])"
    code += "; print('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, env=env)


# ---- what is shipped ----


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_toml_loads_without_a_warning_and_its_model_and_population_exist(path):
    loaded = load(["--job.config_file", str(path)])
    model = loaded.config.model
    models.resolve(model.name, model.flavor, model.overrides)
    if loaded.config.data.source.startswith("ring-hmm:"):
        ring_hmm.parse(loaded.config.data.source, loaded.config.data.split)
    assert loaded.warnings == []
    assert run_folder(loaded.config) == Path("outputs") / path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_toml_says_only_what_differs_from_the_defaults(path):
    loaded, default = load(["--job.config_file", str(path)]), Config()
    for key in KINDS:
        same = value_of(loaded.config, key) == value_of(default, key)
        assert same == (loaded.origin[key] == "default") or key in ("data.source", "job.config_file"), key


def test_every_promised_toml_is_shipped():
    assert {path.stem for path in SHIPPED} == set(PROMISED.split())


def fields_read() -> set[str]:
    """What the program reads as config.section.key, also of a section that a function gave a shorter name, or that it has as a
    parameter of f in f(**asdict(config.section)). [data] goes to each family's build(), which must have a parameter for it."""
    sources = [*ROOT.glob("*.py"), *(ROOT / "torchtitan_bio").rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources if path.name != "config.py"}
    scopes = [(path.stem, scope) for path, tree in trees.items() for scope in tree.body]
    functions = {(stem, scope.name): scope.args for stem, scope in scopes if isinstance(scope, ast.FunctionDef)}
    builds = [import_module(module).build for module in data.FAMILIES.values()]
    read = {f"data.{name}" for build in builds for name in inspect.signature(build).parameters}

    def section(node) -> str | None:
        """The section that config.optimizer or loaded.config.optimizer names."""
        return getattr(node, "attr", None) if ast.unparse(node).rpartition(".")[0] in ("config", "loaded.config") else None

    for _, scope in scopes:
        called = {}
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign):
                sides = node.targets[0], node.value
                whole = all(isinstance(side, ast.Tuple) for side in sides)
                pairs = zip(*(side.elts for side in sides), strict=False) if whole else [sides]
                called |= {short.id: section(long) for short, long in pairs if isinstance(short, ast.Name) and section(long)}
        for node in ast.walk(scope):
            if isinstance(node, ast.Attribute):
                read.add(f"{section(node.value) or called.get(ast.unparse(node.value))}.{node.attr}")
            unpacked = [keyword.value for keyword in getattr(node, "keywords", []) if not keyword.arg]
            for value in unpacked:
                taker = functions.get(tuple(ast.unparse(node.func).split(".")))
                if taker and ast.unparse(value).startswith("asdict("):
                    read |= {f"{section(value.args[0])}.{parameter.arg}" for parameter in taker.args + taker.kwonlyargs}
    return read


def test_every_field_is_read_by_the_program():
    read = fields_read()
    assert sorted(set(KINDS) - read) == []
    # A method of another object, and a parameter of a function that the section is not handed to, are no fields
    assert not {"optimizer.step", "optimizer.warmup_steps", "data.num_steps"} & read


def test_every_field_has_its_line_in_the_manual():
    page = manual_page()
    for key in KINDS:
        line, meaning = re.search(rf"^  --{re.escape(key)} = (.*)\n      (.*)", page, re.M).groups()
        assert line and meaning.strip(), key


# ---- what reaches the run ----


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = write(tmp_path, "[training]\nsteps = 7\nseq_len = 64\n")
    loaded = load(["--job.config_file", path, "--training.steps=9"])
    training = loaded.config.training
    assert (training.steps, training.seq_len, training.seed) == (9, 64, 42)
    origins = [loaded.origin[f"training.{name}"] for name in ("steps", "seq_len", "seed")]
    assert origins == ["command line", f"{path}:3", "default"]


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--training.steps", "3"], "training.steps", 3),
        (["--training.steps=3"], "training.steps", 3),
        (["--job.description", "a = b, = c"], "job.description", "a = b, = c"),
        (["--job.description=--x"], "job.description", "--x"),
        (["--job.description", "12"], "job.description", "12"),
        (["--job.description="], "job.description", ""),
        (["--compile.enable", "true"], "compile.enable", True),
        (["--checkpoint.enable=false"], "checkpoint.enable", False),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--optimizer.lr", "4e-3"], "optimizer.lr", 0.004),
        (["--training.max_norm", "inf"], "training.max_norm", float("inf")),
        (["--training.global_batch_size", "auto"], "training.global_batch_size", "auto"),
        (["--training.global_batch_size", "8"], "training.global_batch_size", 8),
        (["--lr_scheduler.decay_ratio", "0.2"], "lr_scheduler.decay_ratio", 0.2),
        (["--activation_checkpoint.mode", "full"], "activation_checkpoint.mode", "full"),
        (["--model.freeze", '["layers.0.*", "norm.*"]'], "model.freeze", ["layers.0.*", "norm.*"]),
        (["--model.overrides.dim", "128"], "model.overrides", {"dim": 128}),
        (["--model.overrides", "{ dim = 8, norm_eps = 1e-6 }"], "model.overrides", {"dim": 8, "norm_eps": 1e-6}),
        (["--model.overrides.dim=8", "--model.overrides={num_heads=2}"], "model.overrides", {"num_heads": 2, "dim": 8}),
        (["--data.source_weights.a.b", "2"], "data.source_weights", {"a.b": 2.0}),
        (["--checkpoint.init_from=x", "--checkpoint.init_rename.model.*", "*"], "checkpoint.init_rename", {"model.*": "*"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_argument_becomes_a_value_of_its_keys_type(arguments, key, expected):
    value = value_of(load(arguments).config, key)
    assert value == expected and type(value) is type(expected)


NEEDED_BY_OTHERS = {"checkpoint.init_from": "x", "activation_checkpoint.mode": "keep_attention"}


def another_value(key) -> str:
    """Text that the key takes and that is not its default."""
    choices = [choice for choice in get_args(KINDS[key]) if isinstance(choice, str)]
    for text in ["7", "0.5", "true", "false", *reversed(choices), '["a*"]', "{ a = 1 }", "{ a = 'b' }"]:
        try:
            config = load([f"--{name}={value}" for name, value in {**NEEDED_BY_OTHERS, key: text}.items()]).config
        except ConfigError:
            continue
        if value_of(config, key) != value_of(Config(), key):
            return text
    raise AssertionError(f"{key} takes nothing but its default")


def test_every_field_can_be_set_and_survives_a_dump(tmp_path):
    keys = [key for key in KINDS if key != "job.config_file"]
    loaded = load([f"--{key}={another_value(key)}" for key in keys])
    assert [key for key in KINDS if loaded.origin[key] == "default"] == ["job.config_file"]
    assert [key for key in keys if value_of(loaded.config, key) == value_of(Config(), key)] == []
    assert load(["--job.config_file", write(tmp_path, dump(loaded.config))]).config == loaded.config


def test_a_free_table_takes_entries_from_the_file_and_from_the_command_line(tmp_path):
    path = write(tmp_path, "[model.overrides]\ndim = 64\nnum_heads = 4\n")
    loaded = load(["--job.config_file", path, "--model.overrides.dim", "128"])
    assert loaded.config.model.overrides == {"dim": 128, "num_heads": 4}
    assert loaded.origin["model.overrides"] == f"{path}:1, command line"


def test_a_line_is_found_behind_values_that_take_several(tmp_path):
    text = '# [training]\n[model]\nfreeze = [\n  "steps = 1", # ]\n  """a\n[data]\n""",\n]\n\n[training]\nsteps = 5\n'
    loaded = load(["--job.config_file", path := write(tmp_path, text)])
    assert loaded.config.model.freeze == ["steps = 1", "a\n[data]\n"]
    assert loaded.origin["training.steps"] == f"{path}:11"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_dumped_config_loads_back_as_the_same_config_with_the_same_run_folder(path, tmp_path):
    odd = ["--job.description", 'quotes " and \\ and \x7f and \N{GREEK SMALL LETTER PI}\n', "--training.max_norm", "inf"]
    odd += ["--data.source_weights", '{ "a b" = 1, c = 1e-30 }', "--model.freeze", '["*.w?"]', "--optimizer.eps", "1e-15"]
    config = load(["--job.config_file", str(path), *odd]).config
    again = load(["--job.config_file", write(tmp_path, dump(config))]).config
    assert again == config
    assert run_folder(again) == run_folder(config)


def test_the_run_folder_is_named_after_the_toml_unless_it_is_given():
    assert run_folder(load([]).config) == Path("outputs/defaults")
    assert run_folder(load(["--job.dump_folder", "/elsewhere/run"]).config) == Path("/elsewhere/run")


def test_a_section_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="optimizer.lr=0"):
        Optimizer(lr=0)
    with pytest.raises(AttributeError):
        Model().name = "other"


def test_a_warm_up_longer_than_the_run_is_a_warning():
    (warning,) = load(["--training.steps", "5", "--lr_scheduler.warmup_steps", "6"]).warnings
    assert "lr_scheduler.warmup_steps=6" in warning and "training.steps=5" in warning


def test_a_score_on_the_training_split_is_a_warning():
    (warning,) = load(["--validation.split", "train"]).warnings
    assert "nothing is held out" in warning


# ---- what is refused ----

BAD_FILES = {
    "unknown key": ("[training]\nstesp = 1", 2, "training.stesp is not a setting; did you mean training.steps?"),
    "key of another section": ("[training]\nlog_freq = 1", 2, "did you mean metrics.log_freq?"),
    "unknown section": ("[trainning]\nsteps = 1", 1, "[trainning] is not a section; did you mean [training]?"),
    "key without a section": ("steps = 1", 1, "steps is not a setting; did you mean training.steps?"),
    "section as a value": ("training = 1", 1, "training is a section: write [training]"),
    "section as a list": ("[[training]]\nsteps = 1", 1, "training is a section: write [training]"),
    "string for an integer": ('[training]\nsteps = "7"', 2, 'training.steps="7" must be an integer'),
    "float for an integer": ("[training]\nsteps = 1e3", 2, "training.steps=1000.0 must be an integer"),
    "boolean for an integer": ("[training]\nsteps = true", 2, "training.steps=true must be an integer"),
    "boolean for a number": ("[optimizer]\nlr = true", 2, "optimizer.lr=true must be a number"),
    "integer for a boolean": ("[compile]\nenable = 1", 2, "compile.enable=1 must be true or false"),
    "string for a list": ('[model]\nfreeze = "a"', 2, 'model.freeze="a" must be a list of strings'),
    "list of the wrong kind": ("[model]\nfreeze = [1]", 2, "model.freeze=[1] must be a list of strings"),
    "value for a table": ("[model]\noverrides = 1", 2, "model.overrides=1 must be a table"),
    "table for a value": ("[training.steps]\na = 1", 2, "training.steps is not a table; it is an integer"),
    "wrong entry of a table": ('[data.source_weights]\na = "b"', 2, 'data.source_weights.a="b" must be a number'),
    "dots without quotes": ("[checkpoint.init_rename]\na.b = 'c'", 2, 'write "a.b" in quotes'),
    "date": ("[model.overrides]\ndim = 2020-01-01", 2, "model.overrides.dim=2020-01-01 must be a string, a number"),
    "unlisted choice": ('[data]\nmode = "random"', 2, 'data.mode="random" must be "stream" or "aligned" or "legacy"'),
    "unlisted word": ('[training]\nglobal_batch_size = "max"', 2, 'must be an integer or "auto"'),
    "out of range": ("[training]\n\nsteps = 0", 3, "training.steps=0 must be at least 1"),
    "not a number": ("[optimizer]\nlr = nan", 2, "optimizer.lr=nan must be positive and finite"),
    "needs another key": ('[checkpoint]\ninit_allow_missing = ["a"]', 2, "needs checkpoint.init_from"),
    "malformed line": ("[training]\nsteps = ", 2, "not TOML"),
    "unclosed list": ("[model]\nfreeze = [", 2, "not TOML"),
    "key twice": ("[training]\nsteps = 1\nsteps = 2", 3, "not TOML"),
    "selective recompute": ('[activation_checkpoint]\nmode = "selective"', 2, '"keep_attention" keeps'),
    "torchtitan's -1": ("[parallelism]\ndata_parallel_shard_degree = -1", 2, 'is written "auto" here'),
    "torchtitan's 0": ("[checkpoint]\nkeep_latest_k = 0", 2, 'is written "all" here'),
    "pinned memory": ('[checkpoint]\nasync_mode = "async_with_pinned_mem"', 2, 'is written "async" here'),
    "optimizer's name": ('[optimizer]\nname = "AdamW"', 2, "AdamW is the only optimizer"),
    "tensor parallel": ("[training]\ntensor_parallel_degree = 8", 2, "tensor parallelism is not offered"),
    "TensorBoard's folder": ('[metrics]\nsave_tb_folder = "tb"', 2, "tb/ of the run folder"),
    "traces' folder": ('[profiling]\nsave_traces_folder = "t"', 2, "profile/ of the run folder"),
    "section not offered": ("[float8]", 1, "float8 is not offered"),
    "experimental": ("[experimental]\npipeline_parallel_degree = 1", 2, "pipeline parallelism is not offered"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_line_and_the_remedy(case, tmp_path):
    text, line, remedy = BAD_FILES[case]
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load(["--job.config_file", path])
    assert any(problem.startswith(f"{path}:{line}: ") and remedy in problem for problem in error.value.problems), error.value


BAD_ARGUMENTS = {
    "no such file": (["--job.config_file", "train_configs/primat_8B.toml"], "did you mean train_configs/primate_8B.toml?"),
    "folder for a file": (["--job.config_file", "tests"], "job.config_file=tests cannot be read"),
    "no value": (["--training.steps"], "--training.steps needs a value"),
    "no value before the next": (["--compile.enable", "--training.steps", "1"], "needs a value: --compile.enable true"),
    "given twice": (["--training.steps", "1", "--training.steps=2"], "--training.steps is given twice"),
    "abbreviation": (["--training.step", "1"], "training.step is not a setting; did you mean training.steps?"),
    "no section": (["--steps", "1"], "did you mean --training.steps?"),
    "no dashes": (["train_configs/debug.toml"], "'train_configs/debug.toml' is not an argument"),
    "Python's boolean": (["--compile.enable", "True"], 'compile.enable="True" must be true or false'),
    "word for a number": (["--optimizer.lr", "fast"], 'optimizer.lr="fast" must be a number'),
    "list without brackets": (["--model.freeze", "layers.0"], 'must be a list of strings, such as ["a", "b"]'),
    "old flag without a value": (["--training.compile"], "training.compile is called compile.enable here"),
    "out of range": (["--lr_scheduler.decay_ratio", "1.5"], 'must lie in [0, 1], or be "auto"'),
    "second line in a value": (["--training.steps", "1\na = 2"], "must be an integer"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_with_the_remedy(case, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, remedy = BAD_ARGUMENTS[case]
    with pytest.raises(ConfigError) as error:
        load(arguments)
    (problem,) = error.value.problems
    assert problem.startswith("command line: ") and remedy in problem


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_answered_with_a_name_that_exists(old):
    new = MOVED[old]
    assert ".".join(new.split(".")[:2]) in KINDS and old not in KINDS
    with pytest.raises(ConfigError, match=f"{old} is called {new} here"):
        load([f"--{old}=1"])


def test_no_setting_of_ours_is_called_gone_or_moved():
    assert [key for key in KINDS for pattern in GONE if fnmatchcase(key, pattern) and ".*" not in pattern] == []
    assert not set(GONE_SECTIONS) & {key.split(".")[0] for key in KINDS}
    assert {key for key, _ in REWORDED} <= set(KINDS)


def test_all_problems_are_told_at_once_in_the_order_of_the_file(tmp_path):
    text = (
        "[training]\nsteps = 0\nseq_len = -1\nbatch_size = 4\n[optimizer]\nlr = \n[metrics]\nlog_freq = 1.5\n[data]\nmod = 1\n"
    )
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load(["--job.config_file", path, "--comm.timeout", "3"])
    places = [problem.split(": ")[0] for problem in error.value.problems]
    assert places == ["command line", *(f"{path}:{line}" for line in (2, 3, 4, 6, 8, 10))]


# ---- as a command ----


def test_a_misspelt_key_ends_the_command_with_2_and_says_so_on_stderr(tmp_path):
    ended = command("--job.config_file", write(tmp_path, "[model]\nflavour = '8B'"), "--optimizer.lr", "-1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "2 problem(s)" in ended.stderr and "model.flavor?" in ended.stderr and "optimizer.lr=-1" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_only_rank_0_tells_the_problems_but_all_ranks_end_with_2():
    ended = command("--nonsense", env={"RANK": "1"})
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")


def test_help_is_printed_within_a_second():
    start = time.monotonic()
    ended = command("--help")
    assert time.monotonic() - start < 1.0
    assert ended.returncode == 0 and all(f"--{key} = " in ended.stdout for key in KINDS)


def test_loading_a_config_imports_no_torch():
    ended = command("--job.config_file", "train_configs/quickstart.toml")
    assert ended.stdout == "False\n", ended.stderr


def test_print_config_shows_each_value_and_where_it_came_from(tmp_path):
    ended = command(
        "--job.config_file", path := write(tmp_path, "[training]\nsteps = 7"), "--optimizer.lr=1e-3", "--print-config"
    )
    assert ended.returncode == 0
    lines = {re.sub(r"\s+", " ", line) for line in ended.stdout.splitlines()}
    assert {f"steps = 7 # {path}:2", "lr = 0.001 # command line", "seq_len = 2048 # default"} <= lines
    assert ended.stdout.count(" # ") == len(KINDS)
