"""How fast uptraining runs, beside stock `transformers.Trainer` training of the original at the same settings.

    python benchmarks/throughput.py                                    (GPT-2 small's shape; a GPU)
    python benchmarks/throughput.py --layers 2 --width 192 --context 256 --rows 4 --steps 8     (CPU)

Three trainings of random weights on the same blocks, in turn, several rounds of some steps: the original by stock
Trainer (cross-entropy), the converted shape by cross-entropy, and by KL to the original. Steps are timed one by one,
synchronised, the first three of each round left out. Then the parts of a KL step alone: batch, teacher, student,
backward, optimizer. MFU: of the student's forward and backward pass and the teacher's forward, against the device's
dense bfloat16 peak. Writes benchmarks/results/throughput-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import recovery
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, set_seed

from sqa_convert import Recipe
from sqa_convert.calibration.distillation_loss import Targets, aligned_labels, forward_with_loss, hidden_states
from sqa_convert.devices import choose_device, peak_flops, synchronize
from sqa_convert.models import SQAGPT2Config, SQAGPT2ForCausalLM
from sqa_convert.speed.flops import training_flops
from sqa_convert.speed.timing import Spread, alternate
from sqa_convert.text.collate import CausalCollator, Rows
from sqa_convert.uptraining.trainer import UptrainingTrainer
from sqa_convert.uptraining.trainer_arguments import training_arguments

SKIPPED = 3  # steps of a round, while the machine warms up


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.last = device, [], 0.0  # type: ignore[var-annotated]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()


def parts_of_a_step(
    teacher: Any, model: Any, blocks: torch.Tensor, rows: int, device: torch.device, autocast: Any
) -> dict[str, Any]:
    """Seconds of what a KL step is made of, each alone and synchronised."""
    collate = CausalCollator()
    batch = collate([(i, blocks[i]) for i in range(rows)])
    inputs = {"input_ids": batch["input_ids"].to(device), "use_cache": False}
    labels = aligned_labels(batch["labels"].to(device), False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def teach() -> Any:
        with torch.no_grad(), autocast():
            return hidden_states(teacher, inputs)

    targets = Targets(labels, teach(), teacher.get_output_embeddings().weight)

    def learn() -> Any:
        with autocast():
            return forward_with_loss(model, model, inputs, targets, ce=0.0).loss / labels.numel()

    def both() -> None:
        learn().backward()

    both()
    runs: dict[str, Callable[[], Any]] = {
        "batch": lambda: collate([(i, blocks[i]) for i in range(rows)])["input_ids"].to(device),
        "teacher forward": teach,
        "student forward and loss": learn,
        "student forward, loss and backward": both,
        "optimizer": optimizer.step,
    }
    return {name: asdict(Spread.of(taken)) for name, taken in alternate(runs, 5, device).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=recovery.RESULTS)
    options = parser.parse_args()
    device = choose_device(options.device)
    set_seed(0)
    stock = GPT2Config(
        vocab_size=options.vocabulary, n_layer=options.layers, n_embd=options.width, n_head=12,
        n_positions=options.context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    shape = SQAGPT2Config(**stock.to_dict() | {"n_head": 8, "num_key_value_heads": 4, "head_dim": options.width // 12})
    blocks = torch.randint(options.vocabulary, (options.steps * options.rows, options.context))
    settings = Recipe(
        tokens=options.steps * options.rows * options.context, sequence_length=options.context,
        batch_size=options.rows, warmup=0.0, evaluations=1, compile=options.compile,
    )  # fmt: skip
    teacher = GPT2LMHeadModel(stock)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(settings, Path(scratch), device, measured=False)
        arguments = replace(arguments, save_strategy="no")

        def trained(name: str, rows: Rows) -> None:
            common = {
                "args": arguments, "train_dataset": rows, "data_collator": CausalCollator(),
                "callbacks": [clock := Clock(device)],
            }  # fmt: skip
            if name == "original, stock Trainer":
                Trainer(model=GPT2LMHeadModel(stock), **common).train()  # type: ignore[arg-type]
            else:
                kl = name.endswith("KL")
                UptrainingTrainer(
                    model=SQAGPT2ForCausalLM(shape), teacher=teacher if kl else None, ce=0.0 if kl else 1.0,
                    tokens_per_step=settings.tokens_per_step, **common,
                ).train()  # fmt: skip
            seconds.setdefault(name, []).extend(clock.seconds[SKIPPED:])

        for _ in range(options.rounds):
            for name in ("original, stock Trainer", "converted, CE", "converted, KL"):
                trained(name, Rows(blocks, len(blocks)))
    bf16 = arguments.bf16
    model = SQAGPT2ForCausalLM(shape).to(device)

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    example = {"input_ids": blocks[:1]}
    student, whole = training_flops(model, example), training_flops(teacher, example)
    flops = {"original, stock Trainer": whole, "converted, CE": student, "converted, KL": student + whole // 3}
    peak = peak_flops(device) if bf16 else None
    found: dict[str, Any] = recovery.describe(device.type, settings)
    found |= {"shape": {k: getattr(options, k) for k in ("layers", "width", "context", "vocabulary", "rows")}}
    found |= {"bfloat16": bf16, "compiled": options.compile, "peak_flops": peak, "trainings": {}}
    base = Spread.of(seconds["original, stock Trainer"]).median
    for name, taken in seconds.items():
        step = Spread.of(taken)
        row: dict[str, Any] = {
            "seconds_per_step": asdict(step), "steps": len(taken), "times_stock": step.median / base,
            "tokens_per_second": settings.tokens_per_step / step.median,
            "flops_per_second": flops[name] * options.rows / step.median,
        }  # fmt: skip
        if peak:
            row["mfu"] = row["flops_per_second"] / peak
        found["trainings"][name] = row
        print(name, row, flush=True)
    found["parts_of_a_KL_step"] = parts_of_a_step(teacher.to(device), model, blocks, options.rows, device, autocast)
    print(found["parts_of_a_KL_step"])
    (options.output / f"throughput-{device.type}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
