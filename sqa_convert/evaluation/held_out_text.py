"""The text that models are measured on: what was named, the built-in corpus, or what a model writes itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..devices import choose_device
from ..errors import DataError, RecipeError, UnreadableTextError, one_line
from ..families.special_tokens import SpecialTokens
from ..flags_as_arguments import names_arguments
from ..parse_amounts import amount, check_seed
from ..random_generators import generator_for
from ..text.blocks import token_blocks
from ..text.collate import IGNORED, PairCollator
from ..text.documents import TOKEN_PAIRS, Columns, check_data, documents, is_own, pair_columns, pairs, peeked
from ..text.formats import TEXT_COLUMN
from ..text.plain_generation import own_tokens
from ..text.python_data import called, repeatable
from ..text.self_generated import own_pairs, own_rows
from ..text.spans import denoising
from ..text.splits import Skipped, Split
from ..text.suitability import built_in_does_not_fit, looked_at
from ..text.tokenize_documents import encoded_pair
from ..text.tokenized_rows import causal_batches, document_rows, pair_batches, up_to
from ..text.tokenizers import check_vocabulary
from .held_out_batches import HeldOut
from .load import Measured
from .measure import made_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TOKENS = 16_384
"""tokens of held-out text"""

LEAST_TOKENS = 64
"""of which anything is said"""

LONGEST = 1024
"""tokens in one sequence, at most"""

HELD_OUT_PAIRS = 256

LONGEST_PAIR = 512
"""tokens of what is read or answered, at most; of rows of tokens `LONGEST`"""

_BATCH_TOKENS = 4096

_BATCH = 32  # pairs


@names_arguments
def prepare(
    model: str | Path | PreTrainedModel,
    data: Any = None,
    *,
    text_column: str = TEXT_COLUMN,
    columns: Columns | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    seed: int = 0,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    without: str = "copy the source's there",
    writer: str | Path | PreTrainedModel | None = None,
) -> HeldOut:
    """Held-out text as inputs of a model, and of every model with its tokenizer.

    Where none is named it is the built-in corpus; or, if the model was not made for that, what it writes itself.

    Text is drawn across documents, a part of each as long as the model reads at most, while there are others. A
    decoder-only model reads each from position 0; what is tokens already needs no tokenizer. An encoder-decoder reads
    blocks of text, with spans of it hidden.

    Args:
        model: in a folder, or in memory.
        data: as `sqa_convert.text.documents.documents` takes it; its held-out part is used.
        text_column: of a table, the one that holds the text.
        columns: of a table of pairs for an encoder-decoder; 256 of them are measured. Of rows of tokens with labels
            these are the pairs.
        tokens: of text.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of the span corruption.
        tokenizer: of the model, or its name; by default the one in its folder.
        without: what to do where there is no tokenizer, for messages.
        writer: the model whose own text is taken, by default `model`.

    Raises:
        CheckpointError: config or tokenizer do not load.
        DataError: there is too little text, or the tokenizer does not fit the model.
        RecipeError: there is no such device, seed or number of tokens.
    """
    chosen, tokens = choose_device(device), amount(tokens, "--tokens")
    if tokens < 2:
        raise RecipeError(f"--tokens {tokens}: of one nothing is predicted; give 2 or more")
    check_seed(seed)
    data = repeatable(data)
    measured = Measured(model, tokenizer, trust_remote_code, without)
    config = measured.config
    if config.is_encoder_decoder:
        columns = pair_columns(data, columns, text_column)
    if columns is not None:
        longest = LONGEST if columns == TOKEN_PAIRS else LONGEST_PAIR
        return held_out_pairs(measured, data, columns, chosen, longest)
    if not is_own(data) and data is not None:
        return _of_documents(measured, data, text_column, tokens, chosen, seed)
    writes = Measured(writer, measured.tokenizer, trust_remote_code) if writer is not None else measured
    why = ""
    if data is None:
        check_data(None, column=text_column)
        built_in, why = built_in_text(writes, tokens, chosen, seed)
        if built_in is not None:
            return built_in
    return own_text(writes.model, writes.tokenizer, tokens, chosen, seed, why)


def built_in_text(measured: Measured, tokens: int, device: torch.device, seed: int) -> tuple[HeldOut | None, str]:
    """The held-out part of the built-in corpus; or None, and why a model was not made for it.

    Raises CheckpointError, DataError: the weights do not load, or the tokenizer does not fit them.
    """
    try:
        built_in = _of_documents(measured, None, TEXT_COLUMN, tokens, device, seed)
    except UnreadableTextError as error:
        return None, one_line(error)
    if made_for(measured.model, built_in):
        return built_in, ""
    return None, "the model was not made for the built-in text, Python source"


def _of_documents(
    measured: Measured, data: Any, text_column: str, tokens: int, device: torch.device, seed: int
) -> HeldOut:
    config, name = measured.config, f"{called(data)}, held-out part"
    longest = getattr(config, "n_positions", None) or 512
    length = min(longest, LONGEST, tokens)
    skipped = Skipped()
    texts = documents(data, "heldout", column=text_column, shuffled=True, skipped=skipped)
    texts, are_tokens = peeked(texts)
    if are_tokens is None:
        raise DataError(f"{name} holds no text: give more with --data")
    tokenizer, unknown = None, 0.0
    if not are_tokens or config.is_encoder_decoder:
        tokenizer = measured.tokenizer
        texts, unknown = looked_at(texts, tokenizer, name, "--data")
    if not config.is_encoder_decoder:
        rows = up_to((row for row in document_rows(texts, tokenizer, length, (1,)) if len(row) > 1), tokens, len)
        if rows:
            check_vocabulary(torch.cat(rows), config.vocab_size)
        there = sum(map(len, rows))
        if there < min(tokens, LEAST_TOKENS):
            raise DataError(f"{name} holds {there} tokens, in rows of two or more: give {LEAST_TOKENS} with --data")
        batches = causal_batches(rows, SpecialTokens.of(config).padding, _BATCH_TOKENS)
        return HeldOut(batches, f"{name}{skipped}", _predicted(batches), device, unknown)
    blocks = token_blocks(texts, tokenizer, length, tokens, name, drawn=True)
    name = f"{name}{skipped}"
    corrupt = denoising(tokenizer, config.vocab_size)
    check_vocabulary(blocks, config.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    pairs = [corrupt(part, generator) for part in blocks.split(max(1, _BATCH_TOKENS // length))]
    batches = [{"input_ids": inputs, "labels": labels} for inputs, labels in pairs]
    count = sum(labels.numel() for _, labels in pairs)
    return HeldOut(batches, f"{name}, {corrupt.name}", count, device, unknown)


def own_text(model: Any, tokenizer: Any, tokens: int, device: torch.device, seed: int, why: str = "") -> HeldOut:
    """What a model writes itself, to be measured on where there is no text that it was made for; and `why` there is."""
    model.to(device)
    generator = generator_for("held out", seed)
    padding = own_tokens(model).padding
    if model.config.is_encoder_decoder:
        rows = own_pairs(model, tokenizer, tokens, LONGEST_PAIR, device, generator)
        batches, name = pair_batches(rows, padding, _BATCH_TOKENS), "answered by the source itself"
    else:
        length = min(model.config.n_positions, LONGEST, tokens)
        texts = own_rows(model, tokens, length, device, generator, tokenizer)
        batches, name = causal_batches(texts, padding, _BATCH_TOKENS), "sampled from the source"
    return HeldOut(batches, name, _predicted(batches), device, doubts=built_in_does_not_fit(why))


def _predicted(batches: Sequence[Mapping[str, Tensor]]) -> int:
    """How many tokens of batches are predicted."""
    return sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)


def held_out_pairs(measured: Measured, data: Any, columns: Columns, device: torch.device, length: int) -> HeldOut:
    """Pairs of the held-out part of `data`, cut to `length` tokens. Raises DataError."""
    content, unknown = encoded_pairs(measured, data, columns, "heldout", HELD_OUT_PAIRS, length)
    name = f"{called(data)}, held-out part"
    if not content:
        raise DataError(f"--data {called(data)}: no pairs in its heldout part")
    collate, rows = PairCollator(SpecialTokens.of(measured.config).padding), list(enumerate(content))
    batches = [collate(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)]
    count = sum(len(target) for _, target in content)
    return HeldOut(batches, f"{name}, {len(rows)} pairs", count, device, unknown)


def encoded_pairs(
    measured: Measured,
    data: Any,
    columns: Columns,
    split: Split,
    most: int,
    length: int,
    skipped: Skipped | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Source and target tokens, `most` of them, and the share of the text that the tokenizer does not know.

    Raises DataError where they do not fit the model.
    """
    config = measured.config
    if not config.is_encoder_decoder:
        raise DataError("--source-column and --target-column are for encoder-decoder models; this one is decoder-only")
    texts, unknown, tokenizer = pairs(data, columns, split, skipped=skipped), 0.0, None
    if columns != TOKEN_PAIRS:
        tokenizer = measured.tokenizer
        texts, unknown = looked_at(texts, tokenizer, called(data), "--data")
    rows = [encoded_pair(tokenizer, *pair, length) for pair in islice(texts, most)]
    if rows:
        check_vocabulary(torch.cat([ids for pair in rows for ids in pair]), config.vocab_size)
    return rows, unknown
