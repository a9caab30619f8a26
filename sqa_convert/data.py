"""Text in, token blocks out: the built-in corpus, files and hub data sets, packing, T5 span corruption."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import DataError, one_line

Split = Literal["train", "heldout"]

BUILT_IN = "stdlib"
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}  # every other ending is read as plain text
HELD_OUT_EVERY = 20  # one document in 20 is held out; of fewer than 20 documents, the last tenth of each
NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0  # T5's span corruption (Raffel et al., arXiv 1910.10683, section 3.3.4)


def documents(data: str | None, split: Split, *, tests: bool = False, flag: str = "--data") -> Iterator[str]:
    """The documents of one split of `data`; the two splits of the same data never share a document.

    Args:
        data: None or "stdlib" for the built-in corpus (the running interpreter's standard library, split by a hash of
            each file's name); a file, folder or glob of text, JSON lines or Parquet (column "text"); or
            "ID[:CONFIG]" of a data set on the hub, streamed.
        split: "train" or "heldout".
        tests: of the built-in corpus, also the library's own tests (not every interpreter ships them).
        flag: that `data` came from, for messages.

    Raises:
        DataError: nothing is found under `data`.
    """
    if data in (None, BUILT_IN):
        return _stdlib(split, tests)
    paths = _files(str(data))
    return _from_files(paths, split, flag) if paths else _from_hub(str(data), split, flag)


def check_data(data: str | None, flag: str = "--data") -> None:
    """Raises DataError when `documents` would find nothing, before any work is done for it."""
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        if next(documents(data, split, flag=flag), None) is None:
            raise DataError(f"{flag} {data}: no text in its {split} part")


def _stdlib(split: Split, tests: bool) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = False
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(name.parts):
            continue
        if not tests and {"test", "tests", "idle_test"} & set(name.parts[:-1]):
            continue
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % HELD_OUT_EVERY == 0
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip() and held_out == (split == "heldout"):
            found = True
            yield text
    if not found:
        raise DataError(f"this Python ships no standard library source under {root}: give text with --data")


def _files(data: str) -> list[str]:
    path = Path(data)
    if path.is_file():
        return [data]
    if path.is_dir():
        return sorted(str(p) for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if any(c in data for c in "*?["):
        root = Path(path.anchor or ".")
        return sorted(str(p) for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file())
    return []


def _from_files(paths: list[str], split: Split, flag: str) -> Iterator[str]:
    from datasets import load_dataset

    suffixes = {Path(p).suffix for p in paths}
    loaders = {LOADERS.get(s, "text") for s in suffixes}
    if len(loaders) > 1:
        raise DataError(f"{flag} names files of several kinds ({', '.join(sorted(suffixes))}); give one kind")
    loader = loaders.pop()
    options = {"sample_by": "document"} if loader == "text" else {}
    try:
        rows: Any = load_dataset(loader, data_files=paths, split="train", streaming=True, **options)
        total = sum(1 for _ in islice(_texts(rows, f"{flag} {paths[0]}"), HELD_OUT_EVERY))
        yield from _split(_texts(rows, f"{flag} {paths[0]}"), split, few=total < HELD_OUT_EVERY)
    except DataError:
        raise
    except Exception as error:  # pyarrow, JSON and decoding errors share no base class
        raise DataError(f"{flag} {paths[0]} cannot be read: {one_line(error, 200)}") from error


def _from_hub(data: str, split: Split, flag: str) -> Iterator[str]:
    from datasets import get_dataset_split_names, load_dataset

    name, _, config = data.partition(":")
    try:
        splits = get_dataset_split_names(name, config or None)
        held_out = next((s for s in ("validation", "test") if s in splits), None)
        source = held_out if split == "heldout" and held_out else "train"
        rows: Any = load_dataset(name, config or None, split=source, streaming=True)
        texts = _texts(rows, f"{flag} {data}")
        yield from texts if held_out else _split(texts, split, few=False)
    except DataError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means: not readable
        raise DataError(
            f"{flag} {data} is no file, folder or glob here, and not readable as a data set on the hub: "
            f"{one_line(error, 200)}"
        ) from error


def _texts(rows: Iterable[dict], name: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise DataError(f'{name} has no column "text" (columns: {", ".join(row)})')
        if row["text"].strip():
            yield row["text"]


def _split(texts: Iterable[str], split: Split, *, few: bool) -> Iterator[str]:
    for i, text in enumerate(texts):
        if few:
            cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
            yield text[cut:] if split == "heldout" else text[:cut]
        elif (i % HELD_OUT_EVERY == 0) == (split == "heldout"):
            yield text


def token_blocks(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    max_tokens: int | None = None,
    name: str = "the data",
    flag: str = "--data",
) -> Tensor:
    """Documents, each closed by the end-of-text token, packed into (n, length) int64 blocks; a rest is dropped.

    Raises:
        DataError: the documents do not fill one block.
    """
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
    count = (len(tokens) if max_tokens is None else min(len(tokens), max_tokens)) // length
    if count == 0:
        raise DataError(f"{name} holds {len(tokens)} tokens, fewer than one block of {length}: give more with {flag}")
    return torch.tensor(tokens[: count * length]).view(count, length)


@dataclass(frozen=True)
class SpanCorruption:
    """T5's objective: spans of tokens replaced by sentinels, the target being the spans (arXiv 1910.10683, 3.1.4).

    All rows of one call have equal length, so nothing is ever padded.
    """

    sentinels: tuple[int, ...]
    eos: int
    noise_density: float = NOISE_DENSITY

    @classmethod
    def of(cls, tokenizer: Any) -> SpanCorruption:
        """Raises DataError when the tokenizer has no `<extra_id_0>` … sentinels."""
        known = tokenizer.get_vocab()
        names = ("<extra_id_{}>", "▁<extra_id_{}>")  # T5; mT5's sentencepiece model
        for pattern in names:
            sentinels = tuple(known[pattern.format(i)] for i in range(100) if pattern.format(i) in known)
            if sentinels:
                return cls(sentinels, tokenizer.eos_token_id)
        raise DataError("the tokenizer has no <extra_id_0> … sentinel tokens, which span corruption needs")

    def __call__(self, tokens: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Corrupts (B, T) tokens; returns encoder inputs (B, T - noise + spans + 1), labels (B, noise + spans + 1)."""
        batch, length = tokens.shape
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = min(max(round(noise / MEAN_SPAN), 1), length - noise, len(self.sentinels))
        kept_lengths = _random_partition(batch, length - noise, spans, generator)  # (B, spans), kept before each span
        span_lengths = _random_partition(batch, noise, spans, generator)
        starts = (kept_lengths + span_lengths).cumsum(1) - span_lengths  # (B, spans), where each span begins
        position = torch.arange(length).expand(batch, -1)
        is_start = torch.zeros(batch, length, dtype=torch.long).scatter_(1, starts, 1)
        span_of = is_start.cumsum(1) - 1  # (B, T), the last span begun
        in_span = (span_of >= 0) & (position < (starts + span_lengths).gather(1, span_of.clamp(min=0)))

        sentinel = torch.tensor(self.sentinels)[:spans]
        eos = torch.full((batch, 1), self.eos)
        corrupted = torch.where(is_start.bool(), sentinel[span_of.clamp(min=0)], tokens)
        inputs = corrupted[~in_span | is_start.bool()].view(batch, -1)
        # In the target each span's tokens follow its sentinel: span s shifts its tokens right by s + 1.
        labels = torch.empty(batch, noise + spans, dtype=tokens.dtype)
        before = span_lengths.cumsum(1) - span_lengths + torch.arange(spans)
        labels.scatter_(1, before, sentinel.expand(batch, -1))
        is_token = torch.ones_like(labels, dtype=torch.bool).scatter_(1, before, False)
        labels[is_token] = tokens[in_span]
        return torch.cat([inputs, eos], 1), torch.cat([labels, eos], 1)


def _random_partition(batch: int, total: int, parts: int, generator: torch.Generator | None) -> Tensor:
    """(batch, parts) positive integers, each row summing to `total`, uniform over all such rows."""
    cuts = torch.rand(batch, total - 1, generator=generator).argsort(1)[:, : parts - 1].sort(1).values + 1
    edge = torch.zeros(batch, 1, dtype=torch.long)
    return torch.cat([edge, cuts, edge + total], 1).diff(dim=1)


def collate_causal(rows: list[Tensor]) -> dict[str, Tensor]:
    """Blocks to a batch for a causal model; labels are the inputs, shifted by the model's own loss."""
    batch = torch.stack(rows)
    return {"input_ids": batch, "labels": batch}


def _collate_span_corruption(rows: list[Tensor], corrupt: SpanCorruption) -> dict[str, Tensor]:
    inputs, labels = corrupt(torch.stack(rows))
    return {"input_ids": inputs, "labels": labels}


def collator(tokenizer: Any, is_encoder_decoder: bool) -> Any:
    """What makes a training batch of token blocks: next tokens, or span corruption for an encoder-decoder."""
    if not is_encoder_decoder:
        return collate_causal
    return partial(_collate_span_corruption, corrupt=SpanCorruption.of(tokenizer))
