"""Train the two checkpoints inside the package (`sample:gpt2`, `sample:t5`) on Python source found on this machine.

    python benchmarks/train_samples.py gpt2 --steps 8000 --batch 8 --lr 2e-3
    python benchmarks/train_samples.py t5 --lr 1e-3 --start build/t5-first

The T5 goes on from a first one, trained for an hour by span corruption alone: commit 114ac64 has it as `sample:t5`.
A run that was cut off goes on from build/checkpoints when it is started again.

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
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import IterableDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from sqa_convert.text.blocks import token_blocks
from sqa_convert.text.documents import documents
from sqa_convert.text.spans import MEAN_SPAN, SpanCorruption

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


@torch.no_grad()
def begin_looking(model: T5ForConditionalGeneration) -> None:
    """Half of T5's heads begin with a pattern, so that a sentinel's span is soon found (arXiv 2305.09828).

    In self-attention they look at a neighbour, across at what equals the query. All of it is trained.
    """
    for stack, offsets in ((model.encoder, (-1, 1, -2, 2, -3, 3)), (model.decoder, (-1, -1, -2, -2, -3, -3))):
        attention = stack.block[0].layer[0].SelfAttention
        buckets = attention._relative_position_bucket(torch.tensor(offsets), bidirectional=not stack.is_decoder)
        attention.relative_attention_bias.weight[buckets, torch.arange(len(offsets))] += 4
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        half = attention.inner_dim // 2
        attention.q.weight[:half] = attention.k.weight[:half] / 2


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


def crossed(collate):
    """Each row's labels with another row's input: how much of the prediction comes from the encoder."""

    def of(rows):
        batch = collate(rows)
        return batch | {"input_ids": batch["input_ids"].roll(1, 0)}

    return of


def reading(model, blocks: torch.Tensor, collate, corrupt: SpanCorruption) -> dict[str, float | dict[str, float]]:
    """What a T5 loses with another row's input, also where the input keeps the spans, as in a part of its training."""

    def with_spans(rows):
        batch = collate(rows)
        return batch | {"input_ids": marked(batch["input_ids"], batch["labels"], corrupt.sentinels)}

    return {
        "held_out_loss_with_another_rows_input": round(held_out_loss(model, blocks, crossed(collate)), 4),
        "spans_in_the_input": {
            "held_out_loss": round(held_out_loss(model, blocks[:96], with_spans), 4),
            "with_another_rows_input": round(held_out_loss(model, blocks[:96], crossed(with_spans)), 4),
        },
    }


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of T5's training, and what it is asked there."""

    steps: int
    lengths: tuple[int, ...]
    """of a text, tokens; one of them a step"""
    tokens: int
    """a step"""
    noise: tuple[float, ...]
    """share of the tokens asked for; one of them a step"""
    span: float = MEAN_SPAN
    """mean length of what is asked for, tokens"""
    marked: float = 0.0
    """share of the steps whose input keeps the spans"""


# A small T5 asked for span corruption alone learns a language model of its targets and never looks at its input. One
# that first copies by sentinels, from short inputs, has found them when the spans are taken away.
PHASES = (
    Phase(400, (8, 12, 16, 24), 512, (0.3,), span=2.0, marked=1.0),
    Phase(700, (24, 32, 48, 64, 96), 1024, (0.15, 0.3), span=2.0, marked=0.3),
    Phase(2400, (96, 128, 192, 288), 1536, (0.15, 0.3), marked=0.2),
    Phase(300, (288,), 2304, (0.15,), marked=0.1),
)


