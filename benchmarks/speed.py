"""How fast converted models are: measured beside the original, and against what their operations cost alone.

    python benchmarks/speed.py             (CPU; about half an hour on two cores; --short to try it)
    python benchmarks/speed.py --device cuda --dtype bfloat16

Models of GPT-2 small's shape (12 heads of 64, width 768, 12 layers; 12 to 8/4 and 6/3) and of T5 small's (8 heads of
64, width 512, 6 + 6 layers; 8 to 6/3 and 4/2), of random weights, in prefill, decoding and training, by
`sqa_convert.bench`. Prediction: every operation of a forward pass (projections, attention, feed-forward, norms,
residuals) timed alone on inputs of its shape, and added up. Then the time of a decoding step of T5 against the number
of key/value groups, as in figure 6 of the GQA paper (arXiv 2305.13245). Ratios are taken within rounds that time all
models in turn. Writes benchmarks/results/speed-DEVICE.json and its figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import repeat_kv

import sqa_convert.models as sqa
from sqa_convert import bench
from sqa_convert.devices import choose_device
from sqa_convert.progress import silent
from sqa_convert.report.pictures import speed_picture
from sqa_convert.speed.settings import Settings
from sqa_convert.speed.timing import Spread, alternate

RESULTS = Path(__file__).resolve().parent / "results"
HEADS = {"gpt2": ((8, 4), (6, 3)), "t5": ((6, 3), (4, 2))}
LENGTHS = {"gpt2": (256, 1024), "t5": (512, 2048)}


def models(family: str, folder: Path, small: bool) -> dict[str, Path]:
    """Folders of the original and of the converted shapes, random weights."""
    torch.manual_seed(0)
    if family == "gpt2":
        stock: Any = GPT2Config(n_layer=2 if small else 12)
        made = {"12": GPT2LMHeadModel(stock)}
        for q, kv in HEADS[family]:
            config = sqa.SQAGPT2Config(**stock.to_dict() | {"n_head": q, "num_key_value_heads": kv, "head_dim": 64})
            made[f"{q}/{kv}"] = sqa.SQAGPT2ForCausalLM(config)
    else:
        layers = 2 if small else 6
        stock = T5Config(num_layers=layers, decoder_start_token_id=0)
        made = {"8": T5ForConditionalGeneration(stock)}
        for q, kv in (*HEADS[family], (8, 8), (8, 4), (8, 2), (8, 1)):
            config = sqa.SQAT5Config(**stock.to_dict() | {"num_heads": q, "num_key_value_heads": kv})
            made[f"{q}/{kv}"] = sqa.SQAT5ForConditionalGeneration(config)
    folders = {}
    for name, model in made.items():
        folders[name] = folder / family / name.replace("/", "-")
        model.save_pretrained(folders[name])
    return folders


def operations(model: Any, length: int) -> list[tuple[str, int, Callable[[], Any]]]:
    """Name, how often and what of every operation in a prefill of one row."""
    t5 = model.config.is_encoder_decoder
    layers = model.encoder.block if t5 else model.transformer.h
    layer = layers[0].layer[0].SelfAttention if t5 else layers[0].attn
    width, dtype, device = model.config.hidden_size, model.dtype, model.device
    hidden = torch.randn(1, length, width, dtype=dtype, device=device)
    fused = hasattr(layer, "c_attn")
    kinds = ("c_attn",) if fused else ("q", "k", "v") if t5 else ("q_proj", "k_proj", "v_proj")
    out = layer.c_proj if fused else layer.o if t5 else layer.o_proj
    size = 64
    counts = model.config.heads("encoder" if t5 else "decoder") if hasattr(model.config, "heads") else None
    q, kv = counts or (model.config.num_attention_heads,) * 2
    query, key, value = (
        torch.randn(1, length, n, size, dtype=dtype, device=device).transpose(1, 2) for n in (q, kv, kv)
    )
    merged = torch.randn(1, length, q * size, dtype=dtype, device=device)
    mask = torch.randn(1, q, length, length, dtype=dtype, device=device) if t5 else None
    sdpa = nn.functional.scaled_dot_product_attention

    def attend() -> Any:
        if t5:  # as the layer does
            return sdpa(query, repeat_kv(key, q // kv), repeat_kv(value, q // kv), mask)
        return sdpa(query, key, value, is_causal=True, enable_gqa=q != kv)

    rest = layers[0].layer[-1] if t5 else layers[0].mlp
    norm = layers[0].layer[0].layer_norm if t5 else layers[0].ln_1
    n = len(layers)
    found = [(kind, n, lambda kind=kind: getattr(layer, kind)(hidden)) for kind in kinds]
    found += [
        ("attention", n, attend),
        ("output projection", n, lambda: out(merged)),
        ("feed-forward", n, lambda: rest(hidden)),
        ("norms", n if t5 else 2 * n, lambda: norm(hidden)),
        ("residuals", n if t5 else 2 * n, lambda: hidden + hidden),
    ]
    if t5:
        if counts is None:  # made once a stack, and copied by every layer
            found.append(("position bias", 1, lambda: layer.compute_bias(length, length, device=device)))
            bias = layer.compute_bias(length, length, device=device)
            found.append(("position bias, copied", n, lambda: bias.contiguous()))
        else:
            distances = layer.distances(length, length, 0, device)
            found.append(("position bias", n, lambda: layer.position_bias(*distances, length, length)))
    else:
        found.append(("logits", 1, lambda: model.lm_head(hidden[:, -1:])))
    return found


@torch.no_grad()
def predict(folders: dict[str, Path], family: str, length: int, settings: Settings) -> dict[str, Any]:
    """Seconds of every operation alone, of each model, and the ratio of their sums to the original's."""
    from sqa_convert.evaluation.load import load_model

    device = choose_device(settings.device)
    runs, times = {}, {}
    for name, folder in folders.items():
        model = load_model(folder, dtype=settings.dtype).to(device)
        for operation, count, run in operations(model, length):
            runs[f"{name} {operation}"], times[f"{name} {operation}"] = run, count
    taken = alternate(runs, settings.repeats, device)
    sums = {
        name: [
            sum(times[key] * taken[key][i] for key in runs if key.startswith(f"{name} "))
            for i in range(settings.repeats)
        ]
        for name in folders
    }
    base = sums[next(iter(folders))]
    return {
        "length": length,
        "operations": {key: {"times": times[key], "seconds": asdict(Spread.of(taken[key]))} for key in runs},
        "speedup": {
            name: asdict(Spread.of([a / b for a, b in zip(base, mine, strict=True)])) for name, mine in sums.items()
        },
    }


