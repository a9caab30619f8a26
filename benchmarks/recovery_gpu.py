"""Conversion and recovery of a GPT-2-shaped model that was trained for some minutes on all Python source there is.

    python benchmarks/recovery_gpu.py                                   (one GPU, within ten minutes)
    python benchmarks/recovery_gpu.py --layers 2 --width 96 --context 128 --minutes 1 --tokens 40960 --rows 8   (CPU)

The source has GPT-2 small's shape (12 layers of 12 heads of 64, 1,024 positions) and the sample's tokenizer. It is
converted from 12 heads to 8/4 and 6/3, by `mean` and by the default, and uptrained on the same text: `mean` by
cross-entropy as in the GQA paper (arXiv 2305.13245), the default by KL beside its control. Writes
benchmarks/results/recovery-gpu.json with the device's name and the seconds of every stage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import recovery
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from sqa_convert import Recipe, convert
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.devices import choose_device
from sqa_convert.text.blocks import token_blocks
from sqa_convert.text.collate import CausalCollator, Rows
from sqa_convert.text.documents import documents
from sqa_convert.text.tokenizers import load_tokenizer

DATA = f"{sysconfig.get_path('purelib')}/**/*.py"
HEADS = ((8, 4), (6, 3))
RUNS = (("mean", "ce", 1e-3), ("auto", "kl", 2e-4))


class Clock(TrainerCallback):
    """Stops training after some minutes, its rate falling to zero by then."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        spent = (time.perf_counter() - self.start) / (60 * self.minutes)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (state.global_step + 1) / 100) * max(0.0, 1 - spent)
        control.should_training_stop = spent >= 1


def train_source(options: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    set_seed(0)
    tokenizer = load_tokenizer(SAMPLES / "gpt2")
    begin = time.perf_counter()
    blocks = token_blocks(documents(DATA, "train"), tokenizer, options.context, options.source_tokens, DATA)
    read = time.perf_counter() - begin
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=options.layers, n_embd=options.width, n_head=12, n_positions=options.context,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=10**6, per_device_train_batch_size=options.rows,
            learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95,
            bf16=device.type == "cuda", use_cpu=device.type == "cpu", remove_unused_columns=False,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        ),
        train_dataset=Rows(blocks, 10**6 * options.rows),
        data_collator=CausalCollator(),
        callbacks=[Clock(options.minutes)],
    )  # fmt: skip
    steps = trainer.train().global_step
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    return {
        "parameters": model.num_parameters(),
        "distinct_tokens": blocks.numel(),
        "tokens": steps * options.rows * options.context,
        "seconds_reading": round(read, 1),
        "minutes": options.minutes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="training of the source")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32, help="sequences a step")
    parser.add_argument("--source-tokens", type=int, default=40_000_000)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of each uptraining")
    parser.add_argument("--output", type=Path, default=recovery.RESULTS / "recovery-gpu.json")
    options = parser.parse_args()
    device = choose_device("auto")
    recipe = Recipe(
        data=DATA, tokens=options.tokens, sequence_length=options.context, batch_size=options.rows, evaluations=8
    )
    found: dict[str, Any] = recovery.describe(device.type, recipe)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        found["source"] = train_source(options, source, device)
        print(found["source"], flush=True)
        for heads in HEADS:
            for method, loss, rate in RUNS:
                start = Path(scratch, f"{method}-{heads[0]}-{heads[1]}")
                begin = time.perf_counter()
                convert(source, *heads, method=method, output=start, device=device.type)
                seconds = round(time.perf_counter() - begin, 1)
                settings = replace(recipe, loss=loss, learning_rate=rate)
                row = recovery.run(start, settings, control=method == "auto", device=device.type)
                row |= {"heads": heads, "method": method, "trained_by": loss, "seconds_converting": seconds}
                found.setdefault("runs", []).append(row)
                print({k: v for k, v in row.items() if k not in ("curve", "control")}, flush=True)
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
