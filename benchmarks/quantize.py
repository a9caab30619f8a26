"""What 8-bit weights cost a converted model, beside what they cost its source: torchao, both samples.

    pip install 'sqa-convert[quantize]'
    python benchmarks/quantize.py

Each sample is converted to 8/4 of 12 heads by the default. Source and result are measured in float32, with int8 weights
alone, and with int8 weights and activations quantized as they come (dynamic), all on the same held-out text: loss, and
KL to the source in float32. Embeddings and the language model head stay as they are. GPT-2's Conv1D layers, which
torchao leaves alone, are made Linear first. Writes benchmarks/results/quantize.json and the table of docs/quantize.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

import sqa_convert

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quantize.json"
PAGE = ROOT / "docs" / "quantize.md"
BEGIN, END = "<!-- written by benchmarks/quantize.py -->", "<!-- end of quantize -->"
CONFIGS = {
    "float32": None,
    "int8 weights": Int8WeightOnlyConfig,
    "int8 weights, dynamic": Int8DynamicActivationInt8WeightConfig,
}
AUTO = {"gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}


def with_linear(model: nn.Module) -> nn.Module:
    """The same model, its Conv1D layers as Linear ones."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight, linear.bias = nn.Parameter(child.weight.T.contiguous()), child.bias
                setattr(parent, name, linear)
    return model


def quantized(model: Any, config: Any) -> Any:
    """A model whose Linear layers, but for the head, are in 8 bits; as it is where there is no config."""
    head = model.get_output_embeddings()

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module is not head

    if config is not None:
        quantize_(model, config(), filter_fn=chosen)
    return model


def measured(sample: str, tokens: int, place: Path) -> list[dict[str, Any]]:
    """Loss and KL of every row of a sample."""
    source = sqa_convert.resolve(f"sample:{sample}")
    sqa_convert.convert(source, 8, 4, output=place / sample, verify=False)
    rows = []
    for name, folder in (("source", source), ("converted", place / sample)):
        for how, config in CONFIGS.items():
            model = AUTO[sample].from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
            figures = sqa_convert.evaluate(
                quantized(with_linear(model), config), str(source), tokens=tokens, tokenizer=str(source)
            )["model"]
            keys = ("loss", "loss_error", "kl", "kl_error", "top1")
            rows.append({"sample": sample, "model": name, "weights": how} | {key: figures[key] for key in keys})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| sample | weights | source: loss, KL | converted: loss, KL |", "|---|---|---|---|"]
    for sample in AUTO:
        for how in CONFIGS:
            of = {row["model"]: row for row in rows if (row["sample"], row["weights"]) == (sample, how)}
            cells = [f"{of[name]['loss']:.4f}, {of[name]['kl']:.4f}" for name in ("source", "converted")]
            lines.append(f"| {sample} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for sample in AUTO for row in measured(sample, asked.tokens, Path(folder))]
    result = {
        "heads": [12, 8, 4], "tokens": asked.tokens, "rows": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "versions": {name: version(name) for name in ("torch", "torchao", "transformers")}
        | {"python": platform.python_version(), "sqa_convert": sqa_convert.__version__},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    page = re.sub(f"{BEGIN}.*?{END}", f"{BEGIN}\n\n{table(rows)}\n\n{END}", text, flags=re.S)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
