"""Three small strange checkpoints, trained here, with their documents: what conversions lose on those.

    python benchmarks/strangers.py train
    python benchmarks/strangers.py measure --label NAME --seeds 0,1,2

- signatures: a GPT-2 that reads a signature behind control tokens and writes its documentation. Its tokenizer adds none
  of them, its documents end with another token than they begin with, and fill a part of its context.
- order: a T5 that puts the words of a sentence back in order, from inputs of at most 128 tokens.
- questions: a GPT-2 that answers questions about lists, sums and signatures.

All text is the running interpreter's standard library, or drawn; held-out documents come from other files or other
draws. `train` writes OUT/NAME and, beside it, NAME.train.jsonl and NAME.heldout.jsonl. `measure` converts each with
`mean`, with the default, with the default and the words that the GPT-2s' documents begin with as prompts, and with the
default calibrated on the true training documents, and measures the KL divergence to the source on the true held-out
documents: from position 0, with their control tokens, padding left out; and before the model was polished. It writes
benchmarks/results/strangers.json and prints a table.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import sqa_convert
from sqa_convert.calibration.calibrate import Calibrator
from sqa_convert.conversion.build_model import build_model
from sqa_convert.text.documents import documents

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "strangers.json"
VOCABULARY = 1024
END, PADDING = "<|end|>", "<|pad|>"
IGNORED = -100
MEASURED = 512  # documents

Row = dict[str, str]
"""A document: its `text`, of pairs also `prompt` and `answer`"""


# The documents


def definitions(split: str) -> Iterator[tuple[str, str, ast.AST]]:
    """Kind, owner and node of every function, method and class in the standard library's files of one split."""
    for number, text in enumerate(documents(None, split, tests=True)):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for owner in ast.walk(tree):
            for node in ast.iter_child_nodes(owner):
                if isinstance(node, ast.ClassDef):
                    yield "class", f"file {number}", node
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield ("method", owner.name, node) if isinstance(owner, ast.ClassDef) else ("function", "", node)


def sentence(node: Any) -> str:
    """The first sentence of a docstring, or nothing."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0][:160]


def signatures(split: str) -> Iterator[Row]:
    """A name and its arguments, then what is said of them."""
    for kind, owner, node in definitions(split):
        says = sentence(node)
        if kind == "class":
            names = [ast.unparse(base) for base in node.bases]
            takes, head = "Extends", f"{node.name}({', '.join(names)})"
        else:
            arguments = node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            takes, head = "Takes", f"{node.name}({ast.unparse(arguments)})"
        line = f"{takes} {', '.join(names) or 'nothing'}. {says}".strip()
        place = f"<|of|>{owner}" if kind == "method" else ""
        text = f"<|{kind}|>{head}{place}<|doc|>{line}{END}"
        if 90 <= len(text) <= 360:
            yield {"text": text}


def order(split: str) -> Iterator[Row]:
    """The words of a sentence of a docstring or a comment: shuffled, then in order."""
    chance = random.Random(split)
    for text in documents(None, split, tests=True):
        comments = re.findall(r"(?<=# )\w[\w ,.'()-]{20,}", text)
        docstrings = re.findall(r'(?<=""")\w[\w ,.\'()-]{20,}', text)
        for line in comments + docstrings:
            words = line.split()
            if 4 <= len(words) <= 16:
                shuffled = chance.sample(words, len(words))
                yield {"text": " ".join(shuffled), "prompt": " ".join(shuffled), "answer": " ".join(words)}


def questions(split: str) -> Iterator[Row]:
    """Questions that are answered by looking back, and sums."""
    chance = random.Random(split)
    for _, _, node in definitions(split):
        if not isinstance(node, ast.FunctionDef) or not 2 <= len(node.args.args) <= 8:
            continue
        names = [a.arg for a in node.args.args]
        head = f"{node.name}({', '.join(names)})"
        at = chance.randrange(len(names) - 1)
        a, b = chance.randrange(100), chance.randrange(100)
        asked = chance.sample(
            [
                (f"What follows {names[at]} in {head}?", names[at + 1]),
                (f"What precedes {names[at + 1]} in {head}?", names[at]),
                (f"What is the last argument of {head}?", names[-1]),
                (f"How many arguments has {head}?", str(len(names))),
                (f"Which function is {head}?", node.name),
                (f"What are the arguments of {head}?", ", ".join(names)),
                (f"What is {a} plus {b}?", str(a + b)),
                (f"Which is larger, {a} or {b}?", str(max(a, b))),
            ],
            3,
        )
        for question, says in asked:
            prompt, answer = f"Question: {question}\nAnswer:", f" {says}{END}"
            yield {"text": prompt + answer, "prompt": prompt, "answer": answer}


