"""The documentation: its code runs, what it names exists, and it leaves no setting out."""

import dataclasses
import re
import shlex
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml

from sqa_convert.cli import bench, convert, evaluate, report, sweep, uptrain
from sqa_convert.uptraining.recipe import Recipe, recipe_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMMANDS = {
    "sqa-convert": convert,
    "sqa-uptrain": uptrain,
    "sqa-eval": evaluate,
    "sqa-bench": bench,
    "sqa-sweep": sweep,
    "sqa-report": report,
}
MODULES = {
    "sqa_convert": "sqa-convert",
    "sqa_convert.cli.uptrain": "sqa-uptrain",
    "sqa_convert.cli.evaluate": "sqa-eval",
    "sqa_convert.cli.bench": "sqa-bench",
    "sqa_convert.cli.sweep": "sqa-sweep",
    "sqa_convert.cli.report": "sqa-report",
}
BLOCK = re.compile(
    r"(?:^<!-- (?P<rule>not run|needs): (?P<what>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def name(page):
    return str(page.relative_to(DOCS))


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        if block["language"] == language:
            yield block, text.count("\n", 0, block.start("code"))


def with_python():
    return [page for page in PAGES if any(True for _ in blocks(page, "python"))]


@pytest.mark.integration
@pytest.mark.parametrize("page", with_python(), ids=name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for block, line in blocks(page, "python"):
        if block["rule"] == "not run" or (block["rule"] == "needs" and find_spec(block["what"]) is None):
            continue
        exec(compile("\n" * line + block["code"], str(page), "exec"), names)


def flags_of(command):
    """Every flag that a command knows."""
    parameters = typer.main.get_command(COMMANDS[command].app).params
    return {"-h", "--help"} | {flag for p in parameters for flag in (*p.opts, *p.secondary_opts)}


def command_of(words):
    """The command of this package that a line calls, and its own arguments; None for other programs."""
    if words and words[0] in COMMANDS:
        return words[0], words[1:]
    for i, (flag, module) in enumerate(pairwise(words)):
        if flag == "-m" and module in MODULES:
            return MODULES[module], words[i + 2 :]
    return None


def command_lines(page):
    """Lines of shell blocks, and commands within the text."""
    text = page.read_text(encoding="utf-8")
    for block, _ in blocks(page, "sh"):
        yield from block["code"].splitlines()
    yield from (code for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)) if code.startswith("sqa-"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_are_those_of_the_commands(page):
    for line in command_lines(page):
        called = command_of(shlex.split(line))
        if called is not None:
            command, arguments = called
            given = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
            assert given <= flags_of(command), line
    # A flag alone in the text is one of some command's.
    known = set().union(*(flags_of(command) for command in COMMANDS))
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    alone = [code for code in re.findall(r"`([^`\n]+)`", text) if code.startswith("--")]
    assert {flag for code in alone for flag in FLAG.findall(code)} <= known


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_shell_blocks_hold_one_command_a_line(page):
    for block, _ in blocks(page, "sh"):
        for line in block["code"].splitlines():
            assert line and line[0] not in "#$ " and not line.endswith("\\"), line
            if block["rule"] is None:
                assert command_of(shlex.split(line)) is not None, f"{line}: what is not ours is marked as not run"


def anchors(page):
    """Of the headings of a page, as MkDocs makes them, and of what its `:::` lines document."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.M)
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.M))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_file(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_navigation_and_what_is_in_it_is_a_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"[\w/-]+\.md", text.partition("\nnav:")[2])) == sorted(map(name, PAGES))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_the_reference_documents_exists(page):
    for target in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M):
        parts = target.split(".")
        path = ROOT.joinpath(*parts).with_suffix(".py")
        if path.is_file():
            continue
        defined = re.compile(rf"^(?:class |def )?{parts[-1]}\b", re.M)
        assert defined.search(ROOT.joinpath(*parts[:-1]).with_suffix(".py").read_text(encoding="utf-8")), target


def test_every_setting_of_a_recipe_is_explained_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+) \|$", (DOCS / "recipes.md").read_text(encoding="utf-8"), re.M)
    assert {setting: yaml.safe_load(default) for setting, default, _ in rows} == dataclasses.asdict(Recipe())
    assert all(meaning for _, _, meaning in rows)


def test_every_packaged_recipe_is_listed():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\[([\w-]+)\]\(\.\./recipes/\1\.yaml\)", text)) == recipe_names()


def test_the_licence_of_every_dependency_is_listed():
    rows = [line.split("|") for line in (DOCS / "trust.md").read_text().splitlines() if line.startswith("|")]
    listed = {row[1].strip().lower().replace("_", "-") for row in rows}
    requirements = metadata.requires("sqa-convert") or []
    needed = {re.match(r"[\w.-]+", line)[0].lower() for line in requirements if "extra ==" not in line}
    assert len(needed) > 10 and needed <= listed
