"""Train the two checkpoints inside the package (`sample:gpt2`, `sample:t5`) on Python source found on this machine.

    python benchmarks/train_samples.py gpt2 --steps 8000 --batch 8 --lr 2e-3
    python benchmarks/train_samples.py t5 --steps 4200 --batch 8 --lr 3e-3

Text: the running interpreter's standard library, its tests included; files are split into train and held-out by a hash
of their names. With --prefix every other .py file under sys.prefix is added to the training part (worth it on a GPU).
No text is shipped, only weights and tokenizer. Writes OUT/{gpt2,t5} and benchmarks/results/sample-{gpt2,t5}.json:
held-out loss beside a unigram and a bigram baseline, the loss curve, machine, versions and time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sqa_convert.text.blocks import token_blocks
from sqa_convert.text.documents import documents
from sqa_convert.text.spans import SpanCorruption

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 2048
LENGTH = {"gpt2": 256, "t5": 288}  # tokens in a block; span corruption makes 288 into 260 + 59


def prefix_documents() -> list[str]:
    paths = sorted(p for p in Path(sys.prefix).rglob("*.py") if {"site-packages", "dist-packages"} & set(p.parts))
    return [text for p in paths if (text := p.read_text(encoding="utf-8", errors="replace")).strip()]


def train_tokenizer(name: str, texts: list[str]) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>"] if name == "gpt2" else ["<pad>", "</s>", "<unk>"]
    sentinels = [] if name == "gpt2" else [f"<extra_id_{i}>" for i in range(100)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(sentinels),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if name == "gpt2":
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            model_max_length=LENGTH[name],
        )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        model_max_length=512,
    )


def make_model(name: str) -> GPT2LMHeadModel | T5ForConditionalGeneration:
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=256, n_embd=192, n_layer=4, n_head=12,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=128, d_kv=16, num_heads=12, d_ff=256, num_layers=4, num_decoder_layers=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, n_positions=288,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


def ngram_baselines(train: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Held-out nats/token of a unigram and an interpolated bigram model counted on the training targets (n, T)."""
    size = VOCABULARY
    counts = torch.bincount(train.flatten(), minlength=size).double() + 1
    unigram = counts / counts.sum()
    pairs = torch.bincount((train[:, :-1] * size + train[:, 1:]).flatten(), minlength=size * size).view(size, size)
    strength = 10.0  # Dirichlet prior towards the unigram, in counts
    bigram = (pairs + strength * unigram) / (pairs.sum(1, keepdim=True) + strength)
    previous, following = held_out[:, :-1].flatten(), held_out[:, 1:].flatten()
    return {
        "unigram": -unigram[following].log().mean().item(),
        "bigram": -bigram[previous, following].log().mean().item(),
    }


@torch.no_grad()
def held_out_loss(model, blocks: torch.Tensor, collate) -> float:
    torch.manual_seed(0)
    model.eval()
    total = [model(**{k: v.to(model.device) for k, v in collate(list(b)).items()}).loss for b in blocks.split(32)]
    model.train()
    return torch.stack(total).mean().item()


def collator(tokenizer, name: str):
    """What makes a batch of blocks: next tokens, or span corruption."""
    if name == "gpt2":
        return lambda rows: {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}
    corrupt = SpanCorruption.of(tokenizer)
    return lambda rows: dict(zip(("input_ids", "labels"), corrupt(torch.stack(rows)), strict=True))


def cross(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each row's labels with another row's input: how much of the prediction comes from the encoder."""
    return batch | {"input_ids": batch["input_ids"].roll(1, 0)}


class Denoise:
    """Span corruption: for most of the run half of the tokens are targets, more to learn from in a step; then T5's."""

    def __init__(self, tokenizer, steps: int, batch: int):
        self.plain = SpanCorruption.of(tokenizer)
        self.heavy = dataclasses.replace(self.plain, noise_density=0.5)
        self.rows_left = int(0.6 * steps) * batch

    def __call__(self, rows):
        corrupt = self.heavy if self.rows_left > 0 else self.plain
        self.rows_left -= len(rows)
        inputs, labels = corrupt(torch.stack(rows))
        return {"input_ids": inputs, "labels": labels}


class Watch(TrainerCallback):
    """Held-out loss in the log, one line an evaluation."""

    def __init__(self, blocks, collate, every: int):
        self.blocks, self.collate, self.every, self.curve, self.start = blocks, collate, every, [], time.time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            loss = held_out_loss(model, self.blocks, self.collate)
            self.curve.append({"step": state.global_step, "held_out_loss": round(loss, 4)})
            print(f"step {state.global_step} held-out {loss:.4f} {time.time() - self.start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["gpt2", "t5"])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16, help="blocks a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", action="store_true", help="also train on the packages under sys.prefix")
    parser.add_argument("--output", type=Path, default=ROOT / "sqa_convert" / "samples")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    transformers.set_seed(options.seed)

    texts = list(documents(None, "train", tests=True)) + (prefix_documents() if options.prefix else [])
    tokenizer = train_tokenizer(options.name, texts)
    train = token_blocks(texts, tokenizer, LENGTH[options.name])
    held_out = token_blocks(documents(None, "heldout"), tokenizer, LENGTH[options.name])
    model = make_model(options.name)
    collate = collator(tokenizer, options.name)
    targets = [collate(list(b))["labels"] for b in (train, held_out)]
    baselines = ngram_baselines(*targets)
    print(
        f"{model.num_parameters():,} parameters, {train.numel():,} training tokens, baselines {baselines}", flush=True
    )

    watch = Watch(held_out[:96], collate, every=max(1, options.steps // 20))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output / ".trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 20),
            weight_decay=0.05,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=list(train),
        data_collator=collate if options.name == "gpt2" else Denoise(tokenizer, options.steps, options.batch),
        callbacks=[watch],
    )
    start = time.time()
    trainer.train()
    seconds = time.time() - start

    loss = held_out_loss(model, held_out, collate)
    extra = {}
    if options.name == "t5":
        crossed = held_out_loss(model, held_out, lambda rows: cross(collate(rows)))
        extra["held_out_loss_with_another_rows_input"] = round(crossed, 4)
    folder = options.output / options.name
    model.config.use_cache = True  # the Trainer turns it off
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "command": " ".join(["python", *sys.argv]),
        "parameters": model.num_parameters(),
        "training_tokens": train.numel(),
        "epochs": round(options.steps * options.batch / len(train), 2),
        "held_out_tokens": held_out.numel(),
        "held_out_loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        **extra,
        "baselines": {k: round(v, 4) for k, v in baselines.items()},
        "curve": watch.curve,
        "seconds": round(seconds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"sample-{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "curve"}, indent=2))


if __name__ == "__main__":
    main()
