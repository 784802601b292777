"""What the pages and the comments of the TOMLs name is there, and the commands that README.md shows are understood."""

import re
import shlex
from pathlib import Path

import pytest

import plan
from torchtitan_bio import config_loader

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
PAGES |= {f"train_configs/{path.name}": "\n".join(re.findall("#.*", path.read_text())) for path in ROOT.glob("train_configs/*")}
OF_A_RUN = {"config.toml"}  # in a run folder, not here


def commands():
    """(script, arguments) of each command in README.md's code blocks that starts a script of ours."""
    for block in re.findall(r"^```\n(.*?)^```", PAGES["README.md"], flags=re.M | re.S):
        for line in block.splitlines():
            if script := re.search(r"(?:^|[ /])(\w+\.(?:sh|py))(?= |$)", line):
                yield script[1], shlex.split(line[script.end() :], comments=True)


def settings_of(arguments):
    """What train.sh makes of its arguments."""
    return ["--job.config_file", *(arguments or ["train_configs/quickstart.toml"])]


def test_every_file_that_a_page_names_exists():
    files = ["/" + path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.*") if ".venv" not in path.parts]
    named = [(page, name) for page in PAGES for name in re.findall(r"\b[\w/.-]+\.(?:py|sh|toml|md|txt)\b", PAGES[page])]
    assert {"README.md", "CONTRIBUTING.md", "docs/benchmarks.md", "train_configs/quickstart.toml"} <= {
        page for page, _ in named
    }
    missing = [(page, name) for page, name in named if name not in OF_A_RUN and not any(f.endswith("/" + name) for f in files)]
    assert missing == []


def test_the_tour_visits_every_module_and_script():
    tour = PAGES["README.md"].partition("## A tour of the code")[2]
    modules = [*ROOT.glob("*.py"), *(ROOT / "torchtitan_bio").rglob("*.py")]
    assert [path.name for path in modules if path.name != "__init__.py" and not re.search(rf"\b{path.name}`", tour)] == []


def test_every_command_of_the_readme_is_a_configuration(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = []
    for script, arguments in commands():
        seen.append(script)
        assert (ROOT / script).exists(), script
        if script == "train.sh" and "--help" not in arguments:
            config_loader.load(settings_of([word for word in arguments if word != "--print-config"]))
        elif script == "plan.py":
            config_loader.load(plan.read_own_flags(arguments)[1])
    assert seen.count("train.sh") >= 7 and {"test.sh", "plan.py"} <= set(seen)


def test_no_two_commands_of_the_readme_ask_one_run_folder_for_different_runs(monkeypatch):
    """A reader types them one after the other, and a folder that holds another run is refused."""
    monkeypatch.chdir(ROOT)
    runs = {}
    for script, arguments in commands():
        if script == "train.sh" and not {"--help", "--print-config"} & set(arguments):
            config = config_loader.load(settings_of(arguments)).config
            runs.setdefault(config_loader.run_folder(config), set()).add(tuple(arguments))
    assert [settings for settings in runs.values() if len(settings) > 1] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_a_page_names_exists(page):
    words = re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", PAGES[page])
    files = ("py", "json", "jsonl", "toml", "md")
    named = {f"{section}.{key}" for section, key in words if section in config_loader.SECTIONS and key not in files}
    assert named - set(config_loader.KINDS) == set()
