"""How fast `SparseQueryAttention` is beside `nn.MultiheadAttention`, forward, and what counting operations promises.

    python benchmarks/layers.py
    python benchmarks/layers.py --lengths 256 --rounds 2 --width 64 --heads 4

Self-attention of random inputs in eval mode without gradients, batch 1, float32, without weights; once more causal. All
layers in turn, several rounds; medians and ranges, ratios within a round. "counted" is the ratio of floating point
operations, projections and all, as torch counts them. Writes benchmarks/results/layers-DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from sqa_convert.devices import choose_device, device_name
from sqa_convert.layers import SparseQueryAttention
from sqa_convert.report.provenance import machine
from sqa_convert.speed.flops import counted
from sqa_convert.speed.timing import alternate

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("gqa", "sqa", "ssqa", "xsqa", "lsqa")


def layers(width: int, heads: int) -> dict[str, nn.Module]:
    """nn.MultiheadAttention, and the layers in its place: at all heads, and the variants."""
    module = nn.MultiheadAttention(width, heads, batch_first=True)
    found: dict[str, nn.Module] = {
        "nn.MultiheadAttention": module,
        "all heads": SparseQueryAttention.from_multihead(module),
    }
    for variant in VARIANTS:
        found[variant] = SparseQueryAttention(width, heads, batch_first=True, variant=variant)
    return {name: layer.eval() for name, layer in found.items()}


def forward(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> Any:
    causal = {} if mask is None else {"attn_mask": mask, "is_causal": True}
    with torch.no_grad():
        return layer(x, x, x, need_weights=False, **causal)[0]


def operations(layer: nn.Module, length: int, width: int) -> int:
    """Of a forward pass with weights, of which no kernel hides a product."""
    with torch.device("meta"):
        x, shell = torch.empty(1, length, width), copy.deepcopy(layer).to("meta").train()
    return counted(lambda: shell(x, x, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[1024, 8192])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = choose_device(args.device)
    torch.manual_seed(0)
    made = {name: layer.to(device) for name, layer in layers(args.width, args.heads).items()}
    rows = []
    for length in args.lengths:
        x = torch.randn(1, length, args.width, device=device)
        for causal in (False, True):
            mask = nn.Transformer.generate_square_subsequent_mask(length, device=device) if causal else None
            runs: dict[str, Callable[[], Any]] = {
                name: partial(forward, layer, x, mask) for name, layer in made.items()
            }
            took = alternate(runs, args.rounds, device)
            flops = {name: operations(layer, length, args.width) for name, layer in made.items()}
            first = flops["nn.MultiheadAttention"]
            print(f"\n{length:,} tokens{', causal' if causal else ''}")
            for name, spread in took.items():
                gained = {
                    other: median(a / b for a, b in zip(took[other], spread, strict=True))
                    for other in ("nn.MultiheadAttention", "all heads")
                }
                row = {"length": length, "causal": causal, "layer": name, "seconds": spread}
                row |= {"speedup": gained, "counted": first / flops[name]}
                rows.append(row)
                print(
                    f"{name:>22}: {1e3 * median(spread):8.1f} ms ({1e3 * min(spread):.1f}–{1e3 * max(spread):.1f})  "
                    f"{gained['nn.MultiheadAttention']:.2f}× nn.MultiheadAttention, "
                    f"{gained['all heads']:.2f}× all heads, "
                    f"counted {row['counted']:.2f}×"
                )
    about = {"machine": machine(device_name(device)), "threads": torch.get_num_threads()}
    place = RESULTS / f"layers-{device.type}.json"
    place.write_text(json.dumps(about | vars(args) | {"rows": rows}, indent=1) + "\n")
    print(f"\n{about}\nwritten: {place}")


if __name__ == "__main__":
    main()
