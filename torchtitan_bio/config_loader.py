"""From a TOML file and the command line to a Config, strictly: what is not understood is refused, all of it at once.

Precedence: command line, then the TOML file, then the default. A run that would start with a misspelt key never starts.
"""

import ast
import difflib
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from torchtitan_bio import config as manual
from torchtitan_bio.config import Config, ConfigError
from torchtitan_bio.config_moved import GONE, GONE_SECTIONS, MOVED, OTHER_UNIT, REWORDED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTIONS = {section.name: section.type for section in fields(Config)}
KINDS = {f"{name}.{key.name}": key.type for name, section in SECTIONS.items() for key in fields(section)}
DEFAULT, COMMAND_LINE = "default", "command line"


@dataclass(frozen=True)
class Loaded:
    config: Config
    origin: dict[str, str]
    """Of each section.key: "default", "file:line" or "command line"; both for a free table that has entries from both."""
    warnings: list[str]


class Setting(NamedTuple):
    """One value as it was given: `path` is (section, key), or (section, key, name) inside a free table."""

    path: tuple[str, ...]
    value: Any
    origin: str


def load(argv: list[str]) -> Loaded:
    """The config that `argv` asks for; ConfigError with every problem of the file and of the command line."""
    given, problems = _read_arguments(argv)
    path = next((setting.value for setting in given if setting.path == ("job", "config_file")), "")
    written, unreadable = _read_file(path) if path else ([], [])
    problems += unreadable
    # A file that says which file it was made from (dump does) keeps that name, so that it means the same run folder.
    if any(setting.path == ("job", "config_file") for setting in written):
        given = [setting for setting in given if setting.path != ("job", "config_file")]

    values: dict[str, Any] = {}
    origin = dict.fromkeys(KINDS, DEFAULT)
    told = set()
    for setting in written + sorted(given, key=lambda setting: len(setting.path)):
        try:
            value = _accept(setting)
        except ConfigError as error:
            # A section that does not exist is one problem of its file, whatever stands in it.
            complaint = (setting.origin.partition(":")[0], str(error))
            if complaint not in told:
                problems.append((setting.origin, str(error)))
            told.add(complaint)
            continue
        if len(setting.path) == 1:
            continue
        key = ".".join(setting.path[:2])
        is_whole = len(setting.path) == 2
        values[key] = value if is_whole else {**values.get(key, {}), setting.path[2]: value}
        if is_whole or origin[key] == DEFAULT:
            origin[key] = setting.origin
        elif setting.origin == COMMAND_LINE and not origin[key].endswith(COMMAND_LINE):
            origin[key] += f", {COMMAND_LINE}"

    sections = {}
    for name, section in SECTIONS.items():
        try:
            sections[name] = section(
                **{key.name: values[k] for key in fields(section) if (k := f"{name}.{key.name}") in values}
            )
        except ConfigError as error:
            problems += [(origin[text.partition("=")[0]], text) for text in error.problems]
    if problems:
        in_order = sorted(problems, key=lambda problem: _line(problem[0]))
        raise ConfigError(*(f"{place}: {text}" for place, text in in_order))
    config = Config(**sections)
    return Loaded(config, origin, _warnings(config))


def load_or_exit(argv: list[str]) -> Loaded:
    """load for a root script: --help and --print-config exit with 0; a ConfigError is told on stderr and exits with 2."""
    # Under torchrun every rank comes here; one of them speaks.
    speaks = os.environ.get("RANK", "0") == "0"
    if "--help" in argv or "-h" in argv:
        if speaks:
            print(manual_page())
        raise SystemExit(0)
    try:
        loaded = load([word for word in argv if word != "--print-config"])
    except ConfigError as error:
        if speaks:
            print(f"{len(error.problems)} problem(s) in the config:", *error.problems, sep="\n  ", file=sys.stderr)
        raise SystemExit(2) from None
    if "--print-config" in argv:
        if speaks:
            print(dump(loaded.config, loaded.origin), end="")
        raise SystemExit(0)
    return loaded


def run_folder(config: Config) -> Path:
    """Where everything of this run lies: job.dump_folder, or outputs/<name of the TOML>."""
    return Path(config.job.dump_folder or Path("outputs") / (Path(config.job.config_file).stem or "defaults"))


def _line(place: str) -> int:
    """The line of a "file:line"; what comes from the command line stands before them."""
    line = place.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def _warnings(config: Config) -> list[str]:
    warnings = []
    warmup, steps = config.lr_scheduler.warmup_steps, config.training.steps
    if warmup > steps:
        warnings.append(f"lr_scheduler.warmup_steps={warmup} is longer than the run: shortened to training.steps={steps}")
    held_out = (config.validation.source or config.data.source, config.validation.split)
    if config.validation.enable and held_out == (config.data.source, config.data.split):
        warnings.append(f'nothing is held out: validation.split="{held_out[1]}" of {held_out[0]} is what the run trains on')
    return warnings


