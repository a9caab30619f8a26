"""Uptraining in several processes: as one process does it, whatever shares the model out, and nothing is lost."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import plain_convert as convert
from safetensors.torch import load_file

from sqa_convert import Recipe, uptrain
from sqa_convert.checkpoints.small_files import write_json
from sqa_convert.cli.convert import main as convert_command
from sqa_convert.errors import RecipeError, SQAError
from sqa_convert.report.report_json import read_report
from sqa_convert.uptraining import fsdp_and_deepspeed
from sqa_convert.uptraining.recipe import recipe_folder
from sqa_convert.uptraining.run_folder import recoverable
from sqa_convert.uptraining.trainer_arguments import check_recipe

BIN = Path(sys.executable).parent
RECIPE = (
    "data: text.txt\ntokens: 512\nsequence_length: 32\nbatch_size: 4\nlearning_rate: 1.0e-3\n"
    "evaluations: 2\nheld_out_tokens: 64\n"
)
TEXT = "\n\n".join(f"def f{i}(x):\n    return x + {i % 7}" for i in range(1500))
UPTRAIN = ["-m", "sqa_convert.cli.uptrain", "m", "--device", "cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SECONDS = 240

deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed; `make integration` tries to"
)
MAIN = "from sqa_convert.cli.uptrain import main\nmain()\n"
# On a CPU it would compile an operator of its own, for a minute or two; without it gloo does the same.
NOTHING_COMPILED = "import deepspeed.ops\ndeepspeed.ops.__compatible_ops__.clear()\n" + MAIN


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For each sample a folder with a converted model `m`, text and a recipe of 4 steps, and the weights one process
    makes of it."""
    known = {}

    def make(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            (folder / "text.txt").write_text(TEXT)
            (folder / "recipe.yaml").write_text(RECIPE)
            convert(f"sample:{name}", 6, 2, output=folder / "m", evaluate=False, verify=False)
            shutil.copytree(folder / "m", folder / "one")
            uptrain(folder / "one", str(folder / "recipe.yaml"), data=str(folder / "text.txt"), device="cpu")
            known[name] = folder, load_file(folder / "one/model.safetensors")
        return known[name]

    return make


@pytest.fixture
def workplace(trained, tmp_path):
    """A copy of such a folder, and the weights one process makes of its model."""

    def make(name, place="here"):
        folder, weights = trained(name)
        shutil.copytree(folder / "m", tmp_path / place / "m")
        for file in ("recipe.yaml", "text.txt"):
            shutil.copy(folder / file, tmp_path / place)
        return tmp_path / place, weights

    return make


def start(folder, command):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    try:
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.terminate()  # torchrun ends what it has started
    assert process.returncode == code, err
    return err


def check(folder, weights, atol=1e-4):
    found = load_file(folder / "m/model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            found[name], weight, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert read_report(folder / "m")["uptraining"]["steps"] == 4
    assert not (folder / "m.uptraining").exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


ENGINES = [
    ("gpt2", "fsdp2", []),
    ("t5", "fsdp2", ["--fsdp_state_dict_type", "SHARDED_STATE_DICT"]),
    pytest.param("gpt2", "deepspeed-zero2", [], marks=deepspeed),
    pytest.param("gpt2", "deepspeed-zero3", [], marks=deepspeed),
]


@pytest.mark.integration
@pytest.mark.parametrize(("name", "file", "flags"), ENGINES)
def test_each_file_for_accelerate_trains_as_one_process_does(name, file, flags, workplace):
    folder, weights = workplace(name)
    config = recipe_folder() / f"accelerate/{file}.yaml"
    (folder / "start.py").write_text(NOTHING_COMPILED if "deepspeed" in file else MAIN)
    launch = [BIN / "accelerate", "launch", "--config_file", config, "--num_processes", "2"]
    flags = [*flags, "--main_process_port", str(free_port())]
    finish(start(folder, [*launch, *flags, "start.py", *UPTRAIN[2:], "--recipe", "recipe.yaml", "--quiet"]))
    check(folder, weights)


def test_every_file_for_accelerate_is_tried():
    tried = {getattr(case, "values", case)[1] for case in ENGINES}
    assert {path.stem for path in (recipe_folder() / "accelerate").glob("*.yaml")} == tried


def on_two_nodes(*folders):
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    flags = [*UPTRAIN, "--recipe", "recipe.yaml", "--no-evaluate"]
    return [
        start(folder, [*TORCHRUN[:3], *nodes, "--node-rank", str(node), *flags]) for node, folder in enumerate(folders)
    ]


@pytest.mark.integration
@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "a folder each"])
def test_two_nodes_train_as_one_process_does_and_say_where_the_result_is(shared, workplace):
    here, weights = workplace("t5")
    there = here if shared else workplace("t5", "there")[0]
    before = load_file(there / "m/model.safetensors")
    _, said = [finish(process) for process in on_two_nodes(here, there)]
    check(here, weights)
    if not shared:
        found = load_file(there / "m/model.safetensors")
        assert all(torch.equal(found[name], before[name]) for name in before)
        assert sorted(path.name for path in there.iterdir()) == ["m", "recipe.yaml", "text.txt"]
        assert f"the result goes to m on {socket.gethostname()}; here m is as it was" in said
    assert ("the result goes to" in said) is not shared


