"""The rules that keep the layout simple, held by reading the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sqa_convert"
LAYERS = [  # a module may import only from lines below its own; within a folder, freely
    {"cli"},
    {"conversion", "speed", "uptraining"},
    {"preflight"},
    {"describe"},
    {"card", "hub", "page", "run_folder"},
    {"calibrate", "training"},
    {"calibration_text", "trainable", "trainer", "training_data"},
    {"activations", "engines", "generation", "tasks"},
    {"verify"},
    {"evaluation", "execution", "report"},
    {"shards", "sites"},
    {"batches", "data", "output", "pictures", "plan"},
    {"text_files"},
    {"text_formats"},
    {"checkpoint", "fingerprint", "stored"},
    {"pipelines"},
    {"adapters", "families", "source_card", "sources"},
    {"companions"},
    {"checks", "heads", "recipe", "workloads"},
    {"distill", "flops", "sampling", "text_fit", "timing"},
    {"decoding"},
    {"amounts", "devices", "processes", "storage"},
    {"callers", "errors", "figures", "models", "progress", "recipe_hints", "special_tokens"},
]
LIGHT = [
    "adapters",
    "companions",
    "amounts",
    "callers",
    "preflight",
    "__init__",
    "__main__",
    "checks",
    "errors",
    "fingerprint",
    "recipe",
    "recipe_hints",
    "plan",
    "checkpoint",
    "source_card",
    "sources",
    "storage",
    "stored",
    "cli",
    "families",
    "heads",
    "output",
    "pictures",
    "report",
    "card",
    "describe",
    "hub",
    "page",
    "pipelines",
    "progress",
    "shards",
    "sites",
    "special_tokens",
    "execution",
    "conversion",
    "data",
    "text_files",
    "text_formats",
]
MATHEMATICS = {"attention", "circuits", "refine", "refit", "search", "statistics"}  # loaded when a site is computed
HEAVY = {"torch", "transformers", "datasets", "accelerate"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def unit(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, top_level_only=False):
    """(package-internal unit or None, outside package or None) of every import that runs, type checking apart."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    if top_level_only:
        skipped |= {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
        }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield None, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield None, node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            for name in [node.module.split(".")[0]] if node.module else [a.name for a in node.names]:
                yield name, None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    mine = unit(path)
    if mine in ("__init__", "__main__"):
        return
    for target, _ in imports(path):
        if target not in (None, "__version__", mine):
            assert level[target] > level[mine], f"{path.name} imports {target}"


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if unit(p) in LIGHT and p.stem not in MATHEMATICS],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_light_modules_load_no_heavy_library_at_their_top(path):
    assert not {outside for _, outside in imports(path, top_level_only=True)} & HEAVY


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*_sqa_*.py")), ids=lambda p: p.name)
def test_shipped_model_files_stand_alone(path):
    siblings = {p.stem for p in (PACKAGE / "models").glob("*.py")}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level in (0, 1)
            assert node.level == 0 or node.module in siblings
    outside = {name for _, name in imports(path)} - {None}
    assert outside <= {"torch", "transformers", "huggingface_hub", "copy"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_commands_print_or_exit(path):
    calls = {getattr(n.func, "id", "") for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
    assert unit(path) == "cli" or not calls & {"print", "exit", "quit", "input"}


def test_public_names_resolve():
    import sqa_convert

    for name in sqa_convert.__all__:
        assert getattr(sqa_convert, name) is not None
    with pytest.raises(AttributeError):
        _ = sqa_convert.nothing
    from sqa_convert import convert, evaluate, uptrain

    assert callable(convert) and callable(evaluate) and callable(uptrain)
