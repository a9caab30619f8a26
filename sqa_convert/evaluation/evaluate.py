"""Models measured side by side on the same held-out text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..caller_settings import undisturbed
from ..checkpoints.small_files import REPORT, is_ours, read_json
from ..devices import choose_device, device_name
from ..errors import CheckpointError, RecipeError
from ..flags_as_arguments import names_arguments
from ..parse_amounts import amount
from ..text.formats import TEXT_COLUMN
from ..text.python_data import repeatable
from ..text.suitability import Fit, misfits
from .held_out_batches import HeldOut
from .held_out_text import DEFAULT_TOKENS, prepare
from .hidden_states import compare_hidden_states, held_out_rows, puts_out_hidden_states
from .load import Converted, Measured, leave_out, load_model, located, unmoved
from .measure import Predictions, measured_by_document, predict
from .standard_errors import DocumentSums, gain
from .worst_passages import spelled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@names_arguments
def compare(
    models: Mapping[str, Any],
    held_out: HeldOut,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    also: Callable[[Any], dict[str, float]] | None = None,
    optional: Collection[str] = (),
    untrained: Collection[str] = (),
    own: float | None = None,
    gains: Mapping[str, str] = {},
    spelled_by: Mapping[str, Path] = {},
) -> dict[str, Any]:
    """Measures models one after the other on the same text, and compares the others with the first.

    Args:
        models: folders, models, or functions that return a model when its turn comes, to be measured in the first's
            dtype.
        also: what else to measure of each, for its row.
        optional: those whose row is left out where they fail.
        untrained: those that cannot rightly predict better than the first: converted from it, and not trained.
        own: the first one's loss on what it writes itself, nats a token; None finds out.
        gains: of which models to say, as "gain" of their row, how much better they are than which.
        spelled_by: of which models to tell "worst_passages", and the folder whose tokenizer spells them.

    Returns:
        {"data", "tokens", "device", "warnings" (what makes it doubtful that the text says anything, as
        `sqa_convert.text.suitability.misfits` has it), "documents", and per model its `Quality` as a dict}.

    Raises:
        RecipeError: a model does not fit into the device's memory, or cannot be compared with the first.
    """
    device = held_out.device
    result: dict[str, Any] = {"data": held_out.name, "tokens": held_out.tokens, "device": device_name(device)}
    result["warnings"] = []
    source: Predictions | None = None
    fit: Fit | None = None
    first: dict[str, Any] = {}
    sums: dict[str, DocumentSums] = {}
    for name, folder in models.items():
        done, total = 0, len(held_out.batches)

        def step(stage: str = f"evaluate {name}", total: int = total) -> None:
            nonlocal done
            done += 1
            progress(stage, done, total)

        model: Any = None  # one at a time
        try:
            if isinstance(folder, str | Path):
                model = load_model(folder, trust_remote_code=trust_remote_code)
            else:
                model = folder if isinstance(folder, torch.nn.Module) else folder()
                if model is not folder and first:
                    model.to(first["dtype"])
            outline = (model.config.is_encoder_decoder, model.config.vocab_size)
            first.setdefault("dtype", model.dtype)
            if outline != first.setdefault("outline", outline):
                other = _called(next(iter(models.values())))
                raise RecipeError(f"{_called(folder)} cannot be held against {other}: other kind or vocabulary")
            predictions = predict(model, held_out, step)
            against = sums.get(next(iter(models)))
            quality, sums[name] = measured_by_document(predictions, source, against)
            result[name] = asdict(quality) | ({} if also is None else also(model))
            if sums[name].kl_by_position is not None:
                result[name]["kl_by_position"] = sums[name].kl_by_position
            if name in spelled_by:
                result[name]["worst_passages"] = spelled(sums[name].worst or [], spelled_by[name], trust_remote_code)
            if name in gains:
                result[name]["gain"] = gain(sums[gains[name]], sums[name])
            if fit is None:
                fit = held_out.fit(model, result[name]["loss"], own, "model" if name == "model" else "source")
        except Exception as error:
            leave_out(name, error, optional, device)
            continue
        source = source or predictions
        result["documents"] = int((sums[name].counts > 0).sum())
    if fit is not None:
        losses = {name: result[name]["loss"] for name in models if name in result and name in untrained}
        result["warnings"] = [*held_out.doubts, *misfits(fit, "--data", losses)]
    return result


def _called(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else f"a {type(model).__name__}"


def untrained(folder: Path, against: str) -> set[str]:
    """{"model"} where a folder is a conversion of `against` that was not trained since."""
    try:
        report = read_json(folder / REPORT, "")
    except CheckpointError:
        return set()
    source = report.get("source") if is_ours(report) and "uptraining" not in report else None
    return {"model"} if isinstance(source, dict) and source.get("name") == against else set()


@undisturbed
def evaluate(
    model: str | Path | PreTrainedModel | Converted,
    against: str | Path | PreTrainedModel | Converted | None = None,
    *,
    data: Any = None,
    text_column: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    seed: int = 0,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Loss and perplexity of a model on held-out text; with `against`, also KL and agreement with that model.

    Args:
        model: a model folder, "sample:gpt2" or a hub id; a model in memory, which is left where and as it is; or what
            `convert` returned.
        against: likewise, usually the source; of the same kind and vocabulary.
        data: as `sqa_convert.text.documents.documents` takes it; its held-out part is used. By default the built-in
            corpus; if the model was not made for that, what the first of the two writes itself, as with "self".
        text_column: of a table, the one that holds the text; by default "text".
        tokens: of text.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of the span corruption of T5.
        tokenizer: of the models, or its name; by default the one beside the first that is in a folder. Data that are
            tokens already need none.

    Returns:
        "data" (what the text is), "tokens" (predicted), "documents" (that they are of), "device", "warnings" (a list of
        {"rule", "value", "bound", "text"}: why the text may say nothing of the model), and for "model" and "against" a
        dict each: "loss" in nats a token, "perplexity", "kl" to `against` in nats a token, and "top1", the share of
        predictions whose most likely token is that of `against`; the last two None with nothing to compare with.
        "loss_error" and "kl_error" are standard errors over documents, the first one of the loss above that of
        `against`; None of one document.

    Of models without a language model head, such as text encoders, the dicts hold instead "error", the squared error of
    the last hidden state to that of `against` as a share of its variance, "layer_errors", the same after each layer,
    and "cosine", of the means over a text, the mean over texts.

    Raises:
        CheckpointError: a model or its tokenizer cannot be loaded.
        DataError: there is too little text, or the tokenizer does not fit the model.
        RecipeError: the models cannot be compared, or one does not fit into the device's memory.
        QualityError: the loss is not finite.
    """
    models = {} if against is None else {"against": located(against)}
    models["model"] = located(model)
    if tokenizer is None and not isinstance(models["model"], Path) and isinstance(models.get("against"), Path):
        tokenizer = models["against"]
    with contextlib.ExitStack() as stack:
        for measured in models.values():
            if not isinstance(measured, Path):
                stack.enter_context(unmoved(measured))
        if puts_out_hidden_states(models["model"]):
            reader, column = Measured(models["model"], tokenizer), text_column or TEXT_COLUMN
            count, chosen = amount(tokens, "--tokens"), choose_device(device)
            return compare_hidden_states(models, held_out_rows(reader, repeatable(data), column, count, chosen))
        held_out = prepare(
            models["model"],
            data,
            text_column=text_column or TEXT_COLUMN,
            tokens=tokens,
            device=device,
            seed=seed,
            tokenizer=tokenizer,
            writer=next(iter(models.values())),
        )
        of = models["model"]
        return compare(models, held_out, untrained=untrained(of, str(against)) if isinstance(of, Path) else ())
