"""A small Chronos, T5 on quantised time series, trained here: what conversions lose, in nats and in forecast error.

    python benchmarks/chronos_t5.py [--steps 5000]

Needs `sqa-convert[chronos]`. Series are drawn: level, trend, season and noise. The package `chronos-forecasting`
quantises them and forecasts; the model is trained in some minutes on one CPU core and stays in build/chronos
(`--retrain` makes it anew). It is converted from batches of training series with `mean` and with the default, and with
the default that is given no batches. KL, MASE and weighted quantile loss are of held-out series of three seeds; every
model is forecast with as users do it, by `ChronosPipeline.from_pretrained`. Writes benchmarks/results/chronos.json and
the table of docs/chronos.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import textwrap
import time
from pathlib import Path
from statistics import mean
from typing import Any

import chronos
import torch
import transformers
from chronos import ChronosConfig, ChronosPipeline
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

import sqa_convert

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "chronos.json"
PAGE = ROOT / "docs" / "chronos.md"
BEGIN, END = "<!-- written by benchmarks/chronos_t5.py -->", "<!-- end of chronos -->"

CONTEXT, HORIZON = 64, 16
PERIODS = torch.tensor([4, 6, 8, 12])
QUANTILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
SEEDS = (1, 2, 3)
HELD_OUT = 256  # series of a seed
CALIBRATED_ON = 4096  # series
BATCH = 32
HEADS = ((4, 4), (4, 2))

CHRONOS = {
    "tokenizer_class": "MeanScaleUniformBins",
    "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
    "context_length": CONTEXT,
    "prediction_length": HORIZON,
    "n_tokens": 512,
    "n_special_tokens": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_eos_token": True,
    "model_type": "seq2seq",
    "num_samples": 20,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""As Chronos-T5 has them, with a shorter context and fewer bins."""

MODEL = T5Config(
    vocab_size=512, d_model=64, d_kv=16, num_heads=8, d_ff=256, num_layers=2, num_decoder_layers=2, dropout_rate=0.0,
    n_positions=CONTEXT, relative_attention_num_buckets=64, initializer_factor=0.05, tie_word_embeddings=False,
    pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    chronos_config=CHRONOS, architectures=["T5ForConditionalGeneration"],
)  # fmt: skip

Batch = dict[str, Tensor]


# The series


