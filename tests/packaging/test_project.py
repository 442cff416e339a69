"""pyproject.toml and the version files say what the tree is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What the tests' environment has beside mtt's dependencies.
TOOLS = [
    requirement
    for extra in ("test", "docs", "megatron")
    for requirement in PROJECT["project"]["optional-dependencies"][extra]
]
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9-]+)(?P<bounds>.*)")


def pins(file_name: str) -> dict[str, str]:
    """The `name==version` lines of a constraints file."""
    lines = (line.strip() for line in (ROOT / file_name).read_text().splitlines())
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9-]+==[0-9.]+", line) for line in wanted), wanted
    return dict(line.split("==") for line in wanted)


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """`torch>=2.11,<3` -> {"torch": "2.11"}."""
    found = [REQUIREMENT.fullmatch(requirement) for requirement in requirements]
    bounds = {match["name"]: re.search(r">=([0-9.]+)", match["bounds"]) for match in found if match}
    assert all(bounds.values()), requirements
    return {name: bound[1] for name, bound in bounds.items() if bound}


def test_every_folder_of_modules_is_a_declared_package():
    """A new folder under convert/ that pyproject.toml does not name is absent from the wheel."""
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("convert", "modeling_mtt")
        for path in (ROOT / top).rglob("*.py")
    }
    in_tree = {
        ".".join(folder.parts).replace("convert", "mtt_convert", 1)
        for folder in folders
        if not folder.as_posix().startswith("convert/sample")
    }
    assert in_tree == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("package", PROJECT["tool"]["setuptools"]["packages"])
def test_every_package_has_an_init(package: str):
    top, *rest = package.split(".")
    folder = ROOT.joinpath({"mtt_convert": "convert"}.get(top, top), *rest)
    assert (folder / "__init__.py").is_file()


def test_the_tour_names_every_module():
    """CONTRIBUTING.md has one line per module, and none for a module that is gone."""
    tour = (ROOT / "CONTRIBUTING.md").read_text().split("## Codebase tour")[1].split("\n## ")[0]
    named = re.findall(r"^ *- `((?:convert|modeling_mtt)/\S+\.py)`: \S", tour, re.MULTILINE)
    modules = {
        path.relative_to(ROOT).as_posix()
        for top in ("convert", "modeling_mtt")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(named) == sorted(name for name in modules if "/sample" not in name)


def test_hub_code_is_flat():
    """transformers copies remote code by base name: a sub-folder of modeling_mtt would be lost."""
    modules = (ROOT / "modeling_mtt").rglob("*.py")
    assert {module.parent for module in modules} == {ROOT / "modeling_mtt"}


def test_no_text_has_the_marks_of_a_merge():
    """Python refuses them itself; pages show them to their readers."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/*.md")]
    marked = [
        path.relative_to(ROOT).as_posix()
        for path in pages
        if re.search(r"^(<{7}|={7}|>{7})( |$)", path.read_text(), re.MULTILINE)
    ]
    assert len(pages) > 10 and not marked


def test_lowest_constraints_are_the_lower_bounds():
    declared = lower_bounds(PROJECT["project"]["dependencies"])
    lowest = pins("constraints-lowest.txt")
    assert declared.pop("torch")  # named on the command line of `make test-lowest`
    assert "torch" not in lowest
    assert {name: lowest.get(name) for name in declared} == declared


def test_constraints_pin_everything_we_ask_for():
    asked = [*PROJECT["project"]["dependencies"], *TOOLS]
    assert set(lower_bounds(asked)) <= set(pins("constraints.txt"))
    assert set(lower_bounds(asked)) - {"torch"} <= set(pins("constraints-lowest.txt"))


def test_both_constraints_use_the_same_tools():
    """Only what users install differs between the two environments, never what judges it."""
    tools = lower_bounds(TOOLS)
    del tools["setuptools"]  # its lowest version is a promise of [build-system]
    newest, lowest = pins("constraints.txt"), pins("constraints-lowest.txt")
    assert {tool: newest[tool] for tool in tools} == {tool: lowest[tool] for tool in tools}


def test_the_build_works_with_the_lowest_setuptools():
    declared = lower_bounds(PROJECT["build-system"]["requires"])
    assert declared["setuptools"] == pins("constraints-lowest.txt")["setuptools"]


def test_committed_goldens_stay_small():
    sizes = [path.lstat().st_size for path in (ROOT / "tests" / "golden").rglob("*")]
    assert 0 < sum(sizes) <= 4_000_000