# The models


@dataclass(frozen=True)
class Stranger:
    rows: Callable[[str], Iterable[Row]]
    config: GPT2Config | T5Config
    control: tuple[str, ...]
    steps: int
    longest: int
    """tokens of a document"""
    heads: tuple[tuple[int, int], ...]
    """query and key/value heads to convert to"""


def gpt2(width: int, heads: int, positions: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_positions=positions, n_embd=width, n_layer=4, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


STRANGERS = {
    "signatures": Stranger(
        signatures,
        gpt2(192, 6, 256),
        ("<|function|>", "<|method|>", "<|class|>", "<|of|>", "<|doc|>"),
        steps=2500,
        longest=130,
        heads=((4, 2), (3, 3)),
    ),
    "order": Stranger(
        order,
        T5Config(
            vocab_size=VOCABULARY, d_model=128, d_kv=32, num_heads=6, d_ff=256, num_layers=3, num_decoder_layers=3,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, n_positions=128,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        ),
        (),
        steps=900,
        longest=128,
        heads=((4, 2), (3, 3)),
    ),
    "questions": Stranger(questions, gpt2(192, 6, 512), (), steps=2500, longest=128, heads=((4, 2), (3, 3))),
}  # fmt: skip


def train_tokenizer(stranger: Stranger, rows: list[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; it adds nothing to a text but, for T5, the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [re.sub(r"<\|\w+\|>", "\n", row["text"]) for row in rows],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PADDING, END, *stranger.control],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if isinstance(stranger.config, T5Config):
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=END,
        additional_special_tokens=list(stranger.control),
        model_max_length=getattr(stranger.config, "n_positions", 512),
    )


def encoded(tokenizer: Any, rows: list[Row], is_t5: bool, longest: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each document that is not too long; those of a GPT-2 are the same tokens."""
    if not is_t5:
        tokens = tokenizer([row["text"] for row in rows])["input_ids"]
        return [(ids, ids) for ids in tokens if len(ids) <= longest]
    inputs, answers = (tokenizer([row[part] for row in rows])["input_ids"] for part in ("prompt", "answer"))
    return [(a, b) for a, b in zip(inputs, answers, strict=True) if max(len(a), len(b)) <= longest]


def batch_of(documents: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Documents from position 0 on, padded on the right."""

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

    inputs, labels = ([d[i] for d in documents] for i in (0, 1))
    mask = padded([[1] * len(row) for row in inputs], 0)
    return {"input_ids": padded(inputs, 0), "attention_mask": mask, "labels": padded(labels, IGNORED)}


def batches(documents: list[tuple[list[int], list[int]]], tokens: int, chance: random.Random) -> Iterator[Any]:
    """Batches of about `tokens` each, of documents of like length, without end."""
    while True:
        ordered = sorted(documents, key=lambda d: (len(d[0]) + len(d[1])) * chance.uniform(0.9, 1.1))
        groups, group = [], []
        for document in ordered:
            group.append(document)
            if len(group) * len(document[0]) >= tokens:
                groups.append(group)
                group = []
        chance.shuffle(groups)
        yield from map(batch_of, groups)


@torch.no_grad()
def held_out_loss(model: Any, batch_list: list[dict[str, torch.Tensor]], crossed: bool = False) -> float:
    """Nats a token; `crossed` gives an encoder another row's input."""
    total = count = 0.0
    for batch in batch_list:
        if crossed:
            batch = batch | {name: batch[name].roll(1, 0) for name in ("input_ids", "attention_mask")}
        logits, labels = predictions(model, batch)
        total += cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    return total / count


def predictions(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V) of every token that is predicted and no padding, and what it is (n,)."""
    logits, labels = model(**batch).logits, batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    real = labels != IGNORED
    return logits[real], labels[real]


def unigram(train: list[tuple[list[int], list[int]]], held_out: list[tuple[list[int], list[int]]]) -> float:
    """Nats a token of the held-out labels as if each stood alone."""
    counts = torch.bincount(torch.tensor([t for _, labels in train for t in labels]), minlength=VOCABULARY) + 1.0
    share = (counts / counts.sum()).log()
    return -share[torch.tensor([t for _, labels in held_out for t in labels])].mean().item()


def train(name: str, output: Path) -> dict[str, Any]:
    stranger, is_t5 = STRANGERS[name], isinstance(STRANGERS[name].config, T5Config)
    transformers.set_seed(0)
    rows = {split: list({row["text"]: row for row in stranger.rows(split)}.values()) for split in ("train", "heldout")}
    known = {row.get("answer", "") + row["text"] if is_t5 else row["text"] for row in rows["train"]}
    known |= {row["answer"] for row in rows["train"]} if is_t5 else set()
    rows["heldout"] = [row for row in rows["heldout"] if row["answer" if is_t5 else "text"] not in known]
    output.mkdir(parents=True, exist_ok=True)
    for split, of_split in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in of_split)
        (output / f"{name}.{split}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = train_tokenizer(stranger, rows["train"])
    learnt, kept = (encoded(tokenizer, rows[split], is_t5, stranger.longest) for split in ("train", "heldout"))
    model = (T5ForConditionalGeneration if is_t5 else GPT2LMHeadModel)(stranger.config)
    held_out = [batch_of(kept[i : i + 64]) for i in range(0, min(len(kept), MEASURED), 64)]
    steps = stranger.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 30, steps)
    stream = batches(learnt, 1024, random.Random(0))
    print(f"{name}: {len(learnt):,} documents, {sum(len(d[0]) for d in learnt):,} tokens", flush=True)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        model(**next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            told = f"{name} step {step} held-out {held_out_loss(model, held_out):.3f}"
            told += f", another row's input {held_out_loss(model, held_out, crossed=True):.3f}" if is_t5 else ""
            print(f"{told}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval().save_pretrained(output / name)
    tokenizer.save_pretrained(output / name)
    lengths = sorted(len(d[0]) for d in learnt)
    found = {
        "parameters": model.num_parameters(),
        "documents": len(learnt),
        "tokens_of_a_document": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
        "held_out_documents": len(kept),
        "unigram_loss": round(unigram(learnt, kept), 4),
        "held_out_loss": round(held_out_loss(model, held_out), 4),
        "seconds": round(time.perf_counter() - start),
    }
    if is_t5:
        found["held_out_loss_with_another_rows_input"] = round(held_out_loss(model, held_out, crossed=True), 4)
    return found


# What conversions lose


WAYS = ("mean", "default", "prompts", "true documents")


def ways(data: Path, is_t5: bool) -> dict[str, dict[str, Any]]:
    """Options of `sqa_convert.convert`, one column of the table each."""
    columns = {"source_column": "prompt", "target_column": "answer"} if is_t5 else {}
    found = {
        "mean": {"method": "mean", "calibration": None},
        "default": {},
        "prompts": {"calibration": sqa_convert.Calibration(prompts=str(prompts_file(data)))},
        "true documents": {"calibration": sqa_convert.Calibration(text=str(data), **columns)},
    }
    return {way: options for way, options in found.items() if not (is_t5 and way == "prompts")}


def prompts_file(data: Path) -> Path:
    """A file of the words or control tokens that the documents of a file begin with, each once."""
    begin = (re.match(r"<\|\w+\|>|\S+", json.loads(line)["text"]) for line in data.open(encoding="utf-8"))
    place = data.with_suffix(".prompts")
    place.write_text("\n".join(sorted({match[0] for match in begin if match})) + "\n", encoding="utf-8")
    return place


@torch.no_grad()
def kl(source: Any, result: Any, held_out: list[dict[str, torch.Tensor]]) -> float:
    """KL divergence of the result's predictions from the source's, nats a token."""
    total = count = 0.0
    for batch in held_out:
        expected, found = (log_softmax(predictions(model, batch)[0], -1) for model in (source, result))
        total += (expected.exp() * (expected - found)).sum().item()
        count += len(expected)
    return total / count


@contextlib.contextmanager
def before_polish(source: Any, held_out: list[dict[str, torch.Tensor]]) -> Iterator[list[float]]:
    """KL of every conversion in the block before it is polished."""
    found, polished = list[float](), Calibrator.polished

    def measured_first(calibrator: Calibrator, plan: Any, choice: Any) -> Any:
        found.append(kl(source, build_model(plan, calibrator.source, choice)[0].float().eval(), held_out))
        return polished(calibrator, plan, choice)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibrator, "polished", measured_first)
        yield found


def measure(name: str, output: Path, seeds: list[int]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """KL of every way at every setting of heads, for each seed, and before polish."""
    stranger, is_t5 = STRANGERS[name], isinstance(STRANGERS[name].config, T5Config)
    tokenizer = AutoTokenizer.from_pretrained(output / name)
    source = (AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM).from_pretrained(output / name).eval()
    lines = (output / f"{name}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    documents = encoded(tokenizer, [json.loads(line) for line in lines], is_t5, stranger.longest)[:MEASURED]
    held_out = [batch_of(documents[i : i + 64]) for i in range(0, len(documents), 64)]
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for q, kv in stranger.heads:
        row = table[f"{q}/{kv}"] = {}
        for way, options in ways(output / f"{name}.train.jsonl", is_t5).items():
            after = []
            with before_polish(source, held_out) as before:
                for seed in seeds[:1] if way == "mean" else seeds:
                    result = sqa_convert.convert(output / name, q, kv, device="cpu", seed=seed, **options)
                    after.append(round(kl(source, result.model, held_out), 4))
                    print(name, f"{q}/{kv}", way, f"seed {seed}", before[-1:], after[-1], flush=True)
            row[way] = {"kl": after}
            if before:
                row[way]["before_polish"] = [round(one, 4) for one in before]
    return table


def markdown(results: dict[str, Any]) -> str:
    """KL in nats a token, means over seeds, a column for each way of each label; in brackets before polish."""
    columns = [(label, way) for label, found in results.items() for way in WAYS if way in str(found)]
    lines = ["| source | heads | " + " | ".join(f"{way}, {label}" for label, way in columns) + " |"]
    lines.append("|---|---|" + "--:|" * len(columns))
    for name, stranger in STRANGERS.items():
        for q, kv in stranger.heads:
            found = [results[label].get(name, {}).get(f"{q}/{kv}", {}).get(way, "") for label, way in columns]
            lines.append(f"| {name} | {q}/{kv} | " + " | ".join(map(cell, found)) + " |")
    return "\n".join(lines)


def cell(found: Any) -> str:
    """A cell of the table."""
    if not isinstance(found, dict):
        return f"{found:.3f}" if found else ""
    before = f" ({fmean(found['before_polish']):.3f})" if "before_polish" in found else ""
    return f"{fmean(found['kl']):.3f}{before}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("train", "measure"):
        part = commands.add_parser(command)
        part.add_argument("names", nargs="*", default=list(STRANGERS), help="by default all")
        part.add_argument("--output", type=Path, default=ROOT / "build" / "strangers")
    commands.choices["measure"].add_argument(
        "--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0], help="such as 0,1,2"
    )
    commands.choices["measure"].add_argument("--label", default="now", help="of these columns, beside those there are")
    options = parser.parse_args()
    if options.command == "train":
        for name in options.names:
            found = train(name, options.output)
            (options.output / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
            print(name, found, flush=True)
        return
    for name in options.names:
        table = measure(name, options.output, options.seeds)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another process may have written
        results.setdefault("kl", {}).setdefault(options.label, {})[name] = table
        results.setdefault("strangers", {})[name] = json.loads((options.output / f"{name}.json").read_text())
        results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        results.setdefault("versions", {}).update(torch=torch.__version__, transformers=transformers.__version__)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(json.loads(RESULTS.read_text())["kl"]))


if __name__ == "__main__":
    main()
