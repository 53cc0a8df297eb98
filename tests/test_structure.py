"""The shape of the package: imports run one way, files and functions stay small."""

import ast
import importlib
import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jft").rglob("*.py"))
MOST_FILE_LINES = 350
MOST_FUNCTION_LINES = 60

# A module may import modules of its own rank or below. The longest prefix counts.
RANKS: dict[str, float] = {
    "jft": 10,
    "jft.errors": 0,
    "jft.tree": 0,
    "jft.costs": 5,
    "jft.costs.products": 0,
    "jft.values": 0,
    "jft.hugepages": 0,
    "jft.compilation_cache": 0,
    "jft.memory_room": 0,
    "jft.keys": 0,
    "jft.input_keys": 0,
    "jft.training_keys": 0,
    "jft.stack_names": 0,
    "jft.models.layers": 0,
    "jft.models.scan": 0.5,
    "jft.models.forms": 0,
    "jft.models.table": 0,
    "jft.models.family": 0,
    "jft.models": 1,
    "jft.models.family_files": 0.5,
    "jft.models.nnx_names": 0,
    "jft.models.zoo": 1.5,
    "jft.losses": 1.5,
    "jft.metrics": 1.5,
    "jft.evaluation.measures": 1.5,
    "jft.evaluation.scores": 1.5,
    "jft.evaluation.ranking": 1.5,
    "jft.evaluation.calibration": 1.5,
    "jft.evaluation.split_scores": 1.6,
    "jft.report": 1.5,
    "jft.weights": 2,
    "jft.freeze": 2,
    "jft.freeze.cut": 5,
    "jft.freeze.prefix": 5,
    "jft.freeze.entry_store": 5,
    "jft.freeze.cache_choice": 5,
    "jft.data": 2,
    "jft.train.schedules": 2,
    "jft.train.rates": 2,
    "jft.train.precision": 2,
    "jft.train.optimizers": 2,
    "jft.train.averages": 2,
    "jft.train.stacks": 2,
    "jft.train.transforms": 2.5,
    "jft.train.optim": 2.5,
    "jft.train.draws": 3,
    "jft.train.teacher": 3,
    "jft.train.ema": 3,
    "jft.train.sharpness": 3,
    "jft.train.state": 3,
    "jft.train.micro": 3,
    "jft.train.accumulate": 3,
    "jft.train.step_parts": 4,
    "jft.train.step": 4,
    "jft.train.evaluator": 5.9,
    "jft.train.parallel": 4,
    "jft.train": 5,
    "jft.evaluation.table": 4.9,
    "jft.evaluation": 5,
    "jft.weights.export": 5,
    "jft.weights.certificate": 5,
    "jft.train.run": 5.5,
    "jft.train.inputs": 5.3,
    "jft.train.feed": 5.6,
    "jft.train.guarantee": 5.6,
    "jft.train.compiled": 5.7,
    "jft.train.decisions": 5.7,
    "jft.train.eta": 5.7,
    "jft.train.rows": 5.8,
    "jft.train.trial": 5.7,
    "jft.train.range_test": 5.8,
    "jft.train.ending": 5.7,
    "jft.train.loop": 6,
    "jft.config_file": 7,
    "jft.config": 7,
    "jft.task": 7.5,
    "jft.overview": 7.7,
    "jft.provenance": 2,
    "jft.samples": 8,
    "jft.caching": 7.8,
    "jft.run_files": 7.8,
    "jft.parts": 7.8,
    "jft.saved": 7.8,
    "jft.distill": 7.9,
    "jft.batches": 7.8,
    "jft.baselines": 8,
    "jft.prepare": 8,
    "jft.evaluation.prediction": 8,
    "jft.trained": 8.2,
    "jft.lr_find": 8.2,
    "jft.dry_run": 8.2,
    "jft.verbs": 8.5,
    "jft.doctor": 8.5,
    "jft.cli": 9,
    "jft.__main__": 9,
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank_of(module: str) -> float | None:
    prefixes = [module.rsplit(".", cut)[0] for cut in range(module.count("."))] + [module]
    known = [prefix for prefix in prefixes if prefix in RANKS]
    return RANKS[max(known, key=len)] if known else None


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Returns (module of jft, line) for each import in a file, those within functions included."""
    modules = {name_of(file) for file in FILES}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in modules else node.module, node.lineno))
    return [(name, line) for name, line in found if name.split(".")[0] == "jft"]


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def test_every_module_has_a_rank():
    unranked = [name_of(path) for path in FILES if rank_of(name_of(path)) is None]
    assert not unranked


def test_a_module_never_imports_a_higher_rank():
    wrong = []
    for path in FILES:
        module = name_of(path)
        for imported, line in imports_of(path):
            own, other = rank_of(module) or 0, rank_of(imported) or 0
            if module != "jft" and other > own:
                wrong.append(f"{path.name}:{line}: {module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle():
    edges = {name_of(path): {name for name, _ in imports_of(path)} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for imported in edges.get(module, ()):
                if imported != module:
                    visit(imported, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_files_stay_below_the_ceiling():
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: size for name, size in sizes.items() if size > MOST_FILE_LINES}


def test_functions_stay_below_the_ceiling():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES
        for node in functions_of(path)
        if node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES
    ]
    assert not long


def test_no_name_that_says_nothing():
    empty = {"util", "utils", "common", "helper", "helpers", "misc", "core", "base"}
    assert not [name_of(path) for path in FILES if empty & set(name_of(path).split("."))]


def test_package_inits_are_empty_but_the_first():
    inits = [path for path in FILES if path.name == "__init__.py" and path.parent != ROOT / "jft"]
    assert not [name_of(path) for path in inits if path.read_text().strip()]


def test_the_wheel_holds_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {name_of(path.parent / "__init__.py") for path in FILES}
    assert sorted(packages | {"jft.configs"}) == sorted(listed)


@pytest.mark.parametrize("module", [name_of(path) for path in FILES if path.stem != "__main__"])
def test_every_module_imports(module):
    assert importlib.import_module(module).__name__ == module


def test_no_module_takes_the_name_of_a_public_function():
    jft = importlib.import_module("jft")
    assert not [name for name in jft.__all__ if importlib.util.find_spec(f"jft.{name}")]
