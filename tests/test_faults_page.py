"""docs/reliability.md is the table of all promises and faults; each names the tests that show it, and those are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.compile(r"`(tests/test_\w+\.py)::(test_\w+)`")


def rows(heading) -> dict[str, list[str]]:
    """The cells of each row of the first table under a heading, by the first cell."""
    under = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in under.splitlines() if line.startswith("| ")]
    return {first.strip(): rest for first, *rest in cells if first.strip().isdecimal()}


def defined(path) -> set[str]:
    """The tests of a file that are not skipped whatever happens."""
    found = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    skipped = {
        node.name for node in found if any(ast.unparse(mark).startswith("pytest.mark.skip(") for mark in node.decorator_list)
    }
    return {node.name for node in found if node.name.startswith("test_")} - skipped


@pytest.mark.parametrize("number", range(1, 13))
def test_each_promise_is_shown_by_tests_that_exist(number):
    promise, shown = rows("Promises")[str(number)]
    assert promise and NAMED.findall(shown)
    assert [(path, name) for path, name in NAMED.findall(shown) if name not in defined(path)] == []


@pytest.mark.parametrize("number", rows("Faults"))
def test_each_fault_is_injected_by_tests_that_exist(number):
    fault, injection, holds, shown = rows("Faults")[number]
    assert fault and injection and holds and NAMED.findall(shown)
    assert [(path, name) for path, name in NAMED.findall(shown) if name not in defined(path)] == []


def test_the_page_has_the_27_rows_of_the_specification_and_whatever_test_faults_injects():
    assert list(rows("Faults")) == [str(number + 1) for number in range(len(rows("Faults")))] and len(rows("Faults")) >= 27
    assert {name for path, name in NAMED.findall(PAGE) if path == "tests/test_faults.py"} == defined("tests/test_faults.py")