class Curriculum(IterableDataset):
    """Batches of the phases, one after the other."""

    def __init__(self, tokens: torch.Tensor, corrupt: SpanCorruption, seed: int):
        self.tokens, self.corrupt, self.seed = tokens.flatten(), corrupt, seed

    def __iter__(self):
        chance = random.Random(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        for phase in PHASES:
            for _ in range(phase.steps):
                yield self.batch(phase, chance, generator)

    def batch(self, phase: Phase, chance: random.Random, generator: torch.Generator) -> dict[str, torch.Tensor]:
        length = chance.choice(phase.lengths)
        rows = phase.tokens // length
        starts = torch.randint(len(self.tokens) - length, (rows, 1), generator=generator)
        corrupt = dataclasses.replace(self.corrupt, noise_density=chance.choice(phase.noise), mean_span=phase.span)
        inputs, labels = corrupt(self.tokens[starts + torch.arange(length)], generator)
        if chance.random() < phase.marked:
            inputs = marked(inputs, labels, corrupt.sentinels)
        return {"input_ids": inputs, "labels": labels}


def marked(inputs: torch.Tensor, labels: torch.Tensor, sentinels: tuple[int, ...]) -> torch.Tensor:
    """Inputs that keep the spans, each between two of its sentinel."""
    rows = []
    for row, target in zip(inputs.tolist(), labels.tolist(), strict=True):
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in sentinels:
                span = spans[token] = []
            else:
                span.append(token)
        rows.append([t for token in row for t in ((token, *spans[token], token) if token in spans else (token,))])
    return torch.tensor(rows)


class Watch(TrainerCallback):
    """Held-out losses in the Trainer's log, one line an evaluation; of T5 also with another row's input."""

    def __init__(self, blocks, collate, is_t5: bool, every: int):
        self.blocks, self.collate, self.is_t5, self.every = blocks, collate, is_t5, every

    def on_train_begin(self, args, state, control, **kwargs):
        before = curve(state)[-1]["seconds"] if curve(state) else 0
        self.start = time.time() - before

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            entry = {
                "step": state.global_step,
                "held_out_loss": round(held_out_loss(model, self.blocks, self.collate), 4),
            }
            if self.is_t5:
                entry["with_another_rows_input"] = round(held_out_loss(model, self.blocks, crossed(self.collate)), 4)
            entry["seconds"] = round(time.time() - self.start)
            state.log_history.append(entry)
            print(entry, flush=True)


def curve(state: TrainerState) -> list[dict[str, float]]:
    return [entry for entry in state.log_history if "held_out_loss" in entry]


def t5_optimizer(model: T5ForConditionalGeneration, lr: float) -> torch.optim.Optimizer:
    """AdamW; embeddings and position biases are larger than matrices, and move faster."""
    rates = {"shared.weight": 8 * lr, "relative_attention_bias.weight": 10 * lr}
    groups = [
        {"params": [weight], "lr": next((rate for end, rate in rates.items() if name.endswith(end)), lr)}
        for name, weight in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def arguments_of(options: argparse.Namespace) -> TrainingArguments:
    """A phase of T5's makes its own batches."""
    if options.name == "t5":
        steps, batch = sum(phase.steps for phase in PHASES), 1
        schedule = {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 2 * steps // 5},
            "warmup_steps": 80,
        }
    else:
        steps, batch = options.steps, options.batch
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": max(1, steps // 20)}
    return TrainingArguments(
        output_dir=str(options.checkpoints / options.name),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=options.lr,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        save_steps=max(1, steps // 40),
        save_total_limit=10,
        logging_steps=max(1, steps // 100),
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
        bf16=torch.cuda.is_available(),
        **schedule,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["gpt2", "t5"])
    parser.add_argument("--steps", type=int, default=6000, help="GPT-2's; T5's phases have their own")
    parser.add_argument("--batch", type=int, default=16, help="GPT-2's blocks a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--start", type=Path, help="a folder of weights to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", action="store_true", help="also train on the packages under sys.prefix")
    parser.add_argument("--output", type=Path, default=ROOT / "sqa_convert" / "samples")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=ROOT / "build" / "checkpoints",
        help="from these a run that was cut off goes on",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    transformers.set_seed(options.seed)

    texts = list(documents(None, "train", tests=True)) + (prefix_documents() if options.prefix else [])
    tokenizer = train_tokenizer(options.name, texts)
    train = token_blocks(texts, tokenizer, LENGTH[options.name])
    held_out = token_blocks(documents(None, "heldout"), tokenizer, LENGTH[options.name])
    model = make_model(options.name)
    if options.start:
        model = type(model).from_pretrained(options.start)
    if isinstance(model, T5ForConditionalGeneration):
        begin_looking(model)
    collate = collator(tokenizer, options.name)
    targets = [collate(list(b))["labels"] for b in (train, held_out)]
    baselines = ngram_baselines(*targets)
    print(
        f"{model.num_parameters():,} parameters, {train.numel():,} training tokens, baselines {baselines}", flush=True
    )

    is_t5 = options.name == "t5"
    arguments = arguments_of(options)
    watch = Watch(held_out[:64], collate, is_t5, every=max(1, arguments.max_steps // 14))
    trainer = Trainer(
        model=model,
        args=arguments,
        optimizers=(t5_optimizer(model, options.lr) if is_t5 else None, None),
        train_dataset=Curriculum(train, SpanCorruption.of(tokenizer), options.seed) if is_t5 else list(train),
        data_collator=(lambda batches: batches[0]) if is_t5 else collate,
        callbacks=[watch],
    )
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))

    loss = held_out_loss(model, held_out, collate)
    extra = reading(model, held_out, collate, SpanCorruption.of(tokenizer)) if is_t5 else {}
    gpt2_tokens = options.steps * options.batch * LENGTH["gpt2"]
    seen = sum(phase.steps * phase.tokens for phase in PHASES) if is_t5 else gpt2_tokens
    folder = options.output / options.name
    model.config.use_cache = True  # the Trainer turns it off
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "command": " ".join(["python", *sys.argv]),
        "parameters": model.num_parameters(),
        "training_tokens": train.numel(),
        "epochs": round(seen / train.numel(), 2),
        "held_out_tokens": held_out.numel(),
        "held_out_loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        **extra,
        "baselines": {k: round(v, 4) for k, v in baselines.items()},
        "curve": curve(trainer.state),
        "seconds": curve(trainer.state)[-1]["seconds"],
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