def decoding(
    folders: dict[str, Path], settings: Settings, length: int, batches: tuple[int, ...]
) -> list[dict[str, Any]]:
    """A decoding step of T5 of eight query heads at 1 … 8 key/value groups."""
    names = ["8", "8/8", "8/4", "8/2", "8/1"]
    found = []
    for batch in batches:
        only = replace(settings, lengths=(length,), modes=("decode",), parts=("model",), batch=batch)
        found.append(bench({name: folders[name] for name in names}, only))
    return found


def decoding_picture(measured: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(measured), 3.4), layout="constrained")
    for panel, result in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        rows = {row["model"]: {k: 1e3 * v for k, v in row["seconds"].items()} for row in result["rows"]}
        stock = rows.pop("8")
        groups = [int(name.partition("/")[2]) for name in rows]
        middle = [row["median"] for row in rows.values()]
        around = [
            [row["median"] - row["low"] for row in rows.values()],
            [row["high"] - row["median"] for row in rows.values()],
        ]
        panel.errorbar(groups, middle, around, marker="o", capsize=3, label="converted, 8 query heads")
        panel.axhline(stock["median"], linestyle="--", color="#555555", label="original, 8 heads")
        first = result["rows"][0]
        panel.set(
            title=f"batch {first['batch']}, {first['length']:,} tokens read", xlabel="key/value groups",
            ylabel="ms a step", xscale="log", ylim=(0, None),
        )  # fmt: skip
        panel.set_xticks(groups, [str(g) for g in groups])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(f"T5 small's shape, decoding, {measured[0]['device']}", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="two layers, short texts: to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = choose_device(options.device)
    found: dict[str, Any] = {}
    path = options.output / f"speed-{device.type}.json"
    with tempfile.TemporaryDirectory() as scratch:
        for family, lengths in LENGTHS.items():
            folders = models(family, Path(scratch), options.short)
            shown = dict(list(folders.items())[: 1 + len(HEADS[family])])
            settings = Settings(
                lengths=(64, 128) if options.short else lengths,
                device=options.device, dtype=options.dtype, repeats=options.repeats,
            )  # fmt: skip
            found[family] = bench(shown, settings, progress=silent)
            found[family]["predicted"] = [predict(shown, family, length, settings) for length in settings.lengths]
            for row in found[family]["rows"]:
                if row["part"] == "model" and "speedup" in row:
                    print(family, row["mode"], row["length"], row["model"], row["speedup"], f"ideal {row['ideal']:.3f}")
            for row in found[family]["predicted"]:
                print(family, "predicted prefill", row["length"], row["speedup"], flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            (options.output / f"speed-{device.type}-{family}.svg").write_bytes(speed_picture(found[family], "svg"))
        found["t5_decoding"] = decoding(folders, settings, settings.lengths[-1], (1, 8))
        path.write_text(json.dumps(found, indent=1) + "\n")
        decoding_picture(found["t5_decoding"], options.output / f"speed-{device.type}-t5-decoding.svg")
    for result in found["t5_decoding"]:
        for row in result["rows"]:
            print("t5 decoding", row["batch"], row["model"], row["seconds"], row["speedup"])


if __name__ == "__main__":
    main()
