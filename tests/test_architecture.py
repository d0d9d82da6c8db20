"""The import rules of the package: layers, one file an engine, nothing heavy where it isn't wanted."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dist_train"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    ("errors",),
    ("files", "progress", "config", "ranks", "node"),
    ("crystal",),
    ("models",),
    ("shards",),
    (
        "training",
        "generate",
        "generated",
        "screens",
        "embed",
        "latent_quality",
        "latents",
        "steer",
        "serving",
        "model_card",
        "evaluate",
        "generation_metrics",
        "report",
        "densities",
        "evaluate_report",
        "generate_report",
        "training_report",
        "figures",
        "tables",
        "bench",
        "dataset_card",
        "inspect_sample",
        "forecast",
    ),
    ("backends",),
    ("commands", "bench_frames", "bench_generate", "bench_shard", "bench_train"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
"""From the ground up; a module imports only from its own layer or from below it."""

ENGINES = {
    "ray": "backends/ray_voxelize.py backends/ray_data.py backends/ray_embed.py",
    "deepspeed": "backends/deepspeed_engine.py",
    "mlflow": "backends/mlflow_tracker.py backends/mlflow_registry.py backends/mlflow_model.py",
    "pymatgen": "crystal/interop.py",
    "smact": "crystal/validity.py",
    "matminer": "crystal/fingerprints.py",
    "ase": "crystal/interop.py crystal/relax.py",
    "gemmi": "crystal/cif.py",
}


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, inside functions too; type-only imports don't run and don't count."""
    tree = ast.parse(path.read_text())
    type_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int:
    name = module.split(".")[1]
    found = [height for height, names in enumerate(LAYERS) if name in names]
    assert found, f"{module} has no layer: add it to LAYERS"
    return found[0]


FORBIDDEN = ("torch.load", "pickle.load", "pickle.loads", "cloudpickle.loads", "joblib.load", "eval", "exec")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_from_their_layer_or_below(path: Path) -> None:
    name = ".".join(("dist_train", *path.relative_to(PACKAGE).with_suffix("").parts))
    if name == "dist_train.__init__":
        assert not list(imports(path))
        return
    for used in imports(path):
        if used.startswith("dist_train.") and used.split(".")[1] not in ("__version__", "__file__"):
            assert layer(used) <= layer(name), f"{name} imports {used}, which lies above it"


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_is_imported_in_its_files_alone(engine: str) -> None:
    users = {str(path.relative_to(PACKAGE)) for path in FILES for used in imports(path) if used.split(".")[0] == engine}
    assert users == {*ENGINES[engine].split()}


def loaded_after(code: str) -> set[str]:
    """Top-level modules in memory after some code, in a fresh process."""
    script = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_what_a_ray_worker_imports_holds_no_torch() -> None:
    loaded = loaded_after("import dist_train.shards.plan, dist_train.shards.writer, dist_train.backends.ray_voxelize")
    assert not loaded & {"torch", "deepspeed", "mlflow", "pymatgen", "ase", "matplotlib"}


def test_generating_needs_neither_ray_nor_deepspeed_nor_mlflow() -> None:
    loaded = loaded_after(
        "import dist_train.generate, dist_train.commands.generation, dist_train.commands.training, dist_train.commands.embed"
    )
    assert not loaded & {"ray", "deepspeed", "mlflow"}


def test_the_command_line_loads_no_engine_before_a_verb_asks_for_it() -> None:
    loaded = loaded_after("import dist_train.cli")
    assert not loaded & {"torch", "ray", "deepspeed", "mlflow", "pymatgen", "ase", "numba", "pydantic", "matplotlib"}


def test_no_code_is_unpickled_or_evaluated_outside_the_audited_module() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            unsafe = call in FORBIDDEN or call.endswith(".extractall")
            assert not unsafe or path.name == "checkpoint.py", f"{path}:{node.lineno}: {call}"
            assert not any(k.arg == "shell" for k in node.keywords), f"{path}:{node.lineno}: shell"
