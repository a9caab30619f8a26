"""What users build on: public names, what they take, and the flags of the commands. A change here is one of the API."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import sqa_convert

TAKES = {  # parameters in their order; those with a default have a question mark
    "Calibration": (
        "text? tokens? refit? refine_steps? text_column? length? prompts? source_column? target_column? prefix? "
        "polish_steps? effort? memory?"
    ),
    "Conversion": "report output _model? _origin? _tokenizer?",
    "ConvertedModules": "model report",
    "Method": "name summary source convert needs_statistics?",
    "Partition": "groups",
    "Recipe": (
        "data? text_column? source_column? target_column? prefix? tokens? sequence_length? batch_size? "
        "micro_batch? learning_rate? schedule? warmup? weight_decay? loss? ce_weight? train? lora_rank? "
        "separate_documents? precision? compile? gradient_checkpointing? fsdp? evaluations? held_out_tokens? "
        "patience? report_to? method? control? seed?"
    ),
    "bench": "models settings? trust_remote_code? progress?",
    "compare": "models held_out trust_remote_code? progress? also? optional? untrained? own? gains? spelled_by?",
    "convert": (
        "source q_groups? kv_groups? method? output? variant? sites? partition? allocation? calibration? dtype? "
        "revision? subfolder? tokenizer? max_shard_size? overwrite? resume? verify? evaluate? data? text_column? "
        "uptrain? control? device? seed? trust_remote_code? progress?"
    ),
    "convert_modules": (
        "model q_groups? kv_groups? variant? calibration run? method? partition? refit? refine_steps? modules? "
        "positions? inplace? device? seed? progress?"
    ),
    "evaluate": "model against? data? text_column? tokens? device? seed? tokenizer?",
    "load": "model source? tokenizer?",
    "load_modules": "model state",
    "load_recipe": "name overrides",
    "prepare": (
        "model data? text_column? columns? tokens? device? seed? tokenizer? trust_remote_code? without? writer?"
    ),
    "push_to_hub": "folder repo_id private?",
    "register_method": "name summary? source? needs_statistics?",
    "resolve": "name revision?",
    "sweep": (
        "source settings? sites? calibration? data? text_column? speed? revision? subfolder? tokenizer? device? seed? "
        "trust_remote_code? progress?"
    ),
    "uptrain": (
        "model recipe? source? data? text_column? device? seed? evaluate? control? resume? restart? output? "
        "keep_anyway? trust_remote_code? progress?"
    ),
}
FLAGS = {
    "convert": (
        "--allocation --calibration --calibration-length --calibration-prompts --calibration-tokens --control --data "
        "--device --dry-run --dtype --effort --help-all --json --kv-groups --list-methods --max-shard-size --memory "
        "--method --no-calibration "
        "--no-evaluate --no-refit --no-verify --output --overwrite --partition --polish-steps --prefix --public "
        "--push-to-hub --q-groups --quiet --refine-steps --refit --resume --revision --seed --sites --source-column "
        "--subfolder --target --target-column --text-column --tokenizer --trust-remote-code --uptrain --variant "
        "--verbose --version -o -q -v model"
    ),
    "uptrain": (
        "--control --data --device --dry-run --help-all --json --keep-anyway --learning-rate --list-recipes --loss "
        "--no-evaluate --output --public --push-to-hub --quiet --recipe --restart --resume --seed --source "
        "--text-column --tokens --trust-remote-code --verbose --version -o -q -v folder"
    ),
    "evaluate": (
        "--against --data --device --help-all --json --limit --max-error --max-kl --quiet --samples --seed --tasks "
        "--text-column "
        "--tokens --trust-remote-code --verbose --verify --version -q -v model"
    ),
    "sweep": (
        "--calibration-tokens --data --device --help-all --json --memory --no-speed --output --quiet --refine-steps "
        "--revision --seed "
        "--settings --sites --subfolder --target --text-column --tokenizer --trust-remote-code --verbose --version "
        "-o -q -v model"
    ),
    "bench": (
        "--attn --batch --compile --csv --details --device --dtype --head-dim --head-grid --heads --help-all "
        "--json --lengths --modes --output --parts --quiet --repeats --trust-remote-code --variants --verbose "
        "--version -o -q -v models"
    ),
    "report": "--help-all --json --output --overwrite --quiet --verbose --version -o -q -v first second",
}


def parameters(function):
    given = inspect.signature(function).parameters.items()
    return " ".join(name if it.default is inspect.Parameter.empty else f"{name}?" for name, it in given)


def test_public_names_and_what_they_take_stay():
    public = {name: getattr(sqa_convert, name) for name in sqa_convert.__all__}
    assert {name: parameters(it) for name, it in public.items() if callable(it)} == TAKES
    assert set(public) - set(TAKES) == {"METHODS", "VARIANTS", "__version__", "errors"}


def test_what_is_listed_exists_and_only_that():
    code = (
        "import sys, sqa_convert\n"
        "assert dir(sqa_convert) == sorted(sqa_convert.__all__)\n"
        "assert issubclass(sqa_convert.errors.RecipeError, sqa_convert.errors.SQAError)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        "assert all(hasattr(sqa_convert, name) for name in dir(sqa_convert))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reference_shows_every_public_name():
    pages = "".join(page.read_text() for page in (Path(__file__).parent.parent / "docs" / "reference").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    assert set(sqa_convert.__all__) - shown == {"__version__", "errors"}
    assert "::: sqa_convert.errors.SQAError" in pages


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_of_the_commands_stay(name):
    command = typer.main.get_command(importlib.import_module(f"sqa_convert.cli.{name}").app)
    flags = {flag for it in command.params for flag in (*it.opts, *it.secondary_opts)}
    assert flags - {"--install-completion", "--show-completion"} == set(FLAGS[name].split())
