"""Whether a text is of the kind a model was made for.

On a text that a model cannot read or predict every conversion of it looks perfect, and heads are fitted to nothing. The
rules that notice are here alone; whatever reads text to calibrate, measure or train asks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UnreadableTextError

if TYPE_CHECKING:
    from .splits import Document

UNKNOWN = 0.1
"""share of a text's characters that the tokenizer may not know without a warning"""

UNREADABLE = 0.9
"""share of them from which a text is refused"""

COUNTED = 0.25
"""nats that the loss on a text may be above the entropy of its tokens one by one"""

STRANGE = 1.0
"""nats that the loss on a text may be above that on what the model writes itself, if they are not half the way from
there to guessing"""

BEATEN = 0.02
"""nats that a converted model's loss may be below its source's"""

ELSEWHERE = 3.0
"""times the KL of a conversion on the kind of text it was fitted to, that it may have on another"""

LEAST_KL = 0.01
"""nats a token; of less there is nothing to warn"""

SPREAD, PAIRED = 3.0, 0.5
"""nats that the loss of a token is away from the mean, and the difference of two models' losses from theirs, about"""

_LOOKED_AT = 20_000  # characters of a text

Item = TypeVar("Item", "Document", "tuple[Document, Document]")

Warning_ = dict[str, Any]
"""{"rule", "value", "bound", "text"}: which rule, what it saw, what it allows, and one line for a person"""


@dataclass(frozen=True)
class Fit:
    """What there is to see of a model on a text."""

    loss: float | None
    """the model's, nats a token; None where it has none"""
    vocabulary: int
    own_loss: float | None = None
    """on what it writes itself, nats a token"""
    counted: float | None = None
    """entropy of the text's tokens one by one, nats: the loss of one who knows nothing but how often each occurs"""
    unknown: float = 0.0
    """share of the text's characters that its tokenizer does not know"""
    who: str = "source"
    """what the model is called"""
    predictions: int | None = None
    """that the loss is the mean of; None: so many that it is exact"""

    @property
    def noise(self) -> float:
        """Two standard errors of a mean over the predictions, of what is spread by 1."""
        return 2 / math.sqrt(self.predictions) if self.predictions else 0.0


def looked_at(texts: Iterator[Item], tokenizer: Any, name: str, flag: str) -> tuple[Iterator[Item], float]:
    """Documents, or tuples of texts, and the share of their first characters that the tokenizer does not know.

    Args:
        name: of the text, for messages.
        flag: that names another.

    Raises:
        UnreadableTextError: it knows next to none of them.
    """
    first, characters = [], 0
    for item in texts:
        first.append(item)
        characters += sum(map(len, _parts(item)))
        if characters >= _LOOKED_AT:
            break
    looked = [part[:_LOOKED_AT] for item in first for part in _parts(item) if isinstance(part, str)]
    unknown = unknown_share(looked, tokenizer)
    if unknown > UNKNOWN and _wants_spaces(looked, tokenizer, unknown):
        raise UnreadableTextError(
            f"{name}: {unknown:.0%} of its characters are unknown to the model's tokenizer, which reads them with a "
            "space between: M K T for MKT; put the spaces in, as sed 's/./& /g; s/ $//' FILE does, and give that"
        )
    if unknown >= UNREADABLE:
        raise UnreadableTextError(
            f"{name}: {unknown:.0%} of its characters are unknown to the model's tokenizer; "
            f"give text of the kind the model was made for with {flag}"
        )
    return chain(first, texts), unknown


