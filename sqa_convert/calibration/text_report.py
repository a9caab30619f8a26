"""What a report says of calibration text: how much there was, whether it is enough, and whether it suits the model."""

from __future__ import annotations

import contextlib
from typing import Any

from ..conversion.fitting import Fitting
from ..conversion.plan import Plan
from ..conversion.request import TOKENS_PER_UNKNOWN
from ..errors import QualityError
from ..evaluation.held_out_batches import HeldOut
from ..evaluation.measure import Predictions, measure
from ..text.suitability import misfits
from .text import Text


def text_report(
    text: Text, plan: Plan, settings: Fitting, model: Any, held_out: HeldOut, expected: Predictions | None
) -> dict[str, Any]:
    """Args: model: the source. held_out: sequences of the text. expected: what it predicts there, if it does."""
    report: dict[str, Any] = {
        "text": text.name,
        "tokens": text.tokens,
        "held_out_tokens": text.held_out_tokens,
        "refit": settings.refit,
        "refine_steps": settings.refine_steps,
    }
    report |= _fit(text, model, held_out, expected)
    unknowns = plan.unknowns + 1
    least = min(text.tokens, text.tokens if text.answered is None else text.answered)
    if least < TOKENS_PER_UNKNOWN * unknowns:
        what = (
            f"{least:,} calibration tokens for {unknowns:,} unknowns of a fit, {TOKENS_PER_UNKNOWN} for each are "
            "advised: the result may be worse than --no-calibration; give more with --calibration-tokens"
        )
        few = {"rule": "few_tokens", "value": round(least / unknowns, 2), "bound": TOKENS_PER_UNKNOWN, "text": what}
        report["warnings"].append(few)
    return report


def _fit(text: Text, model: Any, held_out: HeldOut, expected: Predictions | None) -> dict[str, Any]:
    """Whether the model was made for the text, as "warnings"; of its own text "own_loss", nats a token."""
    loss = None
    with contextlib.suppress(QualityError):
        if expected is not None and (text.sampled or text.unknown is not None):
            loss = measure(expected).loss
    if text.sampled:
        return {"warnings": []} | ({} if loss is None else {"own_loss": loss})
    written = text.unknown is not None  # else nobody did
    return {"warnings": misfits(held_out.fit(model, loss), "--calibration") if written else []}
