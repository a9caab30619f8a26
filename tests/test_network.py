"""A checkpoint on this machine is nobody else's business: nothing is asked of a network, by any command."""

import os
import subprocess
import sys

import pytest

from sqa_convert.checkpoints.find import SAMPLES

# Python runs this in every process that is started here. Sockets of the machine's own processes have no address.
WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") or (
        event == "socket.connect" and isinstance(arguments[1], tuple)
    ):
        with open(os.environ["ASKED"], "a") as log:
            log.write(f"{event} {arguments}\\n")
        raise OSError("there is no network")

with open(os.environ["ASKED"] + ".processes", "a") as log:
    log.write(f"{os.getpid()}\\n")
sys.addaudithook(watch)
"""
RECIPE = "tokens: 512\nsequence_length: 64\nbatch_size: 4\nheld_out_tokens: 512\nevaluations: 1\n"
COMMANDS = {
    "sqa_convert.cli.convert": [
        "{source}", "--q-groups", "6", "--kv-groups", "3", "-o", "out", "--calibration-tokens", "512",
        "--refine-steps", "1",
    ],
    "sqa_convert.cli.uptrain": ["out", "--recipe", "recipe.yaml", "--keep-anyway"],
    "sqa_convert.cli.evaluate": ["out", "--verify"],
    "sqa_convert.cli.bench": ["out", "--lengths", "16", "--repeats", "2", "--modes", "prefill"],
}  # fmt: skip


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    path = os.pathsep.join(filter(None, [str(tmp_path), variables.get("PYTHONPATH")]))
    return variables | {"ASKED": str(tmp_path / "asked"), "PYTHONPATH": path, "HF_HOME": str(tmp_path / "home"),
                        "OMP_NUM_THREADS": "1"}  # fmt: skip


def test_what_watches_notices(environment, tmp_path):
    code = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode
    assert "127.0.0.1" in (tmp_path / "asked").read_text()


@pytest.mark.integration
def test_no_command_asks_anything_of_a_network(environment, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "recipe.yaml").write_text(RECIPE)
    for module, arguments in COMMANDS.items():
        given = [argument.format(source=SAMPLES / "gpt2") for argument in arguments]
        command = [sys.executable, "-c", f"from {module} import main; main()", *given]
        done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()
    watched = (tmp_path / "asked.processes").read_text().split()
    assert len(watched) > len(COMMANDS)  # also the process that loads the result as a stranger would
