"""The README and docs/: links, promises, and commands name what exists; imports follow the rules."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from commands import ROOT

from resnext.config import find_config, read_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python |torchrun .*?|sbatch .*?)((?:scripts/)?\w+\.(?:py|sbatch)\b.*)")
PLACEHOLDERS = {"NAME", "NAME.yaml", "my.yaml"}  # configurations that the reader writes


def read(path: Path | str) -> str:
    """Return the text of a file; `path` may be relative to the project."""
    return (ROOT / path).read_text(encoding="utf-8")


def code_lines(page: Path) -> list[str]:
    """Return the lines of code blocks, joined where they end with a backslash."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", read(page), re.M | re.S)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def commands() -> list[tuple[str, list[str]]]:
    """Return (page, words from the script on) of each command that runs a script."""
    found = [(page.name, COMMAND.search(line)) for page in PAGES for line in code_lines(page)]
    return [(name, shlex.split(match[1], comments=True)) for name, match in found if match]


def anchors(page: Path) -> set[str]:
    """Return the ids that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", read(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_something(page):
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert target.startswith("https:") or path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_promises_name_tests_that_exist():
    rows = re.findall(r"^\| P\d+: .*", read("docs/reliability.md"), re.M)
    assert len(rows) == 10
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row)
        assert tests, row
        for file, name in tests:
            source = read(next((ROOT / "tests").rglob(file)))
            assert not name or f"def {name}(" in source, name


def test_commands_name_scripts_and_options_that_exist():
    shown = commands()
    assert len(shown) > 60
    for page, (script, *words) in shown:
        source = read("train.py" if script == "scripts/train.sbatch" else script)
        if "resnext.arguments" in source:
            source += read("resnext/arguments.py")
        for word in words if script != "scripts/lua_flags.py" else ():
            assert not word.startswith("--") or f'"{word}"' in source, (page, script, word)


def test_commands_name_configurations_and_keys_that_exist():
    checked = 0
    for _, (script, *words) in commands():
        if script not in ("train.py", "scripts/train.sbatch") or "$KEYS" in words:
            continue
        if script == "scripts/train.sbatch":
            words = ["--config", *words]
        if "--config" not in words:
            continue
        name = words[words.index("--config") + 1]
        overrides = [word for word in words if re.match(r"[a-z]+\.\w+=", word)]
        read_config(None if name in PLACEHOLDERS else find_config(name), overrides)  # UserError otherwise
        checked += 1
    assert checked > 15


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [path for folder in ("data", "resnext") for path in (ROOT / folder).rglob("*.py")]
MODULES = {module_name(path) for path in SOURCES}


def imported(path: Path) -> set[str]:
    """Return the modules of data/ and resnext/ that a file imports."""
    package, found = path.relative_to(ROOT).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(parent + ([node.module] if node.module else []))
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names & MODULES or {module}
    return (found & MODULES) - {module_name(path)}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_data_and_resnext_are_separate(path):
    used = imported(path)
    if path.is_relative_to(ROOT / "resnext"):
        assert all(name.startswith("resnext") for name in used)
    else:
        known = {"config", "errors", "classes", "batch_plan", "distributed"}
        assert {name for name in used if name.startswith("resnext")} <= {f"resnext.{name}" for name in known}


def test_modules_import_in_one_direction():
    """Imports inside resnext/ follow the order of the table in architecture.md."""
    page = read("docs/architecture.md")
    rows = re.search(r"^\| row \| modules \|\n.*\n((?:\|.*\n)+)", page, re.M)[1]
    order = [f"resnext.{name}" for row in rows.splitlines() for name in re.findall(r"`([\w.]+)`", row)]
    order = ["resnext", *(name for name in order if name in MODULES)]
    for path in SOURCES:
        name = module_name(path)
        if name in order:
            own = {module for module in MODULES if module.startswith(f"{name}.")}
            assert imported(path) <= {*order[: order.index(name)], *own}, name
    unlisted = {name for name in MODULES if name.startswith("resnext.")} - set(order)
    assert unlisted <= {"resnext.engine", "resnext.models", "resnext.weights"} | {
        name for name in MODULES if name.startswith("resnext.config.")
    }


def test_the_tree_lists_every_file():
    page = read("docs/architecture.md")
    for folder in ("resnext", "data", "scripts"):
        block = re.search(rf"^```\n{folder}/\n(.*?)^```", page, re.M | re.S)[1]
        listed = {line.split()[0] for line in block.splitlines()}
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sbatch", ".txt")]
        names = {path.relative_to(ROOT / folder).as_posix() for path in files}
        assert {name for name in listed ^ names if not name.endswith("__init__.py")} == set()
