"""Errors name arguments where they come out of Python, and flags where a command prints them."""

import ast
import dataclasses
import inspect
import re
import traceback
from pathlib import Path

import pytest
from helpers import gpt2

import sqa_convert
from sqa_convert import Calibration, Partition, Recipe, bench, convert, evaluate, load_recipe, push_to_hub, uptrain
from sqa_convert.cli import convert as command
from sqa_convert.errors import CheckpointError, DataError, OutputError, QualityError, RecipeError, SQAError
from sqa_convert.flags_as_arguments import _arguments, flags_named, names_arguments
from sqa_convert.heads import get_method, variant_heads
from sqa_convert.pipeline.verify import verify
from sqa_convert.speed.bench import bench_layers
from sqa_convert.speed.settings import Settings

PACKAGE = Path(sqa_convert.__file__).parent
FLAG = re.compile(r"(?<![\w/-])--[a-z][a-z-]*")
GPT2, T5 = "sample:gpt2", "sample:t5"
OF_COMMANDS = {"--tasks", "--push-to-hub", "--resume", "--restart", "--keep-anyway"}
"""flags in messages that no function but `uptrain` has, or none"""

SAYS = [
    (lambda: convert(GPT2, 13, 13), "q_groups=13: the source has 12 heads, so 1 to 12 query heads can be kept"),
    (lambda: convert(GPT2, 8, 3), "kv_groups=3 must divide q_groups=8: with 8 query heads use kv_groups=1 or 2"),
    (lambda: convert(GPT2), "give q_groups and kv_groups too, or variant alone"),
    (lambda: convert(GPT2, 8), "give kv_groups too, or variant alone"),
    (lambda: convert(GPT2, 8, 4, variant="sqa"), "variant sets both head counts: leave out q_groups and kv_groups"),
    (lambda: convert(GPT2, variant="rsqa"), "variant='rsqa': choose one of gqa"),
    (lambda: convert(GPT2, 8, 4, "median"), "method='median': choose one of auto, svd"),
    (lambda: convert(GPT2, 8, 4, dtype="int8"), "dtype='int8': choose auto, float32"),
    (lambda: convert(GPT2, 8, 4, partition="best"), "partition='best': choose searched or contiguous"),
    (lambda: convert(GPT2, 8, 4, sites="encoder"), "sites='encoder': this model has decoder"),
    (lambda: convert(GPT2, 8, 4, max_shard_size="1"), "max_shard_size='1': give a size with its unit"),
    (lambda: convert(GPT2, 8, 4, calibration=Calibration(tokens=0)),
     "Calibration(tokens=0): give 1 or more, or calibration=None"),
    (lambda: convert(GPT2, 8, 4, calibration=Calibration(tokens="many")),
     "Calibration(tokens='many'): give a whole number"),
    (lambda: convert(GPT2, 8, 4, calibration=Calibration(length=2)), "Calibration(length=2): give 8 or more tokens"),
    (lambda: convert(GPT2, 8, 4, calibration=Calibration(refine_steps=-1)), "Calibration(refine_steps=-1): give 0 or"),
    (lambda: convert(GPT2, 8, 4, "mean", calibration="stdlib"),
     "calibration: mean fits nothing; add Calibration(refit=True), Calibration(refine_steps=…) or Calibration("),
    (lambda: convert(T5, 8, 4, calibration=Calibration(prompts="none.txt")),
     "Calibration(prompts=…) are for decoder-only language models"),
    (lambda: convert(GPT2, 8, 4, seed=-1), "seed=-1: give a whole number"),
    (lambda: convert(GPT2, 8, 4, device="cuda:99"), "device='cuda:99' is not available: choose auto, "),
    (lambda: convert(GPT2, 8, 4, output="."), "output='.' is the folder you are in"),
    (lambda: convert(GPT2, 8, 4, output="~nobody-here/x"), "output='~nobody-here/x'"),
    (lambda: convert(GPT2, 8, 4, output="out", uptrain=Recipe(tokens=2048), data="none.txt"), "calibration='none.txt'"),
    (lambda: evaluate(GPT2, tokens=1), "tokens=1: of one nothing is predicted; give 2 or more"),
    (lambda: evaluate(GPT2, data="none.txt"), "data='none.txt'"),
    (lambda: evaluate(GPT2, device=None), "device=None is not available"),
    (lambda: uptrain(b"out"), "model"),
    (lambda: bench({"it": GPT2}, Settings(lengths=(1, 2))), "Settings(lengths=(1, 2)): give 2 to"),
    (lambda: bench({"it": GPT2}, Settings(attention="none")), "Settings(attention='none'): choose sdpa"),
    (lambda: bench_layers(0, 8), "heads=0 head_dim=8: give 1 or more of each"),
    (lambda: bench_layers(8, 8, ("9/2",)), "variants"),
    (lambda: push_to_hub("none", "me/model"), "none: no such folder"),
    (lambda: load_recipe("quick", device="cpu"), "device: no such setting; here it is the argument device"),
    (lambda: Recipe(q_groups=8), "q_groups: no such setting; here it is the arguments q_groups and kv_groups"),
    (lambda: Partition.contiguous(12, 9, 4), "kv_groups=4 must divide q_groups=9"),
    (lambda: get_method("median"), "method='median': choose one of"),
    (lambda: variant_heads("rsqa", 12), "variant='rsqa'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "says"), SAYS, ids=[says for _, says in SAYS])
def test_errors_from_python_name_arguments(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SQAError) as error:
        call()
    assert str(error.value).replace("sample:", "").find(says) >= 0 and not FLAG.search(str(error.value))


def test_a_command_names_flags(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = called(command.main, GPT2, "--q-groups", 8, "--kv-groups", 3)
    assert code == 2 and err.startswith(
        "error: --kv-groups 3 must divide --q-groups 8: with 8 query heads use --kv-groups"
    )
    with pytest.raises(RecipeError, match="kv_groups=3"):  # after it as before
        convert(GPT2, 8, 3)
    with flags_named(), pytest.raises(RecipeError, match="--kv-groups 3"):
        convert(GPT2, 8, 3)


def test_every_flag_in_a_message_is_of_an_argument():
    functions = [
        convert,
        uptrain,
        evaluate,
        bench,
        bench_layers,
        sqa_convert.prepare,
        sqa_convert.convert_modules,
        sqa_convert.sweep,
        verify,
    ]
    known = {flag for function in functions for flag in _arguments(function, {})}
    named = {}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        raised = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
        for part in (part for node in raised for part in ast.walk(node)):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                named |= dict.fromkeys(FLAG.findall(part.value), path.name)
    assert len(named) > 40
    assert {flag: place for flag, place in named.items() if flag not in known}.keys() <= {"--attn", *OF_COMMANDS}


@pytest.mark.parametrize(
    "name", ["a --data b.txt", "my--tokens.txt", "--data", "--device cpu.txt", "folder --q-groups 8/text --output.txt"]
)
def test_what_the_user_has_named_stays_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (name, Path(name), tmp_path / name):
        for call in (lambda given=given: evaluate(GPT2, data=given), lambda given=given: evaluate(given)):
            with pytest.raises(SQAError) as error:
                call()
            assert str(given) in str(error.value)
    with pytest.raises(DataError) as error:
        convert(GPT2, 8, 4, calibration=name)
    assert str(error.value).startswith(f"calibration={name!r}")


def test_what_another_library_says_stays_as_it_is():
    @names_arguments
    def work(device="auto"):
        try:
            raise ValueError("try pip install --device x, or a tool's --q-groups")
        except ValueError as error:
            raise RecipeError(f"--device {device}: {error}; give --device cpu") from error

    with pytest.raises(RecipeError) as error:
        work("tpu")
    expected = "device='tpu': try pip install --device x, or a tool's --q-groups; give device='cpu'"
    assert str(error.value) == expected and isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("kind", [RecipeError, OutputError, DataError, CheckpointError, QualityError])
def test_an_error_stays_itself(kind):
    class Worse(kind):
        pass

    cause, raised = KeyError("x"), Worse("--seed 3: no")
    raised.points = 7

    @names_arguments
    def work(seed):
        raise raised from cause

    with pytest.raises(kind, match=r"^seed=3: no$") as error:
        work(3)
    assert error.value is raised and raised.points == 7 and raised.__cause__ is cause
    assert (
        raised.exit_code == kind.exit_code
        and traceback.extract_tb(raised.__traceback__)[-1].line == "raise raised from cause"
    )


def test_only_what_is_ours_is_spelled_anew():
    @names_arguments
    def work(seed: int) -> int:
        """Text."""
        raise ValueError("--seed 3")

    with pytest.raises(ValueError, match=r"^--seed 3$"):
        work(3)
    assert work.__doc__ == "Text." and str(inspect.signature(work)) == "(seed: 'int') -> 'int'".replace("'", "")


def test_of_functions_that_call_each_other_the_outer_one_names_its_arguments():
    @names_arguments
    def inner(q_groups):
        raise RecipeError(f"--q-groups {q_groups}: too many, or --no-verify")

    @names_arguments
    def outer(source, verify: bool = True):
        inner(8)

    with pytest.raises(RecipeError, match=r"^q_groups=8: too many, or verify=False$"):
        outer(gpt2)


def test_settings_that_are_given_are_known_by_their_value():
    recipe = dataclasses.replace(Recipe(), tokens=4096)
    with pytest.raises(DataError) as error:
        convert(GPT2, 8, 4, output="never", uptrain=recipe, data="my --data file", verify=False)
    assert "calibration='my --data file'" in str(error.value)
