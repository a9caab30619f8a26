"""Text that a model writes itself, at temperature 1."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer

from ..errors import DataError
from ..progress import Progress, silent, step_done
from .documents import BUILT_IN, Split, documents
from .plain_generation import generate, own_tokens
from .quick_twin import twin_of
from .suitability import looked_at
from .tokenize_documents import control_tokens
from .tokenized_rows import document_rows, up_to

SAMPLED_SEQUENCES = 128
"""at a time, at most"""

FLAT = 0.5
"""share of texts that begin with any token of the vocabulary, where nobody said what texts begin with"""

CONTROL = 0.5
"""share of the others that begin with a control token, where the tokenizer has some"""

CUTS = (1, 1, 2, 4)
"""into how many rows a text that does not end is cut, by lot"""

SHORT = (2, 4, 4, 8, 8, 8, 16, 16, 16, 16)
"""of the longest length, what a text has that an encoder-decoder answers: a page, a paragraph, a sentence, a line"""

CACHE = 2e9
"""bytes of keys and values held while sampling"""

_ROOM = 64  # tokens that a cache has room for at first

_TOLD_EVERY = 16  # tokens of a text

_CROWDED = 0.75  # share of texts that go on below which the others leave the cache


def own_rows(
    model: Any,
    tokens: int,
    length: int,
    device: torch.device,
    generator: torch.Generator,
    tokenizer: Any = None,
    beginnings: Sequence[Sequence[int]] = (),
    progress: Progress = silent,
    cache: float = CACHE,
) -> list[Tensor]:
    """A causal model's own texts as rows (T,) from position 0, T up to `length`, of so many tokens together.

    A text that ends is one row, its end token the last. One that goes on was written by a model of long documents, or
    one trained on windows of them. So half of those are gone on with from their middle, and are windows that begin
    anywhere; and some are cut into shorter ones.

    Args:
        tokenizer: of the model, which tells of its control tokens; None where there is none.
        beginnings: tokens that texts begin with, drawn evenly. Where there are none, a text begins by `FLAT` with any
            token of the vocabulary, else with the model's first one or, as often, one of the control tokens.
        progress: called as the work goes on.
        cache: bytes of keys and values held at a time.

    Source: data-free distillation, LLM-QAT (arXiv 2305.17888), for the first tokens.
    """
    chance = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
    control = [] if tokenizer is None else control_tokens(tokenizer, model.config.vocab_size)
    at_once = _side_by_side(model.config, length, cache)
    model = twin_of(model, device)
    rows: list[Tensor] = []
    written = 0
    while written < tokens:
        progress("sample text", written, tokens)
        missing = -(-(tokens - written) // length)
        rounds = -(-missing // at_once)  # of about as many texts each: few at a time take as long as many
        begin = _begin(model, -(-missing // rounds), beginnings, control, chance, generator)
        expected = min(tokens - written, len(begin) * length)

        def step(share: float, done: int = written, expected: int = expected) -> None:
            progress("sample text", done + int(share * expected), tokens)

        texts = continued(model, begin[:, : length - 1], length, device, generator, step)
        ends = own_tokens(model).end
        done = [text for text in texts if int(text[-1]) in ends]
        going = [text for text in texts if int(text[-1]) not in ends]
        anywhere = chance.sample(range(len(going)), len(going) // 2)
        if anywhere:
            later = torch.stack([going[i][length // 2 :] for i in anywhere])
            for i, text in zip(anywhere, continued(model, later, length, device, generator), strict=True):
                going[i] = text
        for text in going:
            parts = chance.choice(CUTS)
            done += [part for part in text.tensor_split(_cut(len(text), parts, chance)) if len(part) > 1]
        rows += done
        written += sum(map(len, done))
    progress("sample text", tokens, tokens)
    return rows


def _side_by_side(config: Any, length: int, cache: float) -> int:
    """How many texts a causal model writes at a time."""
    each = 2 * config.num_hidden_layers * config.hidden_size * 4 * length  # bytes of keys and values
    return max(1, min(SAMPLED_SEQUENCES, int(cache // each)))


def _cut(length: int, parts: int, chance: random.Random) -> list[int]:
    """Where a text is cut into parts of about one length."""
    jitter = length // (4 * parts)
    return [length * i // parts + chance.randint(-jitter, jitter) for i in range(1, parts)]


def _begin(
    model: Any,
    count: int,
    beginnings: Sequence[Sequence[int]],
    control: Sequence[int],
    chance: random.Random,
    generator: torch.Generator,
) -> Tensor:
    """What some texts begin with, (count, n)."""
    if beginnings:  # of one length, to be written side by side
        length = len(chance.choice(beginnings))
        alike = [begin for begin in beginnings if len(begin) == length]
        return torch.tensor([list(chance.choice(alike)) for _ in range(count)])
    first = first_tokens(model, count, generator)
    if control:
        named = torch.tensor(control)[torch.randint(len(control), (count, 1), generator=generator)]
        first = torch.where(torch.rand(count, 1, generator=generator) < CONTROL, named, first)
    any_ = torch.randint(model.config.vocab_size, (count, 1), generator=generator)
    return torch.where(torch.rand(count, 1, generator=generator) < FLAT, any_, first)


def first_tokens(model: Any, count: int, generator: torch.Generator) -> Tensor:
    """What a causal model's texts begin with, (count, 1): any tokens where it names none that it knows."""
    begin = own_tokens(model).begin
    if begin is None:
        return torch.randint(model.config.vocab_size, (count, 1), generator=generator)
    return torch.full((count, 1), begin)


