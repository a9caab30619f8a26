"""Chronos: a T5 on quantised time series, converted from batches, with no tokenizer, and used by its own pipeline."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import t5
from transformers import T5Config

from sqa_convert import convert, load
from sqa_convert.errors import UnsupportedModelError

PAGE = Path(__file__).parent.parent / "docs" / "chronos.md"
CONTEXT, HORIZON, SERIES = 40, 8, 80
CHRONOS = {
    "tokenizer_class": "MeanScaleUniformBins", "tokenizer_kwargs": {"low_limit": -4.0, "high_limit": 4.0},
    "context_length": CONTEXT, "prediction_length": HORIZON, "n_tokens": 61, "n_special_tokens": 2, "pad_token_id": 0,
    "eos_token_id": 1, "use_eos_token": True, "model_type": "seq2seq", "num_samples": 4, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0,
}  # fmt: skip
ELSEWHERE = """
import sys
sys.modules["sqa_convert"] = None
import torch
from chronos import BaseChronosPipeline, ChronosPipeline

folder, series, wanted = sys.argv[1], torch.load(sys.argv[2]), torch.load(sys.argv[3])
for kind in ChronosPipeline, BaseChronosPipeline:
    pipeline = kind.from_pretrained(folder, trust_remote_code=True)
    assert type(pipeline) is ChronosPipeline, type(pipeline)
    assert type(pipeline.model.model).__module__.startswith("transformers_modules."), type(pipeline.model.model)
    torch.manual_seed(0)
    torch.testing.assert_close(pipeline.predict(series), wanted)
"""


def values():
    """Noisy waves (n, T), some of them with gaps and late beginnings."""
    time, period = torch.arange(CONTEXT + HORIZON), torch.randint(4, 12, (SERIES, 1))
    waves = 1 + (2 * torch.pi * time / period).sin() + 0.1 * torch.randn(SERIES, len(time))
    waves[1, :20], waves[2, 30:33], waves[3, -2:] = (torch.nan,) * 3
    return waves


@pytest.fixture
def folder(tmp_path):
    """A Chronos of random weights, as its folder is: without a tokenizer."""
    t5(heads=4, layers=2, n_positions=CONTEXT, chronos_config=CHRONOS).save_pretrained(tmp_path / "chronos")
    return tmp_path / "chronos"


def test_what_chronos_reads_of_a_config_stays(folder):
    converted = convert(folder, 2, 2, calibration=None, output=folder.parent / "out", verify=False).output
    assert json.loads((converted / "config.json").read_text())["chronos_config"] == CHRONOS


@pytest.mark.integration
def test_the_page_runs_and_its_folder_forecasts_elsewhere(folder, tmp_path, monkeypatch):
    chronos = pytest.importorskip("chronos", reason="chronos-forecasting is not installed")
    monkeypatch.chdir(tmp_path)
    torch.save(values(), "series.pt")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    code = "\n".join(blocks)
    for written, small in {
        "amazon/chronos-t5-small": str(folder),
        "convert(name, 4, 4,": "convert(name, 2, 2,",
        "Calibration(data)": "Calibration(data, tokens=3000, refine_steps=1)",
        'save_pretrained("chronos-sqa")': 'save_pretrained("chronos-sqa", verify=False)',
        "sequence_length=1024)": "sequence_length=64, tokens=512, evaluations=1, batch_size=4, held_out_tokens=64)",
    }.items():
        assert written in code
        code = code.replace(written, small)
    names = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec"), names)

    conversion, context = names["conversion"], names["series"][names["cut"] :, :-HORIZON]
    assert conversion.report["calibration"]["text"].endswith("72 pairs") and conversion.report["uptraining"]["tokens"]
    assert names["quantiles"].shape == (SERIES // 10, HORIZON, 3)
    saved = load("chronos-sqa")
    kept = [saved.model.config.heads(kind, layer) for kind in ("encoder", "cross") for layer in range(2)]
    assert tuple(map(sum, zip(*kept, strict=True))) == (2 * len(kept), 2 * len(kept))
    own = chronos.ChronosModel(chronos.ChronosConfig(**CHRONOS), conversion.model)
    torch.manual_seed(0)
    wanted = chronos.ChronosPipeline(names["quantised"], own).predict(context)
    torch.save(context, "context.pt")
    torch.save(wanted, "wanted.pt")
    files = ["chronos-sqa", "context.pt", "wanted.pt"]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_chronos_bolt_is_refused(folder):
    """It reads patches of values: as a T5 its folder would hold no working model."""
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["ChronosBoltModelForForecasting"]}
    T5Config.from_dict(config).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="ChronosBoltModelForForecasting is not supported"):
        convert(folder, 2, 2, calibration=None)