def series(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Drawn series (count, CONTEXT + HORIZON), and the period of each."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1,)), generator=generator)

    period = PERIODS[torch.randint(len(PERIODS), (count, 1), generator=generator)]
    steps = torch.arange(CONTEXT + HORIZON, dtype=torch.float32)
    harmonic = torch.arange(1.0, 3.0)
    phase = uniform(0, 2 * torch.pi, 2, 1) + 2 * torch.pi * harmonic[:, None] * (steps / period)[:, None]
    season = (uniform(0, 1, 2, 1) / harmonic[:, None] * phase.sin()).sum(1)
    trend = uniform(-1, 1) * steps / len(steps)
    noise = uniform(0.02, 0.1) * torch.randn(count, len(steps), generator=generator)
    return uniform(0, 2) + trend + season + noise, period[:, 0]


def batches(values: Tensor, generator: torch.Generator | None = None) -> list[Batch]:
    """Series as Chronos reads them, the labels what comes next. With a generator a quarter of them begin later."""
    tokenizer = ChronosConfig(**CHRONOS).create_tokenizer()
    context, future = values[:, :CONTEXT].clone(), values[:, CONTEXT:]
    if generator is not None:
        short = torch.rand(len(values), generator=generator) < 0.25
        first = torch.randint(CONTEXT // 2, (len(values),), generator=generator) * short
        context[torch.arange(CONTEXT) < first[:, None]] = float("nan")
    ids, mask, scale = tokenizer.context_input_transform(context)
    labels, _ = tokenizer.label_input_transform(future, scale)
    whole = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    parts = {name: part.split(BATCH) for name, part in whole.items()}
    return [dict(zip(parts, some, strict=True)) for some in zip(*parts.values(), strict=True)]


# The source


def train(steps: int, folder: Path) -> dict[str, Any]:
    """Trains the source into a folder."""
    transformers.set_seed(0)
    model, generator = T5ForConditionalGeneration(MODEL), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 30, steps)
    held_out, start = batches(held_out_series(SEEDS[0])[0]), time.perf_counter()
    for step in range(1, steps + 1):
        model(**batches(series(BATCH, generator)[0], generator)[0]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            told = f"held-out {loss(model, held_out):.3f}, another series' context {loss(model, held_out, True):.3f}"
            print(f"step {step}: {told}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval().save_pretrained(folder)
    found = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "series_trained_on": steps * BATCH,
        "seconds": round(time.perf_counter() - start),
        "held_out_loss": round(loss(model, held_out), 4),
        "held_out_loss_with_another_series_context": round(loss(model, held_out, True), 4),
    }
    (folder / "training.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


@torch.no_grad()
def loss(model: Any, held_out: list[Batch], crossed: bool = False) -> float:
    """Nats a token; `crossed` gives the encoder another series."""
    total = count = 0.0
    for batch in held_out:
        if crossed:
            batch = batch | {name: batch[name].roll(1, 0) for name in ("input_ids", "attention_mask")}
        total += cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").item()
        count += batch["labels"].numel()
    return total / count


# Forecasts


def held_out_series(seed: int) -> tuple[Tensor, Tensor]:
    return series(HELD_OUT, torch.Generator().manual_seed(1_000_000 + seed))


def forecast(pipeline: Any, values: Tensor) -> Tensor:
    """Quantiles (n, HORIZON, 9) of 20 paths for each series."""
    torch.manual_seed(0)
    parts = values[:, :CONTEXT].split(BATCH)
    return torch.cat([pipeline.predict_quantiles(part, quantile_levels=QUANTILES)[0] for part in parts])


def last_season(values: Tensor, period: Tensor) -> Tensor:
    """What comes next if the last season is repeated, as quantiles."""
    place = CONTEXT - period[:, None] + torch.arange(HORIZON) % period[:, None]
    return values.gather(1, place)[..., None].expand(-1, -1, len(QUANTILES))


def errors(quantiles: Tensor, values: Tensor, period: Tensor) -> dict[str, float]:
    """MASE of the median and weighted quantile loss, as in arXiv 2403.07815, section 5.4."""
    context, future = values[:, :CONTEXT], values[:, CONTEXT:]
    step = torch.arange(CONTEXT)
    lagged = context.gather(1, (step - period[:, None]).clamp(min=0))
    naive = [(row - past)[p:].abs().mean() for row, past, p in zip(context, lagged, period, strict=True)]
    median = quantiles[..., QUANTILES.index(0.5)]
    level, missed = torch.tensor(QUANTILES), future[..., None] - quantiles
    pinball = torch.maximum(level * missed, (level - 1) * missed).sum((0, 1))
    return {
        "mase": ((future - median).abs().mean(1) / torch.stack(naive)).mean().item(),
        "wql": (2 * pinball / future.abs().sum()).mean().item(),
    }


# What conversions lose


def ways(train_batches: list[Batch]) -> dict[str, dict[str, Any]]:
    """Options of `sqa_convert.convert`."""
    return {
        "mean": {"method": "mean", "calibration": None},
        "default": {"calibration": sqa_convert.Calibration(train_batches)},
        "default, no batches given": {},
    }


def measure(folder: Path, results: dict[str, Any]) -> None:
    """Adds the rows of every model to the results."""
    held_out = {seed: held_out_series(seed) for seed in SEEDS}
    generator = torch.Generator().manual_seed(7)
    train_batches = batches(series(CALIBRATED_ON, generator)[0], generator)
    rows = results["rows"] = []

    def add(name: str, heads: str, quantiles: Any, kl: Any = None, **more: Any) -> None:
        found = [errors(quantiles(*held_out[seed]), *held_out[seed]) for seed in SEEDS]
        row = {"model": name, "heads": heads, **{key: [f[key] for f in found] for key in found[0]}}
        rows.append(row | ({"kl": [kl(*held_out[seed]) for seed in SEEDS]} if kl else {}) | more)
        print({k: [round(x, 4) for x in v] if isinstance(v, list) else v for k, v in rows[-1].items()}, flush=True)

    def by_pipeline(path: Path) -> Any:
        pipeline = ChronosPipeline.from_pretrained(path)
        return lambda values, period: forecast(pipeline, values)

    add("the last season repeated", "", last_season)
    add("source", "8/8", by_pipeline(folder))
    for q, kv in HEADS:
        for name, options in ways(train_batches).items():
            start = time.perf_counter()
            conversion = sqa_convert.convert(folder, q, kv, device="cpu", **options)
            seconds, place = round(time.perf_counter() - start), folder.parent / re.sub(r"\W+", "-", f"{name} {q} {kv}")
            conversion.save_pretrained(place, overwrite=True, verify=False)

            def kl(values: Tensor, period: Tensor, conversion: Any = conversion) -> float:
                data = {"train": train_batches, "validation": batches(values)}
                return float(conversion.evaluate(data, device="cpu")["model"]["kl"])

            text = conversion.report.get("calibration", {}).get("text")
            add(name, f"{q}/{kv}", by_pipeline(place), kl, seconds=seconds, calibrated_on=text)


def table(results: dict[str, Any]) -> list[str]:
    """A row for each model: the mean of the seeds and their range."""

    def cell(values: list[float] | None, digits: int) -> str:
        if values is None:
            return ""
        return f"{mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"

    lines = ["| model | heads | KL, nats a token | MASE | WQL |", "|---|---|--:|--:|--:|"]
    for row in results["rows"]:
        cells = [cell(row.get("kl"), 4), cell(row["mase"], 3), cell(row["wql"], 4)]
        lines.append(f"| {row['model']} | {row['heads']} | {' | '.join(cells)} |")
    source, versions = results["source"], results["versions"]
    told = (
        f"Mean and range of {len(results['seeds'])} seeds of {results['series_of_a_seed']} held-out series. The source "
        f"has {source['parameters'] / 1e6:.2f} M parameters and was trained for {source['steps']:,} steps, "
        f"{source['seconds'] / 60:.0f} minutes; its loss is {source['held_out_loss']:.2f} nats a token, "
        f"{source['held_out_loss_with_another_series_context']:.2f} given another series' context. "
        f"{results['machine']}; {', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    return [*lines, "", *textwrap.wrap(told, 120)]


def write_page(results: dict[str, Any]) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, *table(results), END + rest.partition(END)[2]]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000, help="of training")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "chronos")
    parser.add_argument("--retrain", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.output / "source"
    if options.retrain:
        shutil.rmtree(folder, ignore_errors=True)
    source = json.loads((folder / "training.json").read_text()) if folder.exists() else train(options.steps, folder)
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "chronos-forecasting": chronos.__version__, "sqa_convert": sqa_convert.__version__,
        },
        "source": source,
        "seeds": list(SEEDS),
        "series_of_a_seed": HELD_OUT,
    }  # fmt: skip
    measure(folder, results)
    print("\n".join(table(results)))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


if __name__ == "__main__":
    main()