@pytest.mark.integration
def test_a_fault_on_one_node_stops_all_in_one_line(workplace):
    here, there = workplace("gpt2")[0], workplace("gpt2", "there")[0]
    report = read_report(there / "m")
    write_json(there / "m/report.json", report | {"seconds": report["seconds"] | {"convert": 1e6}})
    for process in on_two_nodes(here, there):
        err = finish(process, code=1)  # torchrun's
        assert err.count("error: m is another conversion than the one the first process sees") == 1
    assert not list(here.parent.glob("*/m.uptraining"))


@pytest.mark.parametrize(
    ("environment", "fsdp", "says"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, True, "choose one"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "WORLD_SIZE": "2"}, False, "fsdp_version: 2"),
        ({"WORLD_SIZE": "1"}, True, "start them with torchrun"),
        ({"WORLD_SIZE": "3"}, False, "cannot be shared out evenly among 3 processes"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_is_read(environment, fsdp, says, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=says):
        check_recipe(Recipe(batch_size=4, fsdp=fsdp), True, torch.device("cpu"))


def test_a_result_that_is_not_complete_is_never_marked_so_and_the_training_not_lost(tmp_path, monkeypatch):
    convert("sample:gpt2", 6, 2, output=tmp_path / "m", verify=False)
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = Recipe(str(tmp_path / "text.txt"), tokens=64, sequence_length=8, batch_size=4, evaluations=1)
    with monkeypatch.context() as patch:
        patch.setattr(
            fsdp_and_deepspeed, "whole_weights", lambda trainer: {"transformer.wpe.weight": torch.zeros(256, 192)}
        )
        with pytest.raises(RuntimeError, match="weights were not gathered"):
            uptrain(tmp_path / "m", recipe, device="cpu", evaluate=False)
    assert (tmp_path / "m.uptraining/uptrain/checkpoint-2/complete").is_file()
    assert not (tmp_path / "m.uptraining/uptrain/final/finished.json").exists()
    assert uptrain(tmp_path / "m", resume=True, device="cpu", evaluate=False)["uptraining"]["steps"] == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:11447"),
        torch.distributed.DistNetworkError("timed out"),
    ],
)
def test_the_loss_of_another_process_is_one_line(error, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "run/uptrain/checkpoint-2").mkdir(parents=True)
    (tmp_path / "run/uptrain/checkpoint-2/complete").touch()
    with (
        pytest.raises(SQAError, match=r"another process of this run has ended; m is .*go on from step 2 of uptrain"),
        recoverable(tmp_path / "run", Path("m")),
    ):
        raise error


