"""How near the hidden states of models without a language model head, such as text encoders, are to their source's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..devices import device_name
from ..errors import CheckpointError, DataError, QualityError, RecipeError, one_line
from ..families import only_hidden_states
from ..families.special_tokens import SpecialTokens
from ..progress import no_bars_of_others
from ..text.documents import documents, peeked
from ..text.one_text_a_line import column_read, read_as
from ..text.splits import Skipped
from ..text.suitability import looked_at
from ..text.tokenized_rows import document_rows, pair_batches, up_to
from ..text.tokenizers import check_vocabulary
from .held_out_batches import HeldOut
from .load import Measured, leave_out, load_config, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = 4096

_USUAL_LENGTH = 512  # tokens


@dataclass(frozen=True)
class Nearness:
    """How near a model's hidden states are to another's, on the same text."""

    error: float | None = None
    """squared error of the last hidden state, as a share of its variance"""
    cosine: float | None = None
    """of the vectors that are means over a text, the mean over texts: what users of embeddings compare"""
    layer_errors: list[float] | None = None
    """as `error`, of the hidden state after each layer"""


def puts_out_hidden_states(model: Any) -> bool:
    """The same of a folder, or of a model in memory. Raises CheckpointError."""
    config = load_config(model) if isinstance(model, str | Path) else model.config
    name = (config.architectures or [""])[0] if isinstance(model, str | Path) else type(model).__name__
    return only_hidden_states(name)


def load_headless(
    folder: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False, **overrides: Any
) -> PreTrainedModel:
    """A model of a folder that puts out hidden states, in eval mode. Raises CheckpointError."""
    from transformers import AutoModel, AutoModelForTextEncoding

    encoder = (load_config(folder, trust_remote_code).architectures or [""])[0].endswith("EncoderModel")
    try:
        with no_bars_of_others():
            auto = AutoModelForTextEncoding if encoder else AutoModel
            return auto.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code, **overrides).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # config.json can make it fail in any way
        raise CheckpointError(f"{folder} cannot be loaded: {one_line(error)}") from error


def load_any(folder: str | Path, *, trust_remote_code: bool = False, **how: Any) -> PreTrainedModel:
    """The same, or a language model, whatever a folder holds. Raises CheckpointError."""
    load = load_headless if puts_out_hidden_states(folder) else load_model
    return load(folder, trust_remote_code=trust_remote_code, **how)


def held_out_rows(
    measured: Measured, data: Any, text_column: str, tokens: int, device: torch.device, flag: str = "--data"
) -> HeldOut:
    """Texts of the held-out part of `data`, None: of the built-in corpus, each as it is, or tokens.

    Of plain text with a text a line these are its lines.

    Raises DataError: there is too little, or the tokenizer does not fit the model.
    """
    config, skipped, text_column = measured.config, Skipped(), column_read(data, text_column, flag)
    name = f"{read_as(data, text_column)}, held-out part"
    length = getattr(config, "n_positions", None) or _USUAL_LENGTH
    texts, are_tokens = peeked(documents(data, "heldout", column=text_column, shuffled=True, skipped=skipped))
    if are_tokens is None:
        raise DataError(f"{name} holds no text: give more with {flag}")
    tokenizer, unknown = (None, 0.0) if are_tokens else (measured.tokenizer, 0.0)
    if tokenizer is not None:
        texts, unknown = looked_at(texts, tokenizer, name, flag)
    rows = up_to(document_rows(texts, tokenizer, length), tokens, len)
    if not rows:
        raise DataError(f"{name} holds no text of two tokens: give more with {flag}")
    check_vocabulary(torch.cat(rows), config.vocab_size)
    batches = pair_batches([(row,) for row in rows], SpecialTokens.of(config).padding, _BATCH_TOKENS)
    return HeldOut(batches, f"{name}{skipped}, {len(rows):,} texts", sum(map(len, rows)), device, unknown)


@torch.no_grad()
def compare_hidden_states(
    models: Mapping[str, Any],
    held_out: HeldOut,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Holds the hidden states of models against the first's, one model in memory at a time.

    Args:
        models: folders, models, or functions that return a model when its turn comes.
        held_out: of `held_out_rows`.
        optional: those whose row is left out where they fail.

    Returns:
        {"data", "tokens", "device", "warnings" (none), and per model its `Nearness` as a dict, of the first without
        numbers}.

    Raises:
        RecipeError: a model does not fit into the device's memory, has other widths or layers than the first, or puts
            out something else.
        QualityError: hidden states are not finite.
    """
    device, first = held_out.device, None
    result: dict[str, Any] = {"data": held_out.name, "tokens": held_out.tokens, "device": device_name(device)}
    result["warnings"] = []
    for name, given in models.items():
        model: Any = None  # one at a time
        try:
            if isinstance(given, str | Path):
                model = load_headless(given, trust_remote_code=trust_remote_code)
            else:
                model = given if isinstance(given, torch.nn.Module) else given()
            if not only_hidden_states(type(model).__name__):
                raise RecipeError(
                    f"the {name} model is a {type(model).__name__}, which puts out no hidden states alone"
                )
            states = []
            for done, batch in enumerate(held_out.batches, 1):
                states.append(_hidden_states(model.to(device).eval(), batch, device))
                progress(f"evaluate {name}", done, len(held_out.batches))
            result[name] = asdict(Nearness() if first is None else nearness(states, first, held_out, name))
        except Exception as error:
            leave_out(name, error, optional, device)
            continue
        first = first or states
    return result


