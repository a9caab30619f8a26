"""Loss, perplexity, KL divergence and agreement of models on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import TOKENIZER_FILES
from .data import BUILT_IN, SpanCorruption, documents, token_blocks
from .errors import CheckpointError, DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TOKENS = 16_384
"""tokens of held-out text"""
LONGEST = 1024
"""tokens in one sequence, at most"""
_BATCH_TOKENS = 4096
_CHUNK = 1024  # predictions whose logits are held at once


@dataclass(frozen=True)
class Quality:
    """How well a model predicts held-out text."""

    loss: float
    """nats a token"""
    perplexity: float
    kl: float | None = None
    """KL(source || this), nats a token"""
    top1: float | None = None
    """share of the predictions whose most likely token is the source's"""


@dataclass(frozen=True)
class Predictions:
    """All that is kept of a model's run over a text: with the logits' two factors nothing of size (N, V) is stored."""

    hidden: Tensor
    """(N, D), input of the language model head"""
    head: Tensor
    """(V, D)"""
    labels: Tensor
    """(N,)"""


def choose_device(device: str) -> torch.device:
    """ "auto" is CUDA, then MPS, then the CPU. Raises RecipeError for a device that is not there."""
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {device} is not available here: choose auto, cpu, cuda or mps") from error
    return chosen


def load_model(
    folder: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False, **overrides: Any
) -> PreTrainedModel:
    """A language model, original or converted, in eval mode. Raises CheckpointError."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from . import models  # noqa: F401 - registers the architectures

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code, **overrides).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises CheckpointError when it has none."""
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES) and not trust_remote_code:
        raise CheckpointError(f"{folder} holds no tokenizer; --no-evaluate converts without one")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: its tokenizer does not load ({reason}); --no-evaluate does without"
        ) from error


@dataclass(frozen=True)
class HeldOut:
    """Batches of held-out text, the same for every model measured."""

    batches: list[dict[str, Tensor]]
    name: str
    """what the text is"""
    tokens: int
    """predicted"""


def held_out_batches(
    tokenizer: Any, config: Any, data: str | None = None, tokens: int = DEFAULT_TOKENS, seed: int = 0
) -> HeldOut:
    """Held-out text as model inputs.

    Args:
        tokenizer, config: of the source.
        data: as `sqa_convert.data.documents` takes it; its held-out part is used.
        tokens: of text.
        seed: of the span corruption.

    Raises:
        DataError: there is too little text, or the tokenizer does not fit the model.
    """
    name = f"{data or BUILT_IN}, held-out part"
    longest = getattr(config, "n_positions", None) or 512
    length = min(longest, LONGEST, tokens)
    blocks = token_blocks(documents(data, "heldout"), tokenizer, length, tokens, name)
    if int(blocks.max()) >= config.vocab_size:
        raise DataError(f"the tokenizer makes token {int(blocks.max())}, the model knows {config.vocab_size} tokens")
    if not config.is_encoder_decoder:
        batches = [{"input_ids": b, "labels": b} for b in blocks.split(max(1, _BATCH_TOKENS // length))]
        return HeldOut(batches, name, blocks.numel() - len(blocks))
    generator = torch.Generator().manual_seed(seed)
    corrupt = SpanCorruption.of(tokenizer)
    batches = []
    for part in blocks.split(max(1, _BATCH_TOKENS // length)):
        inputs, labels = corrupt(part, generator)
        batches.append({"input_ids": inputs, "labels": labels})
    return HeldOut(batches, f"{name}, span corruption", sum(b["labels"].numel() for b in batches))


@torch.no_grad()
def predict(
    model: PreTrainedModel, held_out: HeldOut, device: torch.device, step: Callable[[], None] = lambda: None
) -> Predictions:
    """Runs a model over held-out text. `step` is called after each batch."""
    model.to(device).eval()
    head = model.get_output_embeddings()
    caught: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    hidden, labels = [], []
    shift = not model.config.is_encoder_decoder
    try:
        for batch in held_out.batches:
            model(**{name: tensor.to(device) for name, tensor in batch.items()})
            states, targets = caught.pop(), batch["labels"]
            if shift:
                states, targets = states[:, :-1], targets[:, 1:]
            hidden.append(states.flatten(0, 1).float())
            labels.append(targets.flatten())
            step()
    finally:
        hook.remove()
    return Predictions(torch.cat(hidden), head.weight.detach().float(), torch.cat(labels).to(device))


@torch.no_grad()
def measure(model: Predictions, source: Predictions | None = None) -> Quality:
    """Quality of a model's predictions, against the source's when given. float32, summed in float64."""
    loss = kl = 0.0
    agree, count = 0, len(model.labels)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        log_p = (model.hidden[part] @ model.head.T).log_softmax(-1)  # (N, V)
        loss -= log_p.gather(1, model.labels[part, None]).double().sum().item()
        if source is not None:
            log_q = (source.hidden[part] @ source.head.T).log_softmax(-1)
            kl += (log_q.exp() * (log_q - log_p)).sum(-1).double().sum().item()
            agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    loss /= count
    perplexity = math.exp(min(loss, 700.0))
    if source is None:
        return Quality(loss, perplexity)
    return Quality(loss, perplexity, kl / count, agree / count)


def compare(
    models: Mapping[str, str | Path],
    *,
    data: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Measures folders one after the other on the same text; the first is the source the others are held against.

    Returns:
        {"data", "tokens", "device", and per model its `Quality` as a dict}.
    """
    chosen = choose_device(device)
    result: dict[str, Any] = {}
    held_out: HeldOut | None = None
    source: Predictions | None = None
    for name, folder in models.items():
        model = load_model(folder, trust_remote_code=trust_remote_code)
        if held_out is None:
            tokenizer = load_tokenizer(folder, trust_remote_code)
            held_out = held_out_batches(tokenizer, model.config, data, tokens, seed)
            result |= {"data": held_out.name, "tokens": held_out.tokens, "device": str(chosen)}
        done, total = 0, len(held_out.batches)

        def step(stage: str = f"evaluate {name}", total: int = total) -> None:
            nonlocal done
            done += 1
            progress(stage, done, total)

        predictions = predict(model, held_out, chosen, step)
        del model
        result[name] = asdict(measure(predictions, source))
        source = source or predictions
    return result


def evaluate(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    data: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Loss and perplexity of a model on held-out text; with `against`, also KL and agreement with that model.

    Args:
        folder: a model folder, "sample:gpt2" or a hub id.
        against: likewise, usually the source.
        data, tokens, seed: the text, see `held_out_batches`.
        device: "auto", "cpu", "cuda", "mps".

    Returns:
        {"data", "tokens", "device", "model": Quality as a dict, and "against" likewise}.
    """
    from .checkpoint import resolve

    models = {} if against is None else {"against": resolve(str(against))[0]}
    return compare(models | {"model": resolve(str(folder))[0]}, data=data, tokens=tokens, device=device, seed=seed)