def test_one_command_that_converts_and_uptrains_works_in_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["sample:gpt2", "--variant", "ssqa", "--method", "mean", "--uptrain", "quick"]
    monkeypatch.setattr(sys, "argv", ["sqa-convert", *arguments])
    with pytest.raises(SystemExit, match="2"):
        convert_command()
    assert "--uptrain works in one process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("was", "fsdp", "says"),
    [
        ("", True, "began with no FSDP or DeepSpeed, not FSDP2 with full"),
        ("DeepSpeed ZeRO-2 in 2 processes", False, "in 2"),
    ],
)
def test_a_run_is_not_resumed_by_another_engine(was, fsdp, says, tmp_path):
    plugin = SimpleNamespace(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    state = SimpleNamespace(fsdp_plugin=plugin)
    trainer = SimpleNamespace(
        is_deepspeed_enabled=False, is_fsdp_enabled=fsdp, accelerator=SimpleNamespace(state=state)
    )
    fsdp_and_deepspeed.mark(trainer, tmp_path)
    fsdp_and_deepspeed.check_checkpoint(trainer, str(tmp_path))
    (tmp_path / "engine").write_text(was)
    with pytest.raises(RecipeError, match=says):
        fsdp_and_deepspeed.check_checkpoint(trainer, str(tmp_path))


FAULTY = """
import os, signal, sys, time
from sqa_convert.uptraining import trainer, uptrain

second = os.environ["RANK"] == "1"
train, measure, clear = trainer.UptrainingTrainer.training_step, trainer.measure, uptrain.empty

def interrupted(self, *arguments, **options):
    if second and self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return train(self, *arguments, **options)

def worse_each_time(*arguments):
    worse_each_time.times += 1
    quality = measure(*arguments)
    return type(quality)(quality.loss, quality.perplexity, worse_each_time.times, 0.0) if second else quality

worse_each_time.times = 0

def late(*arguments, **options):
    time.sleep(1)
    return clear(*arguments, **options)

if "interrupt" in sys.argv[1]:
    trainer.UptrainingTrainer.training_step = interrupted
else:
    trainer.measure, uptrain.empty = worse_each_time, late
del sys.argv[1]
from sqa_convert.cli.uptrain import main
main()
"""


@pytest.mark.integration
def test_processes_stop_after_the_same_step_begin_anew_together_and_judge_alike(workplace, monkeypatch):
    folder, weights = workplace("gpt2")
    (folder / "faulty.py").write_text(FAULTY)
    flags = [*UPTRAIN[2:], "--recipe", "recipe.yaml"]
    err = finish(start(folder, [*TORCHRUN, "faulty.py", "interrupt", *flags, "--no-evaluate"]), code=1)
    assert "go on from step 3 of uptrain with: sqa-uptrain m --resume" in err
    shutil.copytree(folder, folder.parent / "copy")
    # A run that was stopped goes on in another number of processes.
    monkeypatch.chdir(folder.parent / "copy")
    uptrain("m", resume=True, device="cpu", evaluate=False)
    check(folder.parent / "copy", weights)
    # The first process clears the old run away late, and the second measures what would make it stop.
    patient = folder / "patient.yaml"
    patient.write_text(RECIPE.replace("evaluations: 2", "evaluations: 4") + "patience: 1\n")
    finish(start(folder, [*TORCHRUN, "faulty.py", "judge", *UPTRAIN[2:], "--recipe", "patient.yaml", "--restart"]))
    check(folder, weights)


@pytest.mark.integration
def test_a_run_of_several_processes_that_is_killed_goes_on(workplace):
    folder, weights = workplace("t5")
    (folder / "killed.py").write_text(
        "import os, signal\n"
        "from sqa_convert.uptraining import trainer\n"
        "train = trainer.UptrainingTrainer.training_step\n"
        "def killed(self, *arguments, **options):\n"
        "    if self.state.global_step == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return train(self, *arguments, **options)\n"
        "trainer.UptrainingTrainer.training_step = killed\n" + MAIN
    )
    (folder / "recipe.yaml").write_text(RECIPE + "fsdp: true\n")
    finish(start(folder, [*TORCHRUN, "killed.py", *UPTRAIN[2:], "--recipe", "recipe.yaml"]), code=1)
    assert (folder / "m.uptraining/uptrain/checkpoint-2/complete").is_file()
    finish(start(folder, [*TORCHRUN[:-1], "4", *UPTRAIN, "--resume"]))
    check(folder, weights)


@pytest.mark.integration
def test_lora_whose_model_is_shared_out_is_merged_as_in_one_process(workplace, monkeypatch):
    folder, _ = workplace("gpt2")
    (folder / "recipe.yaml").write_text(RECIPE + "lora_rank: 2\n")
    shutil.copytree(folder / "m", folder / "one")
    monkeypatch.chdir(folder)
    uptrain("one", "recipe.yaml", device="cpu", evaluate=False)
    (folder / "recipe.yaml").write_text(RECIPE + "lora_rank: 2\nfsdp: true\n")
    finish(start(folder, [*TORCHRUN, *UPTRAIN, "--recipe", "recipe.yaml", "--no-evaluate"]))
    check(folder, load_file(folder / "one/model.safetensors"))