@torch.no_grad()
def continued(
    model: Any,
    begin: Tensor,
    length: int,
    device: torch.device,
    generator: torch.Generator,
    step: Callable[[float], None] = step_done,
) -> list[Tensor]:
    """How a causal model goes on from beginnings (B, n), each up to its end token or to `length`: on the CPU.

    `step` is called now and then with the share that is done.
    """
    ends = torch.tensor(own_tokens(model).end, dtype=torch.long)
    texts = torch.zeros(len(begin), length, dtype=torch.long)
    texts[:, : begin.shape[1]] = begin
    lengths = torch.full((len(begin),), length)
    slots, going = torch.arange(len(begin)), torch.ones(len(begin), dtype=torch.bool)  # texts of the cache's rows
    cache, given = Cache(layer_class_to_replicate=RoomyLayer), begin
    takes = inspect.signature(model.forward).parameters
    last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    for position in range(begin.shape[1], length):
        if position % _TOLD_EVERY == 0:
            step(position / length)
        logits = model(input_ids=given.to(device), past_key_values=cache, use_cache=True, **last).logits[:, -1]
        drawn = draw(logits, generator)
        texts[slots[going], position] = drawn[going]
        ended = going & torch.isin(drawn, ends)
        lengths[slots[ended]] = position + 1
        going &= ~ended
        if not bool(going.any()):
            break
        if going.float().mean() < _CROWDED:
            for layer in cache.layers:
                layer.batch_select_indices(going.nonzero()[:, 0].to(device))
            slots, drawn, going = slots[going], drawn[going], going[going]
        given = drawn[:, None]
    return [text[:end].clone() for text, end in zip(texts, lengths.tolist(), strict=True)]


class RoomyLayer(DynamicLayer):
    """A cache of one layer with room to grow: the one it is derived from copies all of it at every token."""

    keys: Tensor
    values: Tensor
    used = 0
    """positions"""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, T, d) with those of the new positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (
                new.new_empty(*new.shape[:2], 0, new.shape[-1]) for new in (key_states, value_states)
            )
        start, self.used = self.used, self.used + key_states.shape[-2]
        if self.used > self.keys.shape[-2]:
            room = max(_ROOM, self.used)
            self.keys, self.values = (nn.functional.pad(old, (0, 0, 0, room)) for old in (self.keys, self.values))
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (n,) drawn from logits (n, V), by their distribution function: the same on every device; on the CPU."""
    below = logits.float().softmax(-1).cumsum(-1)
    level = torch.rand(len(logits), 1, generator=generator).to(logits.device) * below[:, -1:]
    return torch.searchsorted(below, level).clamp(max=logits.shape[1] - 1)[:, 0].cpu()


def answers(
    model: Any, inputs: Sequence[Tensor], longest: int, device: torch.device, generator: torch.Generator
) -> list[Tensor]:
    """What an encoder-decoder samples for each of its inputs (T,), up to its end token or `longest` tokens."""
    tokens, model = own_tokens(model), twin_of(model, device)
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
    written: dict[int, Tensor] = {}
    for start in range(0, len(order), SAMPLED_SEQUENCES):
        some = order[start : start + SAMPLED_SEQUENCES]
        ids = nn.utils.rnn.pad_sequence([inputs[i] for i in some], batch_first=True, padding_value=tokens.padding)
        read = nn.utils.rnn.pad_sequence([torch.ones_like(inputs[i]) for i in some], batch_first=True)
        texts = sampled_answers(model, ids, read, longest, device, generator)[:, 1:]  # without the start token
        ends = torch.isin(texts, torch.tensor(tokens.end, dtype=torch.long))
        for i, text, end in zip(some, texts, ends, strict=True):
            written[i] = text[: int(end.int().argmax()) + 1 if bool(end.any()) else len(text)].clone()
    return [written[i] for i in range(len(inputs))]


def own_pairs(
    model: Any,
    tokenizer: Any,
    tokens: int,
    longest: int,
    device: torch.device,
    generator: torch.Generator,
    split: Split = "heldout",
) -> list[tuple[Tensor, Tensor]]:
    """Inputs of about so many tokens together, and what an encoder-decoder answers to each.

    They are pieces of the built-in corpus of up to `longest` tokens; where the tokenizer cannot read it, any tokens.
    """
    inputs: list[Tensor] = []
    with contextlib.suppress(DataError):
        texts, _ = looked_at(documents(None, split, shuffled=True), tokenizer, BUILT_IN, "--data")
        inputs = up_to(document_rows(texts, tokenizer, longest, SHORT), tokens, len)
    if not inputs or max(int(row.max()) for row in inputs) >= model.config.vocab_size:
        inputs = list(torch.randint(model.config.vocab_size, (max(2, tokens // longest), longest), generator=generator))
    return list(zip(inputs, answers(model, inputs, longest, device, generator), strict=True))


def sampled_answers(
    model: Any, inputs: Tensor, read: Tensor, new_tokens: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Samples at temperature 1 for inputs (B, T) and their attention mask; on the CPU."""
    given = {"input_ids": inputs.to(device), "attention_mask": read.to(device)}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return generate(model, given, max_new_tokens=new_tokens, **sampled).cpu()