# ---- reading: the two sources, as settings with an origin ----


def _read_arguments(argv: list[str]) -> tuple[list[Setting], list[tuple[str, str]]]:
    """`--section.key value` and `--section.key=value` as settings; text becomes a value by the type of its key."""
    settings, problems, seen = [], [], set()
    words = list(argv)
    while words:
        name, has_value, text = words.pop(0).partition("=")
        if not name.startswith("--"):
            problems.append((COMMAND_LINE, f"{name!r} is not an argument; settings are --section.key value"))
            continue
        if not has_value and words and not words[0].startswith("--"):
            has_value, text = True, words.pop(0)
        path = tuple(name[2:].split(".", 2))
        if len(path) == 1:
            near = _near(path[0], dashes=True)
            problems.append((COMMAND_LINE, f"{name} is not an argument; settings are --section.key value{near}"))
        elif not has_value and name[2:] in KINDS:
            example = "true" if KINDS[name[2:]] is bool else "VALUE"
            problems.append((COMMAND_LINE, f"{name} needs a value: {name} {example}"))
        elif path in seen:
            problems.append((COMMAND_LINE, f"{name} is given twice"))
        else:
            seen.add(path)
            kind = KINDS.get(".".join(path[:2]))
            value = text if kind is None else _from_text(kind if len(path) == 2 else _kind_of_entries(kind), text)
            settings.append(Setting(path, value, COMMAND_LINE))
    return settings, problems


def _read_file(path: str) -> tuple[list[Setting], list[tuple[str, str]]]:
    """The settings of a TOML file, as many as can be read, and what cannot."""
    file, problems = Path(path), []
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [other.name for other in file.parent.glob("*.toml")], n=1)
        question = f"; did you mean {file.parent / near[0]}?" if near else ""
        return [], [(COMMAND_LINE, f"job.config_file={path} does not exist{question}")]
    except (OSError, UnicodeDecodeError) as error:
        return [], [(COMMAND_LINE, f"job.config_file={path} cannot be read: {error}")]
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).partition(" (at ")
        line = re.match(r"line (\d+)", place)
        problems.append((f"{path}:{line[1] if line else len(text.splitlines())}", f"not TOML: {message}"))
    return [Setting(keys, value, f"{path}:{line}") for keys, value, line in _statements(text)], problems


def _statements(text: str):
    """(path, value, line) of everything in a TOML text, statement by statement: tomllib tells values but not where they stand.

    A statement is the fewest lines that are TOML by themselves. A line that is part of none is passed over.
    """
    lines = text.split("\n")
    table: tuple[str, ...] = ()
    start = 0
    while start < len(lines):
        for end in range(start + 1, len(lines) + 1):
            try:
                statement = tomllib.loads("\n".join(lines[start:end]))
            except tomllib.TOMLDecodeError:
                continue
            if lines[start].lstrip().startswith("["):
                ((table, value),) = _leaves((), statement)
                yield table, value, start + 1
            elif statement:
                yield from ((path, value, start + 1) for path, value in _leaves(table, statement))
            break
        else:
            end = start + 1
        start = end


