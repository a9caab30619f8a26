"""The variants of the SQA paper (arXiv 2510.01817), trained from scratch on the same tokens in the same order.

    python benchmarks/variants.py --small    (CPU: 4 layers of 16 heads of 8, context 256; half an hour on one core)
    python benchmarks/variants.py            (GPU: the paper's dense shape, 8 layers of 16 heads of 16, context 1,024)

MHA, GQA, MQA, SQA, sSQA, xSQA and xSMQA with our model class, on Python source with the sample's tokenizer. Reports
held-out loss and accuracy, parameters, seconds of a forward and backward pass over a batch (synchronised, the variants
in turn) and cache bytes a token. Writes benchmarks/results/variants-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recovery
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, set_seed

from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.devices import choose_device
from sqa_convert.models import SQAGPT2Config, SQAGPT2ForCausalLM
from sqa_convert.speed.bench import grid_heads
from sqa_convert.speed.settings import GRID
from sqa_convert.speed.timing import Spread, alternate
from sqa_convert.text.blocks import token_blocks
from sqa_convert.text.collate import CausalCollator, Rows
from sqa_convert.text.documents import BUILT_IN, documents
from sqa_convert.text.tokenizers import load_tokenizer

DATA = f"{sysconfig.get_path('purelib')}/**/*.py"
SHAPES = {  # layers, heads, head size, context, rows a step, steps, distinct tokens
    "paper": (8, 16, 16, 1024, 32, 1200, 40_000_000),
    "small": (4, 16, 8, 256, 8, 600, 1_300_000),
}
PUBLISHED = {
    "mha": 1.1976,
    "gqa": 1.2177,
    "mqa": 1.2497,
    "sqa": 1.2272,
    "ssqa": 1.2201,
    "xsqa": 1.2428,
    "xsmqa": 1.2815,
}
"""the paper's validation losses of its dense models, one run each on half of the English Wikipedia"""


def make(variant: str, vocabulary: int, shape: tuple[int, ...]) -> SQAGPT2ForCausalLM:
    layers, heads, size, context = shape[:4]
    q, kv = grid_heads(variant, heads)
    return SQAGPT2ForCausalLM(
        SQAGPT2Config(
            vocab_size=vocabulary, n_layer=layers, n_embd=heads * size, n_head=q, num_key_value_heads=kv,
            head_dim=size, n_positions=context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def train(model: Any, blocks: torch.Tensor, shape: tuple[int, ...], seed: int, device: torch.device) -> None:
    rows, steps = shape[4:6]
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch, max_steps=steps, per_device_train_batch_size=rows, learning_rate=2e-3,
                lr_scheduler_type="cosine", warmup_steps=steps // 20, weight_decay=0.1, adam_beta2=0.95,
                bf16=device.type == "cuda", use_cpu=device.type == "cpu", remove_unused_columns=False,
                save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=seed,
            ),
            train_dataset=Rows(blocks, steps * rows),
            data_collator=CausalCollator(),
        ).train()  # fmt: skip


@torch.no_grad()
def held_out(model: Any, blocks: torch.Tensor, rows: int) -> dict[str, float]:
    """Loss in nats a token, and the share of tokens that are the likeliest."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for part in blocks.split(rows):
        tokens = part.to(model.device)
        logits = model(tokens, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        labels = tokens[:, 1:].flatten()
        loss += cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        count += labels.numel()
    return {"loss": loss / count, "accuracy": right / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=recovery.RESULTS)
    options = parser.parse_args()
    device = choose_device(options.device)
    shape = SHAPES["small" if options.small else "paper"]
    if options.steps:
        shape = (*shape[:5], options.steps, shape[6])
    data = BUILT_IN if options.small else DATA
    tokenizer = load_tokenizer(SAMPLES / "gpt2")
    context, rows = shape[3], shape[4]
    blocks = token_blocks(documents(data, "train"), tokenizer, context, shape[6], data)
    test = token_blocks(documents(data, "heldout"), tokenizer, context, 65_536, data)
    found: dict[str, Any] = recovery.describe(device.type, recovery.RECIPE)
    del found["recipe"]
    found |= {
        "shape": dict(zip(("layers", "heads", "head_dim", "context", "rows", "steps"), shape, strict=False)),
        "tokens": context * rows * shape[5],
        "held_out_tokens": test.numel(),
        "seeds": options.seeds,
        "variants": {},
    }
    models = {}
    for variant in GRID:
        runs = []
        for seed in range(options.seeds):
            set_seed(seed)
            model = make(variant, len(tokenizer), shape)
            train(model, blocks, shape, seed, device)
            runs.append(held_out(model, test, rows))
        models[variant] = model
        config = model.config
        found["variants"][variant] = {
            "heads": [config.n_head, config.num_key_value_heads],
            "loss": statistics.mean(run["loss"] for run in runs),
            "losses": [run["loss"] for run in runs],
            "accuracy": statistics.mean(run["accuracy"] for run in runs),
            "parameters": model.num_parameters(),
            "cache_bytes_per_token": 2 * 4 * config.n_layer * config.num_key_value_heads * config.head_dim,
            "published_loss": PUBLISHED[variant],
        }
        print(variant, found["variants"][variant], flush=True)
    tokens = test[:rows].to(device)

    def step(model: Any) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    taken = alternate({name: lambda model=model: step(model) for name, model in models.items()}, 7, device)
    for name, seconds in taken.items():
        found["variants"][name]["seconds_per_batch"] = asdict(Spread.of(seconds))
        print(name, found["variants"][name]["seconds_per_batch"])
    (options.output / f"variants-{device.type}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