@torch.no_grad()
def last_hidden_states(model: Any, held_out: HeldOut) -> list[list[Tensor]]:
    """Of each batch the last one, (B, T, D), on the CPU, of a model that is on the text's device."""
    states = []
    for batch in held_out.batches:
        inputs = {name: tensor.to(held_out.device) for name, tensor in batch.items()}
        states.append([model(**inputs).last_hidden_state.float().cpu()])
    return states


def _hidden_states(model: Any, batch: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    """After each layer, (B, T, D) on the CPU: bfloat16, the last one float32."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    output = model(**inputs, output_hidden_states=True, return_dict=True)
    layers = [state.to("cpu", torch.bfloat16) for state in output.hidden_states[1:-1]]
    return [*layers, output.last_hidden_state.float().cpu()]


def nearness(
    states: list[list[Tensor]], first: list[list[Tensor]], held_out: HeldOut, name: str = "trained"
) -> Nearness:
    """How near hidden states are to the first's: of each batch those after each layer, (B, T, D), the last one last.

    Raises RecipeError, QualityError.
    """
    if any(one.shape != other.shape for one, other in zip(states[0], first[0], strict=False)) or len(states[0]) != len(
        first[0]
    ):
        raise RecipeError(f"the {name} model cannot be held against the first: other width or number of layers")
    real = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in held_out.batches]
    layers = [
        _share([found[layer][kept] for found, kept in zip(states, real, strict=True)],
               [wanted[layer][kept] for wanted, kept in zip(first, real, strict=True)])
        for layer in range(len(first[0]))
    ]  # fmt: skip
    cosines = [
        cosine_similarity(*((state[-1] * kept[..., None]).sum(1) for state in (found, wanted)), dim=-1)
        for found, wanted, kept in zip(states, first, real, strict=True)
    ]
    cosine = torch.cat(cosines).double().mean().item()
    if not math.isfinite(layers[-1] + cosine):
        raise QualityError("hidden states are not finite: the weights overflow in their dtype; try --dtype")
    return Nearness(layers[-1], cosine, layers)


def _share(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Squared error as a share of the variance; (n, D) of each batch."""
    lost = sum((f.double() - w.double()).square().sum() for f, w in zip(found, wanted, strict=True))
    mean = sum(w.double().sum(0) for w in wanted) / sum(map(len, wanted))
    energy = sum((w.double() - mean).square().sum() for w in wanted)
    return float(lost / energy)
