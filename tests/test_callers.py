"""What the caller has set neither changes what is computed, nor is it changed."""

import contextlib
import dataclasses
import logging
import os
import random
import shutil
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from helpers import gpt2
from helpers import plain_convert as convert
from safetensors.torch import load_file
from test_uptraining import FEW

from sqa_convert import Calibration, Recipe, bench, evaluate, uptrain
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.errors import DataError, OutputError, RecipeError
from sqa_convert.pipeline.verify import verify
from sqa_convert.speed.bench import bench_layers
from sqa_convert.speed.settings import Settings
from sqa_convert.uptraining.recipe import dump_recipe
from sqa_convert.uptraining.trainer import UptrainingTrainer

RECIPE = dataclasses.replace(FEW, tokens=2 * 256, evaluations=1, held_out_tokens=256)
FITTED = Calibration(tokens=1024, refine_steps=2)


@contextlib.contextmanager
def changed(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def deterministic():
    return changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def no_gradients():
    return changed(torch.is_grad_enabled, torch.set_grad_enabled, False)


def dtype(value):
    return changed(torch.get_default_dtype, torch.set_default_dtype, value)


def precision(value):
    return changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


MODES = {
    "no_grad": torch.no_grad,
    "set_grad_enabled": no_gradients,
    "inference_mode": torch.inference_mode,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype float64": lambda: dtype(torch.float64),
    "default dtype bfloat16": lambda: dtype(torch.bfloat16),
    "default device meta": lambda: default_device("meta"),
    "default device cpu": lambda: default_device("cpu"),
    "within device meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "matmul medium": lambda: precision("medium"),
    "flash attention only": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
    "numpy raises": lambda: np.errstate(all="raise"),
    "warnings are errors": warnings_are_errors,
    "seeded": lambda: changed(torch.get_rng_state, torch.set_rng_state, torch.Generator().manual_seed(99).get_state()),
}


def settings():
    """All that a caller may have set, as far as it can be compared."""
    loggers = [logging.root, *(logging.getLogger(name) for name in ("transformers", "datasets", "sqa", "accelerate"))]
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "kernels": (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()),
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "errors": np.geterr(),
        "python": random.getstate(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "loggers": [(o.name, o.level, o.handlers[:], o.propagate, o.disabled) for o in loggers],
        "disabled": logging.root.manager.disable,
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert("sample:gpt2", 6, 2, output=tmp_path_factory.mktemp("callers") / "out").output


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def converted(model, folder, work):
    return weights_of(convert(model, 6, 2, calibration=None).model)


def fitted(model, folder, work):
    return weights_of(convert(model, 6, 2, method="procrustes", calibration=FITTED).model)


def written(model, folder, work):
    result = convert("sample:gpt2", 6, 2, output=work / "written", evaluate=False)
    return weights_of(result.model)


def measured(model, folder, work):
    return evaluate(folder, "sample:gpt2", tokens=128)


def verified(model, folder, work):
    return verify(folder)


def trained(model, folder, work):
    shutil.copytree(folder, work / "trained")
    report = uptrain(work / "trained", RECIPE)
    return {"curve": report["uptraining"]["curve"]} | load_file(work / "trained" / "model.safetensors")


def benched(model, folder, work):
    rows = bench({"it": folder}, Settings(lengths=(8,), repeats=1, parts=("model",), modes=("train",)))["rows"]
    return {"rows": [(row["model"], row["dtype"], row["flops"]) for row in rows]}


def layers_benched(model, folder, work):
    rows = bench_layers(4, 8, ("mha", "sqa"), Settings(lengths=(8,), repeats=1, modes=("prefill",)))["rows"]
    return {"rows": [(row["model"], row["dtype"], row["flops"]) for row in rows]}


QUICK = {"convert": converted, "evaluate": measured}
SLOW = {
    "convert, fitted": fitted,
    "convert to a folder": written,
    "uptrain": trained,
    "bench": benched,
    "bench_layers": layers_benched,
    "verify": verified,
}
FUNCTIONS = QUICK | SLOW


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """What each function gives where nothing is set."""
    known = {}

    def look(name, model):
        if name not in known:
            known[name] = FUNCTIONS[name](model, folder, tmp_path_factory.mktemp("expected"))
        return known[name]

    return look


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


COMBINED = ["inference_mode", "autocast bfloat16", "default dtype bfloat16", "deterministic", "within device meta"]
SLOWLY = [pytest.param(name, mode, marks=pytest.mark.integration) for name in SLOW for mode in MODES]


@pytest.mark.parametrize(("name", "mode"), [*((name, mode) for name in QUICK for mode in MODES), *SLOWLY])
def test_in_every_mode_the_same_is_computed_and_the_mode_stays(name, mode, folder, expected, tmp_path):
    torch.manual_seed(1)
    model = gpt2(layers=1)
    wanted = expected(name, model)
    with MODES[mode]():
        before = settings()
        found = FUNCTIONS[name](model, folder, tmp_path)
        assert settings() == before
    same(found, wanted)


ALL_AT_ONCE = [*list(SLOW)[:-1], pytest.param("verify", marks=pytest.mark.integration)]  # which starts a process


@pytest.mark.parametrize("name", ALL_AT_ONCE)
def test_in_all_modes_at_once_too(name, folder, expected, tmp_path):
    torch.manual_seed(1)
    model = gpt2(layers=1)
    wanted = expected(name, model)
    with contextlib.ExitStack() as stack:
        for mode in COMBINED:
            stack.enter_context(MODES[mode]())
        before = settings()
        found = FUNCTIONS[name](model, folder, tmp_path)
        assert settings() == before
    same(found, wanted)


def test_a_model_made_in_inference_mode_is_converted():
    torch.manual_seed(1)
    wanted = convert(gpt2(layers=1), 6, 2, method="procrustes", calibration=FITTED).model
    torch.manual_seed(1)
    with torch.inference_mode():
        model = gpt2(layers=1)
        found = convert(model, 6, 2, method="procrustes", calibration=FITTED).model
    same(weights_of(found), weights_of(wanted))
    assert not any(parameter.is_inference() for parameter in found.parameters())


def test_what_fails_leaves_the_callers_settings_too(tmp_path):
    random.seed(5)
    with torch.no_grad(), dtype(torch.float64):
        before = settings()
        for failing in (lambda: convert("nowhere", 6, 2), lambda: evaluate(tmp_path), lambda: uptrain(tmp_path)):
            with pytest.raises(OSError, match=r"nowhere|holds no|does not load"):
                failing()
        assert settings() == before


def test_while_a_model_is_trained_the_environment_and_signals_may_change_and_after_it_they_are_as_before(
    folder, tmp_path, monkeypatch
):
    shutil.copytree(folder, tmp_path / "out")
    seen, step = [], UptrainingTrainer.training_step

    def look(self, *arguments, **options):
        seen.append(("TENSORBOARD_LOGGING_DIR" in os.environ, signal.getsignal(signal.SIGINT)))
        logging.getLogger("transformers").setLevel(logging.DEBUG)
        os.environ["ADDED"] = "1"
        return step(self, *arguments, **options)

    monkeypatch.setattr(UptrainingTrainer, "training_step", look)
    before, handler = settings(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        uptrain(tmp_path / "out", RECIPE, evaluate=False)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert settings() == before
    assert set(seen) == {(True, signal.SIG_IGN)}  # an inherited "ignore" is respected


def test_threads_come_one_after_the_other_and_get_what_each_would_alone():
    torch.manual_seed(1)
    models = [gpt2(layers=1) for _ in range(3)]
    wanted = [weights_of(convert(model, 6, 2, method="svd", calibration=None).model) for model in models]
    found, inside, most = [None] * 3, [], []

    def progress(stage, done, total, news=""):
        inside.append(threading.get_ident())
        most.append(len(set(inside[-2:])))

    def work(i):
        result = convert(models[i], 6, 2, method="svd", calibration=None, progress=progress)
        found[i] = weights_of(result.model)

    before = settings()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settings() == before
    for one, other in zip(found, wanted, strict=True):
        same(one, other)
    assert most.count(2) == 2  # from one to the next, never back


def test_a_progress_callback_may_call_again():
    found = []

    def progress(stage, done, total, news=""):
        if not found:
            found.append(None)
            found[0] = convert(gpt2(layers=1), 6, 2, calibration=None).report

    convert(gpt2(layers=1), 6, 2, calibration=None, progress=progress)
    assert found[0]["method"] == "mean"


def test_an_empty_environment_variable_and_a_removed_one_come_back(monkeypatch):
    from sqa_convert.caller_settings import undisturbed

    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("THERE", "1")

    @undisturbed
    def change(recipe: Recipe) -> Recipe:
        """Text."""
        del os.environ["THERE"]
        os.environ["EMPTY"] = os.environ["NEW"] = "x"
        return recipe

    assert change(FEW) is FEW and change.__doc__ == "Text."
    assert (os.environ["THERE"], os.environ["EMPTY"], "NEW" in os.environ) == ("1", "", False)


def test_paths_may_be_paths_and_what_is_none_of_what_is_taken_is_told(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text of a few words\n" * 400)
    measured = evaluate(folder, SAMPLES / "gpt2", data=text, text_column=None, tokens="1k", seed=np.int64(1))
    assert measured["data"] == f"{text}, held-out part" and measured["against"]["loss"] > 0
    (tmp_path / "mine.yaml").write_text(dump_recipe(RECIPE))
    shutil.copytree(folder, tmp_path / "trained")
    report = uptrain(
        tmp_path / "trained", tmp_path / "mine.yaml", source=SAMPLES / "gpt2", data=text, evaluate=False, seed="3"
    )
    assert report["uptraining"]["data"] == str(text) and report["uptraining"]["seed"] == 3
    for wrong in ({"tokens": 0}, {"tokens": 1}, {"tokens": -5}, {"tokens": None}, {"device": None}, {"seed": 2**80}):
        with pytest.raises(RecipeError, match=f"^{next(iter(wrong))}="):
            evaluate(folder, **wrong)
    with pytest.raises(RecipeError, match="give a name, the path of a YAML file"):
        uptrain(tmp_path / "trained", {"tokens": "5M"})
    for call in (lambda: uptrain(None), lambda: convert("sample:gpt2", 6, 2, output=b"out")):
        with pytest.raises(OutputError):
            call()
    for heads in (("6", 2), (6, 2.0)):
        with pytest.raises(RecipeError, match="give a whole number"):
            convert("sample:gpt2", *heads)
    with pytest.raises(RecipeError, match=r"^seed="):
        convert("sample:gpt2", 6, 2, output=tmp_path / "never", seed=2**80)
    with pytest.raises(DataError, match="no regular file"):
        os.mkfifo(tmp_path / "pipe")
        convert("sample:gpt2", 6, 2, method="svd", calibration=tmp_path / "pipe")
