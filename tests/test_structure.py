"""The design's rules about the code itself, read with `ast`: nothing is imported here.

Import direction, no cycles, no reference libraries, no unpickling, sizes and names; the form of
experiments; the curriculum's table.
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESEARCH = sorted((ROOT / "research").rglob("*.py"))
EXPERIMENTS = sorted(p for p in (ROOT / "experiments").glob("*.py") if p.stem != "__init__")

# What a part of research/ may import of research/, besides itself. Parts that are not named may
# import any other, cycles apart.
MAY = {
    "types": set(),
    "compiled": set(),
    "paths": {"types"},
    "kernels": {"types", "compiled"},
    "losses": {"types"},
    "codes": {"types"},
    "weights": {"types", "paths", "kernels", "codes"},
    "models": {"types", "paths", "kernels", "weights", "codes"},
    "report": set(),
}
MAY_NOT = {"train": {"models", "losses", "weights"}, "runs": {"models", "losses", "weights"}}
FOREIGN = {"torch", "transformers", "peft", "trl", "bitsandbytes", "tensorflow", "keras"}
UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
MOST_LINES = 400


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in RESEARCH}


def imports(path):
    """Every module that a file imports, wherever in it; `from package import module` is the module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else node.module for name in names]
    return found


def part(module):
    return module.split(".")[1] if "." in module else ""


def ours(path):
    return [name for name in imports(path) if name == "research" or name.startswith("research.")]


def test_the_tree_is_read():
    assert {"research.types", "research.paths", "research.weights.base"} <= MODULES.keys()
    assert "research.types" in imports(MODULES["research.weights.base"])


def test_imports_flow_one_way():
    wrong = []
    for module, path in MODULES.items():
        here = part(module)
        for name in ours(path):
            there = part(name)
            allowed = there == here or there in MAY.get(here, {there})
            if not allowed or there in MAY_NOT.get(here, ()):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_nothing_in_research_knows_experiments_scripts_or_tests():
    outside = {"experiments", "scripts", "tests"}
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports(path)
        if name.split(".")[0] in outside
    ]
    assert not wrong


def test_only_plans_use_plans():
    users = {part(m) for m, path in MODULES.items() for name in ours(path) if part(name) == "plan"}
    assert users == {"plan"}


def test_there_are_no_import_cycles():
    graph = {module: {n for n in ours(path) if n in MODULES} for module, path in MODULES.items()}
    state = {}

    def visit(module, trail):
        if state.get(module) == "done":
            return
        assert state.get(module) != "open", " -> ".join([*trail, module])
        state[module] = "open"
        for name in sorted(graph[module] - {module}):
            visit(name, [*trail, module])
        state[module] = "done"

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("banned", [FOREIGN, UNPICKLING], ids=["reference", "unpickling"])
def test_research_imports_no(banned):
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports(path)
        if name.split(".")[0] in banned
    ]
    assert not wrong


def distribution(name):
    return re.sub("[-_.]+", "-", name).lower()


# Import names that are not the distribution's. Of `sentencepiece`, the model's message is protobuf's.
DISTRIBUTIONS = {"orbax": ["orbax-checkpoint"], "sentencepiece": ["sentencepiece", "protobuf"]}
PINNED = {
    file: {distribution(name) for name in re.findall(r"^([\w.-]+)==\S+$", text, re.MULTILINE)}
    for file in ("requirements.txt", "requirements-reference.txt", "requirements-trl.txt")
    for text in [(ROOT / file).read_text()]
}


def third_party(path):
    """Top-level names that a file imports, neither the standard library's nor ours."""
    beside = {each.stem for each in path.parent.glob("*.py")}  # a script's neighbours
    own = {"research", "experiments", "scripts", "tests"} | beside
    return {name.split(".")[0] for name in imports(path)} - own - set(sys.stdlib_module_names)


@pytest.mark.parametrize("folder", ["research", "experiments", "scripts"])
def test_what_is_imported_is_pinned(folder):
    wrong, met = [], set()
    for path in sorted((ROOT / folder).rglob("*.py")):
        found = third_party(path)
        # What compares with the reference libraries runs in their own environment.
        pinned = set().union(*PINNED.values()) if found & FOREIGN else PINNED["requirements.txt"]
        met |= found
        for name in sorted(found):
            missing = set(DISTRIBUTIONS.get(name, [distribution(name)])) - pinned
            wrong += [
                f"{path.relative_to(ROOT)}: {name} needs {each}, not pinned" for each in missing
            ]
    assert not wrong
    assert {"jax", "numpy"} <= met


def test_files_are_small_described_and_named_for_what_they_hold():
    wrong = []
    for path in RESEARCH:
        text = path.read_text()
        lines = len(text.splitlines())
        if lines > MOST_LINES:
            wrong.append(f"{path}: {lines} lines, more than {MOST_LINES}")
        if path.stem in ("utils", "util", "helpers", "common", "misc"):
            wrong.append(f"{path}: says nothing about what it holds")
        if text.strip() and ast.get_docstring(ast.parse(text)) is None:
            wrong.append(f"{path}: no module docstring")
    assert not wrong


def test_classes_are_neither_managers_nor_bases():
    wrong = [
        f"{path}: class {node.name}"
        for path in RESEARCH
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and re.search(r"^Base[A-Z]|Manager$", node.name)
    ]
    assert not wrong


def test_test_files_have_names_of_their_own():
    """pytest imports them by their file name alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def calls(tree, name):
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name
    ]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_how_to_run_it_and_has_a_smoke_run(path):
    tree = ast.parse(path.read_text())
    assert "Run:" in (ast.get_docstring(tree) or ""), "the docstring has no 'Run:' line"
    starts = calls(tree, "main")
    assert any(k.arg == "smoke" for call in starts for k in call.keywords), "no main(..., smoke=)"


CURRICULUM = ROOT / "docs" / "CURRICULUM.md"
CHAPTERS = [str(n) for n in range(1, 50)] + ["A", "B", "C", "D"]


def curriculum_rows():
    lines = CURRICULUM.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row for row in rows if row[0] in CHAPTERS}


def test_the_curriculum_has_every_chapter_with_module_experiment_and_result():
    rows = curriculum_rows()
    assert list(rows) == CHAPTERS
    assert {len(row) for row in rows.values()} == {5}
    assert not [chapter for chapter, row in rows.items() if not all(row)]


def test_what_the_curriculum_names_exists():
    named = [
        (chapter, name)
        for chapter, row in curriculum_rows().items()
        for cell in row[2:]
        for name in re.findall(r"`([^`]+)`", cell)
    ]
    missing = [
        f"chapter {chapter}: {name}" for chapter, name in named if not (ROOT / name).exists()
    ]
    assert named
    assert not missing


def test_a_chapter_that_names_nothing_says_that_it_is_not_built_yet():
    silent = [
        chapter
        for chapter, row in curriculum_rows().items()
        if not any("`" in cell for cell in row[2:])
        and not all(cell in ("not built yet", "–") for cell in row[2:])
    ]
    assert not silent