def _leaves(path: tuple[str, ...], value):
    """(path, value) of all that is no table, or an empty one."""
    if not isinstance(value, dict) or not value:
        return [(path, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves((*path, key), inner)]


# ---- judging: one setting against the manual ----


def _accept(setting: Setting):
    """The value in the type of its key; ConfigError when there is no such key or the value is of another type."""
    path, value = setting.path, setting.value
    section, key = path[0], ".".join(path[:2])
    if key in SECTIONS:
        if value == {}:
            return value
        raise ConfigError(f"{section} is a section: write [{section}] and its keys in the lines below")
    if key not in KINDS:
        raise ConfigError(_unknown(path, is_header=value == {}))
    kind = KINDS[key]
    if len(path) > 2 and not _is_table(kind):
        raise ConfigError(f"{key} is not a table; it is {_words(kind)}")
    if len(path) > 3:
        raise ConfigError(f"{key} is a table of plain names; write {json.dumps('.'.join(path[2:]))} in quotes")
    full = ".".join(path)
    if isinstance(value, str | int) and (key, value) in REWORDED:
        raise ConfigError(f"{key}={toml(value)} {REWORDED[key, value]}")
    kind = kind if len(path) == 2 else _kind_of_entries(kind)
    try:
        return _as(kind, value)
    except (TypeError, OverflowError):
        raise ConfigError(f"{full}={toml(value)} must be {_words(kind)}") from None


def _unknown(path: tuple[str, ...], is_header: bool) -> str:
    section, key = path[0], ".".join(path[:2])
    if key in MOVED:
        return ", ".join([f"{key} is called {MOVED[key]} here", *([OTHER_UNIT[key]] if key in OTHER_UNIT else [])])
    for pattern, reason in GONE.items():
        if fnmatchcase(key, pattern):
            return f"{key} does not exist here: {reason}"
    if section in SECTIONS or (len(path) == 1 and not is_header):
        return f"{key} is not a setting{_near(key)}"
    if section in GONE_SECTIONS:
        return f"[{section}] does not exist here: {GONE_SECTIONS[section]}"
    near = difflib.get_close_matches(section, SECTIONS, n=1)
    return f"[{section}] is not a section; " + (f"did you mean [{near[0]}]?" if near else f"sections are {', '.join(SECTIONS)}")


def _near(name: str, dashes: bool = False) -> str:
    """A question that names the key which was probably meant: of the same name elsewhere, else spelt alike."""
    section, _, key = name.rpartition(".")
    same = [other for other in KINDS if other.partition(".")[2] == key]
    siblings = {other.partition(".")[2]: other for other in KINDS if other.startswith(f"{section}.") or not section}
    alike = [siblings[match] for match in difflib.get_close_matches(key, siblings, n=1)]
    near = same or alike or difflib.get_close_matches(name, KINDS, n=1)
    return f"; did you mean {'--' * dashes}{near[0]}?" if near else ""


def _is_table(kind) -> bool:
    return kind is dict or get_origin(kind) is dict


def _kind_of_entries(kind):
    return get_args(kind)[1] if get_origin(kind) is dict else Any


def _as(kind, value):
    """The value as `kind`, an integer as a float where one is meant; TypeError when it is of another kind."""
    arms = get_args(kind)
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (str, bool, int) and type(value) is kind:
        return value
    if get_origin(kind) is Literal and isinstance(value, str) and value in arms:
        return value
    if get_origin(kind) is list and isinstance(value, list):
        return [_as(arms[0], item) for item in value]
    if _is_table(kind) and isinstance(value, dict):
        return {name: _as(_kind_of_entries(kind), item) for name, item in value.items()}
    if kind is Any and isinstance(value, str | int | float):
        return value
    if kind is Any and isinstance(value, list):
        return [_as(Any, item) for item in value]
    if get_origin(kind) in (Union, UnionType):
        for arm in arms:
            try:
                return _as(arm, value)
            except TypeError:
                continue
    raise TypeError(kind)


def _from_text(kind, text: str):
    """A command-line value: verbatim where a string is meant, else TOML; what is not TOML stays text, for _as to judge."""
    if kind is str or get_origin(kind) is Literal:
        return text
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return document["value"] if len(document) == 1 else text


def _words(kind) -> str:
    plain = {
        str: "a string",
        bool: "true or false",
        int: "an integer",
        float: "a number",
        Any: "a string, a number, true, false or a list",
    }
    if kind in plain:
        return plain[kind]
    if _is_table(kind):
        return "a table"
    if get_origin(kind) is list:
        return 'a list of strings, such as ["a", "b"]'
    return " or ".join(toml(arm) if isinstance(arm, str) else _words(arm) for arm in get_args(kind))


# ---- writing: the same values as TOML, and the manual ----


def toml(value) -> str:
    """A value as TOML 1.0, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        entries = [
            f"{name if re.fullmatch('[A-Za-z0-9_-]+', name) else toml(name)} = {toml(item)}" for name, item in value.items()
        ]
        return f"{{ {', '.join(entries)} }}" if entries else "{}"
    return str(value)


def dump(config: Config, origin: dict[str, str] | None = None) -> str:
    """The whole config as TOML 1.0, which loads back to an equal one; `origin` adds where each value came from as a comment."""
    lines = []
    for name in SECTIONS:
        lines += [f"[{name}]"]
        for key in fields(SECTIONS[name]):
            line = f"{key.name} = {toml(getattr(getattr(config, name), key.name))}"
            lines.append(f"{line:<48}  # {origin[f'{name}.{key.name}']}" if origin else line)
        lines.append("")
    return "\n".join(lines)


def manual_page() -> str:
    """config.py for the terminal: every key with its type, its default and the docstring that stands under it."""
    pages = [
        "Settings come from the command line, then from the TOML file, then from the defaults below.",
        "",
        "  --job.config_file FILE     the TOML file",
        "  --section.key VALUE        one setting, also --section.key=VALUE; lists and tables as in TOML",
        "  --print-config             print every value and where it came from",
    ]
    for section in ast.parse(Path(manual.__file__).read_text(encoding="utf-8")).body:
        name = manual.SECTION_OF.get(getattr(section, "name", ""))
        if not name:
            continue
        pages += ["", f"[{name}]"]
        for entry, below in pairwise(section.body):
            if isinstance(entry, ast.AnnAssign):
                default = toml(getattr(SECTIONS[name](), entry.target.id))
                pages.append(f"  --{name}.{entry.target.id} = {default}   ({_words(KINDS[f'{name}.{entry.target.id}'])})")
                pages += textwrap.wrap(
                    " ".join(below.value.value.split()), 110, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
    return "\n".join(pages)
