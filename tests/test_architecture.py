"""The rules that keep the layout simple, held by reading the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sqa_convert"
FLOORS = [  # a folder, or a module beside them, may import only from floors below its own
    {"cli"},
    {"pipeline"},
    {"torch_models", "uptraining"},
    {"calibration", "publish", "speed"},
    {"evaluation", "report"},
    {"conversion"},
    {"text"},
    {"checkpoints"},
    {"families", "layers"},
    {"devices", "heads", "parse_amounts"},
    {"caller_settings"},
    {"flags_as_arguments"},
    {"errors", "models", "progress", "random_generators"},
]
HEAVY = {"torch", "transformers", "datasets", "accelerate"}
MAY_BE_HEAVY = {
    "calibration",
    "devices",
    "evaluation",
    "layers",
    "models",
    "pipeline",
    "speed",
    "text",
    "torch_models",
    "uptraining",
}
"""places that are imported when something is computed; all others answer `--help` and `--dry-run`"""
LIGHT = {
    "text/documents.py",
    "text/find_files.py",
    "text/formats.py",
    "text/suitability.py",
    "pipeline/convert.py",
    "pipeline/go_on_with_calibration.py",
    "pipeline/run.py",
    "pipeline/run_options.py",
    "pipeline/preflight.py",
    "uptraining/recipe.py",
    "uptraining/recipe_rules.py",
    "uptraining/other_trainers_names.py",
}
MATHEMATICS = {
    "attend",
    "cheapest_sets",
    "group_cost",
    "merge_circuits",
    "refine",
    "refit",
    "restored_half",
    "search",
    "one_thread",
    "site_inputs",
    "statistics",
}
"""modules of heads/ that are loaded when a site is computed"""
MOST_LINES = 300  # of a module
MOST_BODY = 80  # lines of a function, its docstring too; its signature, which may be a list of options, apart
SOURCES = sorted(PACKAGE.rglob("*.py"))


def place(path):
    """The folder of a module, or the module that lies beside the folders."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_light(path):
    name = path.relative_to(PACKAGE).as_posix()
    if name in LIGHT:
        return True
    return place(path) not in MAY_BE_HEAVY and not (place(path) == "heads" and path.stem in MATHEMATICS)


def nodes(path, top_level_only=False):
    """Every import that runs, type checking apart."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if (isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING")
        or (top_level_only and isinstance(branch, ast.FunctionDef))
        for node in ast.walk(branch)
    }
    return [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in skipped]


def outside(path, top_level_only=False):
    """Packages other than this one."""
    found = set()
    for node in nodes(path, top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def inside(path):
    """Modules of this package, as paths."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (
                path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                if node.module
                else path.parents[node.level - 1]
            )
            for name in [alias.name for alias in node.names]:
                options = (
                    base / f"{name}.py",
                    base / name / "__init__.py",
                    base.with_suffix(".py"),
                    base / "__init__.py",
                )
                found.add(next(option for option in options if option.is_file()))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    mine = place(path)
    if mine in ("__init__", "__main__"):
        return
    for target in map(place, inside(path)):
        if target not in ("__init__", mine):
            assert floor[target] > floor[mine], f"{path.name} imports {target}"


def test_the_floors_are_told_to_contributors():
    told = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    assert [name for floor in FLOORS for name in sorted(floor) if f"`{name}`" not in told] == []


def test_no_modules_import_each_other_in_a_circle():
    imports = {path: inside(path) - {path} for path in SOURCES if path.name != "__init__.py"}
    while True:
        done = {path for path, needed in imports.items() if not needed & imports.keys()}
        if not done:
            break
        imports = {path: needed for path, needed in imports.items() if path not in done}
    assert not imports


@pytest.mark.parametrize("path", filter(is_light, SOURCES), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_light_modules_load_no_heavy_library_at_their_top(path):
    assert not outside(path, top_level_only=True) & HEAVY


def test_every_folder_says_what_it_is():
    for folder in (p for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()):
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert "May import: " in said and "Exports: " in said, folder.name
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_contributing_shows_the_house():
    tree = (PACKAGE.parent / "CONTRIBUTING.md").read_text().partition("\nsqa_convert/\n")[2].partition("```")[0]
    folders = sorted(p for p in PACKAGE.iterdir() if (p / "__init__.py").is_file())
    expected = [f"  {path.name}" for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__main__"]
    for folder in folders:
        expected.append(f"  {folder.name}/")
        expected += [f"    {path.name}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    assert [line[:30].rstrip() for line in tree.splitlines()] == expected


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*_sqa_*.py")), ids=lambda p: p.name)
def test_shipped_model_files_stand_alone(path):
    siblings = {p.stem for p in (PACKAGE / "models").glob("*.py")}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level in (0, 1)
            assert node.level == 0 or node.module in siblings
    own = {"sentence_transformers"} if path.name.startswith("sentence_") else set()
    assert outside(path) <= {"torch", "transformers", "huggingface_hub", "copy"} | own


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_commands_print_or_exit(path):
    calls = {getattr(n.func, "id", "") for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
    assert place(path) == "cli" or not calls & {"print", "exit", "quit", "input"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_functions_fit_on_a_few_screens(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.body[0].lineno < MOST_BODY, node.name


def test_public_names_resolve():
    import sqa_convert

    for name in sqa_convert.__all__:
        assert getattr(sqa_convert, name) is not None
    with pytest.raises(AttributeError):
        _ = sqa_convert.nothing
    from sqa_convert import convert, evaluate, uptrain

    assert callable(convert) and callable(evaluate) and callable(uptrain)