def _wants_spaces(texts: list[str], tokenizer: Any, unknown: float) -> bool:
    """Whether texts without spaces, such as protein sequences, are known to a tokenizer with one between characters."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines or any(" " in line.strip() for line in lines):
        return False
    return unknown_share([" ".join(line) for line in lines], tokenizer) < unknown / 2


def _parts(item: Document | tuple[Document, Document]) -> tuple[Document, ...]:
    return item if isinstance(item, tuple) else (item,)


def unknown_share(texts: list[str], tokenizer: Any) -> float:
    """Share of the characters, white space apart, that become the unknown token or are dropped.

    A tokenizer that does not tell which characters became a token is held to the share of unknown tokens.
    """
    unknown = total = 0
    for text in texts:
        try:
            encoded = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast), verbose=False
            )
        except Exception:  # a text it does not take is told of where it is read
            return 0.0
        ids = encoded["input_ids"]
        if "offset_mapping" not in encoded:
            unknown += ids.count(tokenizer.unk_token_id)
            total += len(ids)
            continue
        known = bytearray(len(text))
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
            if token != tokenizer.unk_token_id:
                known[start:end] = b"\1" * (end - start)
        total += sum(not character.isspace() for character in text)
        unknown += sum(not seen and not character.isspace() for seen, character in zip(known, text, strict=True))
    return unknown / total if total else 0.0


def misfits(fit: Fit, flag: str, converted: Mapping[str, float] = {}) -> list[Warning_]:
    """What makes it doubtful that a text says anything about a model; nothing where it fits.

    Args:
        flag: that names another text.
        converted: losses of models made from this one, which cannot rightly predict any text better.
    """
    found: list[Warning_] = []

    def warn(rule: str, value: float | None, bound: float | None, text: str) -> None:
        numbers = {key: n if n is None else round(n, 6) for key, n in (("value", value), ("bound", bound))}
        found.append({"rule": rule, **numbers, "text": f"{text}; give text of the model's own kind with {flag}"})

    if fit.unknown > UNKNOWN:
        what = f"{fit.unknown:.0%} of the text's characters are unknown to the tokenizer"
        warn("unknown", fit.unknown, UNKNOWN, what)
    if fit.loss is not None:
        _judge(fit.loss, fit, converted, warn)
    return found


def built_in_does_not_fit(why: str) -> list[Warning_]:
    """That a model is measured on its own text for want of another."""
    if not why:
        return []
    text = f"{why}: measured on what the source writes itself; give text of the model's own kind with --data"
    return [{"rule": "built_in_text", "value": None, "bound": None, "text": text}]


def fitted_elsewhere(kl: float, fitted: float) -> list[Warning_]:
    """What makes it likely that heads were fitted to other text than they are measured on; nothing where they fit.

    Args:
        kl: to the source on the text of measurement, nats a token.
        fitted: on what of the calibration text was held out.
    """
    bound = max(ELSEWHERE * fitted, LEAST_KL)
    if kl <= bound:
        return []
    text = (
        f"KL {kl:.3f} on this text, {fitted:.3f} on text of the kind the heads were fitted to: "
        "they were fitted to other text than this; give it with --calibration"
    )
    return [{"rule": "fitted_elsewhere", "value": round(kl, 6), "bound": round(bound, 6), "text": text}]


def _judge(loss: float, fit: Fit, converted: Mapping[str, float], warn: Callable[..., None]) -> None:
    guessing, own = math.log(fit.vocabulary), fit.own_loss
    if loss >= guessing:
        what = f"loss {loss:.2f}, guessing among {fit.vocabulary:,} tokens {guessing:.2f}"
        warn("guessing", loss, guessing, f"the {fit.who} predicts this text no better than by guessing: {what}")
    elif fit.counted is not None and loss > fit.counted + COUNTED:
        what = f"worse than by how often each token occurs in it: loss {loss:.2f} against {fit.counted:.2f}"
        warn("counting", loss, fit.counted + COUNTED, f"the {fit.who} predicts this text {what}")
    if own is not None and own < guessing:
        bound = own + min(STRANGE, (guessing - own) / 2) + SPREAD * fit.noise
        if loss > bound:
            what = f"loss {loss:.2f} against {own:.2f}"
            warn(
                "own_text",
                loss,
                bound,
                f"the {fit.who} predicts this text far worse than what it writes itself: {what}",
            )
    name = min(converted, key=converted.__getitem__, default="")
    bound = loss - BEATEN - PAIRED * fit.noise
    if name and converted[name] < bound:
        what = f"loss {converted[name]:.2f} against {loss:.2f}"
        warn("source_beaten", converted[name], bound, f"{name} looks better than its own source: {what}")
