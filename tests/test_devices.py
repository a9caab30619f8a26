"""What a machine with several GPUs is asked for, on one without: torch is told that it has them."""

import pytest
import torch

from sqa_convert import Recipe
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.devices import choose_device, own_device, peak_flops
from sqa_convert.errors import RecipeError
from sqa_convert.uptraining.data import training_data
from sqa_convert.uptraining.trainer_arguments import training_arguments


@pytest.fixture
def two_gpus(monkeypatch):
    """Returns what was made the current device."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return current


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("auto", "cuda"),
        ("cuda", "cuda"),
        ("cuda:0", "cuda:0"),
        ("cuda:1", "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        (torch.device("cpu"), "cpu"),
        ("mps:0", "mps"),
    ],
    ids=str,
)
def test_a_device_with_an_index_is_a_device(given, chosen, two_gpus, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(given) == torch.device(chosen)


@pytest.mark.parametrize("given", ["cuda:2", "cuda:-1", "cuda:x", "cpu:1", "mps:0", "meta", "tpu", "", "1", "cuda:256"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(given, two_gpus, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=f"--device {given} is not available: choose auto, cpu, cuda:0 … cuda:1$"):
        choose_device(given)


def test_an_index_is_refused_where_there_is_none_of_the_kind():
    with pytest.raises(RecipeError, match="choose auto, cpu"):
        choose_device("cuda:0" if not torch.cuda.is_available() else f"cuda:{torch.cuda.device_count()}")


def test_each_process_of_a_machine_has_its_own_gpu_and_measures_on_it(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    own = own_device(choose_device("auto"))
    assert own == torch.device("cuda", 1)
    assert choose_device(str(own)) == own  # as measuring is given it
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(RecipeError, match="give --device cuda"):
        own_device(choose_device("cuda:0"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match=r"more processes here than GPUs \(2\)"):
        own_device(choose_device("cuda"))


def test_the_trainer_trains_on_the_gpu_that_was_chosen(two_gpus, monkeypatch, tmp_path):
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    for name in ("cuda:1", "cuda:0"):
        arguments = training_arguments(Recipe(), tmp_path, torch.device(name), measured=False)
        assert arguments.device == torch.device(name) == two_gpus[-1]
        assert arguments.n_gpu == 1


def test_the_held_out_text_of_a_training_is_put_on_a_device_with_an_index(two_gpus, tmp_path):
    (tmp_path / "text.txt").write_text("a line of text\n" * 2000)
    recipe = Recipe(data=str(tmp_path / "text.txt"), tokens=256, sequence_length=32, held_out_tokens=64)
    text = training_data(SAMPLES / "gpt2", recipe)
    assert text.held_out(torch.device("cuda:1")).device == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A10", 125e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10G", None), ("NVIDIA A10M", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA A100X", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("GRID A100-10C", None), ("NVIDIA A10-24Q", None),
        ("NVIDIA GH200 480GB", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_gpu_has_the_peak_of_its_own_name_and_of_no_other(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), 2) == (None if peak is None else 2 * peak)
