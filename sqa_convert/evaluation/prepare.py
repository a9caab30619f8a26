"""The text that models are measured on: what was named, the built-in corpus, or what a model writes itself."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..amounts import amount, check_seed
from ..devices import choose_device
from ..errors import DataError, RecipeError, UnreadableTextError, one_line, shown
from ..families.special_tokens import end_of_text
from ..text.blocks import token_blocks
from ..text.collate import IGNORED, CausalCollator, PairCollator
from ..text.documents import BUILT_IN, SELF, Columns, Skipped, Split, check_data, documents, pairs
from ..text.encoding import encoded_pair
from ..text.formats import TEXT_COLUMN
from ..text.plain_generation import own_tokens
from ..text.rows import causal_batches, pair_batches
from ..text.self_generated import own_pairs, own_rows
from ..text.spans import denoising
from ..text.suitability import built_in_does_not_fit, looked_at
from ..text.tokenizers import check_vocabulary, load_tokenizer
from .held_out import HeldOut
from .load import load_config, load_model
from .measure import made_for

DEFAULT_TOKENS = 16_384
"""tokens of held-out text"""

LONGEST = 1024
"""tokens in one sequence, at most"""

HELD_OUT_PAIRS = 256

LONGEST_PAIR = 512
"""tokens of what is read or answered, at most"""

_BATCH_TOKENS = 4096

_BATCH = 32  # pairs


def prepare(
    folder: str | Path,
    data: str | Path | None = None,
    *,
    text_column: str = TEXT_COLUMN,
    columns: Columns | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    without: str = "copy the source's there",
    writer: str | Path | None = None,
) -> HeldOut:
    """Held-out text as inputs of the model in `folder`, and of every model with its tokenizer.

    Where none is named it is the built-in corpus; or, if the model was not made for that, what it writes itself.

    It is drawn across documents, a block of each at most while there are others. A decoder-only model reads it as it
    is trained: no document sees another in its block, and positions start again with each.

    Args:
        data: as `sqa_convert.text.documents.documents` takes it; its held-out part is used.
        text_column: of a table, the one that holds the text.
        columns: of a table of pairs for an encoder-decoder; 256 of them are measured.
        tokens: of text.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of the span corruption.
        without: what to do where there is no tokenizer, for messages.
        writer: the model whose own text is taken, by default the one in `folder`.

    Raises:
        CheckpointError: config or tokenizer do not load.
        DataError: there is too little text, or the tokenizer does not fit the model.
        RecipeError: there is no such device, seed or number of tokens.
    """
    chosen, tokens = choose_device(device), amount(tokens, "--tokens")
    if tokens < 2:
        raise RecipeError(f"--tokens {tokens}: of one nothing is predicted; give 2 or more")
    check_seed(seed)
    config = load_config(folder, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code, without)
    if columns is not None:
        return held_out_pairs(config, tokenizer, str(data or BUILT_IN), columns, chosen)
    if data not in (None, SELF):
        return _of_documents(config, tokenizer, str(data), text_column, tokens, chosen, seed)
    load = lru_cache(1)(partial(load_model, writer or folder, trust_remote_code=trust_remote_code))
    why = ""
    if data is None:
        check_data(None, column=text_column)
        built_in, why = built_in_text(load, config, tokenizer, tokens, chosen, seed)
        if built_in is not None:
            return built_in
    return own_text(load(), tokenizer, tokens, chosen, seed, why)


def built_in_text(
    load: Callable[[], Any], config: Any, tokenizer: Any, tokens: int, device: torch.device, seed: int
) -> tuple[HeldOut | None, str]:
    """The held-out part of the built-in corpus; or None, and why the model that `load` gives was not made for it.

    Raises CheckpointError, DataError: the weights do not load, or the tokenizer does not fit them.
    """
    try:
        built_in = _of_documents(config, tokenizer, None, TEXT_COLUMN, tokens, device, seed)
    except UnreadableTextError as error:
        return None, one_line(error)
    if made_for(load(), built_in):
        return built_in, ""
    return None, "the model was not made for the built-in text, Python source"


def _of_documents(
    config: Any, tokenizer: Any, data: str | None, text_column: str, tokens: int, device: torch.device, seed: int
) -> HeldOut:
    name = f"{shown(data or BUILT_IN)}, held-out part"
    longest = getattr(config, "n_positions", None) or 512
    length = min(longest, LONGEST, tokens)
    skipped = Skipped()
    texts = documents(data, "heldout", column=text_column, shuffled=True, skipped=skipped)
    texts, unknown = looked_at(texts, tokenizer, name, "--data")
    blocks = token_blocks(texts, tokenizer, length, tokens, name, drawn=True)
    name = f"{name}{skipped}"
    corrupt = denoising(tokenizer, config.vocab_size) if config.is_encoder_decoder else None
    check_vocabulary(blocks, config.vocab_size)
    parts = blocks.split(max(1, _BATCH_TOKENS // length))
    if corrupt is None:
        collate = CausalCollator(end_of_text(tokenizer))
        batches = [collate(list(enumerate(part))) for part in parts]
        return HeldOut(batches, name, blocks.numel() - len(blocks), device, unknown)
    generator = torch.Generator().manual_seed(seed)
    pairs = [corrupt(part, generator) for part in parts]
    batches = [{"input_ids": inputs, "labels": labels} for inputs, labels in pairs]
    count = sum(labels.numel() for _, labels in pairs)
    return HeldOut(batches, f"{name}, {corrupt.name}", count, device, unknown)


def own_text(model: Any, tokenizer: Any, tokens: int, device: torch.device, seed: int, why: str = "") -> HeldOut:
    """What a model writes itself, to be measured on where there is no text that it was made for; and `why` there is."""
    model.to(device)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} held out".encode()))
    padding = own_tokens(model).padding
    if model.config.is_encoder_decoder:
        rows = own_pairs(model, tokenizer, tokens, LONGEST_PAIR, device, generator)
        batches, name = pair_batches(rows, padding, _BATCH_TOKENS), "answered by the source itself"
    else:
        length = min(model.config.n_positions, LONGEST, tokens)
        texts = own_rows(model, tokens, length, device, generator, tokenizer)
        batches, name = causal_batches(texts, padding, _BATCH_TOKENS), "sampled from the source"
    count = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    return HeldOut(batches, name, count, device, doubts=built_in_does_not_fit(why))


def held_out_pairs(
    config: Any, tokenizer: Any, data: str, columns: Columns, device: torch.device, length: int = LONGEST_PAIR
) -> HeldOut:
    """Pairs of the held-out part of `data`, cut to `length` tokens. Raises DataError."""
    content, unknown = encoded_pairs(config, tokenizer, data, columns, "heldout", HELD_OUT_PAIRS, length)
    name = f"{shown(data)}, held-out part"
    if not content:
        raise DataError(f"--data {shown(data)}: no pairs in its heldout part")
    collate, rows = PairCollator(tokenizer.pad_token_id), list(enumerate(content))
    batches = [collate(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]
    count = sum(len(target) for _, target in content)
    return HeldOut(batches, f"{name}, {len(rows)} pairs", count, device, unknown)


def encoded_pairs(
    config: Any,
    tokenizer: Any,
    data: str,
    columns: Columns,
    split: Split,
    most: int,
    length: int,
    skipped: Skipped | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Source and target tokens, `most` of them, and the share of the text that the tokenizer does not know.

    Raises DataError where they do not fit the model.
    """
    if not config.is_encoder_decoder:
        raise DataError("--source-column and --target-column are for encoder-decoder models; this one is decoder-only")
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no padding token, which pairs need")
    texts, unknown = looked_at(pairs(data, columns, split, skipped=skipped), tokenizer, shown(data), "--data")
    rows = [encoded_pair(tokenizer, *pair, length) for pair in islice(texts, most)]
    if rows:
        check_vocabulary(torch.cat([ids for pair in rows for ids in pair]), config.vocab_size)
    return rows, unknown
