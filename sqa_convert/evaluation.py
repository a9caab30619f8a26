"""Loss, perplexity, KL divergence and agreement of models on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batches import CausalCollator, denoising, token_blocks
from .callers import undisturbed
from .checkpoint import check_folder, read_config, read_generation_config, read_json
from .companions import has_tokenizer
from .data import BUILT_IN, Skipped, documents
from .decoding import settle
from .devices import choose_device, device_name
from .distill import IGNORED
from .errors import CheckpointError, DataError, QualityError, RecipeError, one_line, shown
from .output import REPORT, is_ours, sha256_of
from .sampling import own_loss
from .sources import stamp
from .special_tokens import end_of_text
from .text_fit import Fit, looked_at, misfits
from .text_formats import TEXT_COLUMN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TOKENS = 16_384
"""tokens of held-out text"""
LONGEST = 1024
"""tokens in one sequence, at most"""
_BATCH_TOKENS = 4096
_MOST_TOKENIZERS = 8
_TOKENIZERS: dict[tuple[object, ...], Any] = {}  # one that has encoded keeps 0.4 MB for ever, even when it is gone
_LARGE_TOKENIZER = 2**26  # bytes
_MAY_BE_A_TOKENIZERS = (
    ".bpe", ".codes", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".tokenizer", ".txt", ".vocab"
)  # fmt: skip
_NEVER_A_TOKENIZERS = ("config.json", "generation_config.json", "model.safetensors.index.json", "report.json")
_FEW_COUNTED = 256  # predictions
_CHUNK_LOGITS = 2**25  # logits held at once


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


def load_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """A model's config, original or converted. Raises CheckpointError."""
    from transformers import AutoConfig

    from . import models  # noqa: F401 - registers the architectures

    check_folder(Path(folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validation, JSON and look-ups share no base class
        raise CheckpointError(f"{folder}: its config does not load: {one_line(error)}") from error


def load_model(
    folder: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False, **overrides: Any
) -> PreTrainedModel:
    """A language model, original or converted, in eval mode, which generates plainly. Raises CheckpointError."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

    config = load_config(folder, trust_remote_code)
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("Classification", "EncoderModel", "QuestionAnswering")):
        raise CheckpointError(f"{folder} is a {architecture}, which has no language model head")
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    overrides |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "generation_config": GenerationConfig()}
    try:
        return settle(auto.from_pretrained(folder, **overrides).eval(), read_generation_config(Path(folder)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # config.json can make it fail in any way
        raise CheckpointError(f"{folder} cannot be loaded: {one_line(error)}") from error


def load_tokenizer(
    folder: str | Path, trust_remote_code: bool = False, without: str = "copy the source's there"
) -> Any:
    """The folder's tokenizer, one for all folders with the same files: it must not be changed.

    Raises CheckpointError when there is none, saying what to do `without` one.
    """
    way_out = without and f"; {without}"
    from transformers import AutoTokenizer

    check_folder(Path(folder))
    if not has_tokenizer(Path(folder)):
        raise CheckpointError(f"{folder} holds no tokenizer{way_out}")
    try:
        content = _tokenizer_content(Path(folder))
        if content in _TOKENIZERS and not trust_remote_code:
            return _TOKENIZERS[content]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # every tokenizer library fails in its own way
        raise CheckpointError(f"{folder}: its tokenizer does not load ({one_line(error, 200)}){way_out}") from error
    if not trust_remote_code:  # else there may be more to it than these files
        if len(_TOKENIZERS) == _MOST_TOKENIZERS:
            _TOKENIZERS.pop(next(iter(_TOKENIZERS)), None)
        _TOKENIZERS[content] = tokenizer
    return tokenizer


def _tokenizer_content(folder: Path) -> tuple[object, ...]:
    """All that a tokenizer may be made of: what the config says of it, the folder's small files."""
    config = read_config(str(folder), folder)
    paths = sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*")))
    files = [p for p in paths if p.suffix in _MAY_BE_A_TOKENIZERS and p.name not in _NEVER_A_TOKENIZERS and p.is_file()]
    contents = ((str(path.relative_to(folder)), _content(path)) for path in files)
    return (str(config.get("model_type")), str(config.get("tokenizer_class")), *contents)


def _content(path: Path) -> object:
    small = path.stat().st_size < _LARGE_TOKENIZER
    return sha256_of(path) if small else stamp(path)


@dataclass(frozen=True)
class HeldOut:
    """Batches of held-out text, the same for every model measured, and where they are measured."""

    batches: list[dict[str, Tensor]]
    name: str
    """what the text is"""
    tokens: int
    """predicted"""
    device: torch.device
    unknown: float = 0.0
    """share of the text's characters that the tokenizer does not know"""
    chosen: bool = True
    """whether it is another text than the built-in one"""

    def fit(self, model: Any, loss: float | None, own: float | None = None, who: str = "source") -> Fit:
        """What tells whether a model was made for this text.

        Args:
            model: on the text's device.
            loss: the model's on this text.
            own: its loss on what it writes itself; None finds out, where there is a loss to hold it against.
            who: what the model is called.
        """
        if own is None and loss is not None:
            own = own_loss(model, self.batches[0], self.device, torch.Generator().manual_seed(0))
        counted = self._token_entropy(shifted=not model.config.is_encoder_decoder)
        return Fit(loss, model.config.vocab_size, own, counted, self.unknown, self.chosen, who)

    def _token_entropy(self, shifted: bool) -> float | None:
        """Of what is predicted, as if each token stood alone, nats; None of too few to tell (Miller, 1955)."""
        labels = torch.cat([batch["labels"][:, int(shifted) :].flatten() for batch in self.batches])
        counts = labels[labels != IGNORED].unique(return_counts=True)[1].double()
        total = counts.sum()
        if total < _FEW_COUNTED:
            return None
        share = counts / total
        return float(-(share * share.log()).sum() + (len(counts) - 1) / (2 * total))


def prepare(
    folder: str | Path,
    data: str | None = None,
    *,
    text_column: str = TEXT_COLUMN,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    without: str = "copy the source's there",
) -> HeldOut:
    """Held-out text as inputs of the model in `folder`, and of every model with its tokenizer.

    It is drawn across documents, a block of each at most while there are others. A decoder-only model reads it as it
    is trained: no document sees another in its block, and positions start again with each.

    Args:
        data: as `sqa_convert.data.documents` takes it; its held-out part is used.
        text_column: of a table, the one that holds the text.
        tokens: of text.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of the span corruption.
        without: what to do where there is no tokenizer, for messages.

    Raises:
        CheckpointError: config or tokenizer do not load.
        DataError: there is too little text, or the tokenizer does not fit the model.
        RecipeError: there is no such device.
    """
    chosen = choose_device(device)
    config = load_config(folder, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code, without)
    name = f"{shown(data or BUILT_IN)}, held-out part"
    longest = getattr(config, "n_positions", None) or 512
    length = min(longest, LONGEST, tokens)
    skipped = Skipped()
    texts = documents(data, "heldout", column=text_column, shuffled=True, skipped=skipped)
    texts, unknown = looked_at(texts, tokenizer, name, "--data")
    blocks = token_blocks(texts, tokenizer, length, tokens, name, drawn=True)
    name = f"{name}{skipped}"
    named = data not in (None, BUILT_IN)
    corrupt = denoising(tokenizer, config.vocab_size) if config.is_encoder_decoder else None
    check_vocabulary(blocks, config.vocab_size)
    parts = blocks.split(max(1, _BATCH_TOKENS // length))
    if corrupt is None:
        collate = CausalCollator(end_of_text(tokenizer))
        batches = [collate(list(enumerate(part))) for part in parts]
        return HeldOut(batches, name, blocks.numel() - len(blocks), chosen, unknown, named)
    generator = torch.Generator().manual_seed(seed)
    pairs = [corrupt(part, generator) for part in parts]
    batches = [{"input_ids": inputs, "labels": labels} for inputs, labels in pairs]
    count = sum(labels.numel() for _, labels in pairs)
    return HeldOut(batches, f"{name}, {corrupt.name}", count, chosen, unknown, named)


def check_vocabulary(blocks: Tensor, vocabulary: int) -> None:
    """Raises DataError when the tokenizer makes tokens that the model does not know."""
    largest = int(blocks.max())
    if largest >= vocabulary:
        raise DataError(f"the tokenizer makes token {largest}, the model knows {vocabulary} tokens")


@torch.no_grad()
def predict(model: PreTrainedModel, held_out: HeldOut, step: Callable[[], None] = lambda: None) -> Predictions:
    """Runs a model over held-out text. `step` is called after each batch."""
    device = held_out.device
    model.to(device).eval()
    head = model.get_output_embeddings()
    caught: list[Tensor] = []
    weight: list[Tensor] = []

    def catch(module: Any, inputs: tuple[Tensor]) -> None:
        caught.append(inputs[0])
        if not weight:  # here it is whole, also when its storage is shared out among processes
            weight.append(module.weight.detach().float().clone())

    hook = head.register_forward_pre_hook(catch)
    hidden, labels = [], []
    shift = not model.config.is_encoder_decoder
    try:
        for batch in held_out.batches:
            # Only an encoder-decoder needs the labels, to make its decoder's inputs of.
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels" or not shift}
            model(**inputs, use_cache=False)
            states, targets = caught.pop(), batch["labels"]
            if shift:
                states, targets = states[:, :-1], targets[:, 1:]
            kept = (targets != IGNORED).flatten().to(device)
            hidden.append(states.flatten(0, 1)[kept].float())
            labels.append(targets.flatten().to(device)[kept])
            step()
    finally:
        hook.remove()
    return Predictions(torch.cat(hidden), weight[0], torch.cat(labels))


@torch.no_grad()
def measure(model: Predictions, source: Predictions | None = None) -> Quality:
    """Quality of a model's predictions, against the source's when given. float32; the chunks' sums add in float64."""
    loss = kl = 0.0
    agree, count = 0, len(model.labels)
    chunk = max(1, _CHUNK_LOGITS // len(model.head))
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        log_p = (model.hidden[part] @ model.head.T).log_softmax(-1)  # (n, V)
        loss -= log_p.gather(1, model.labels[part, None]).sum().item()
        if source is not None:
            log_q = (source.hidden[part] @ source.head.T).log_softmax(-1)
            kl += (log_q.exp() * (log_q - log_p)).sum().item()
            agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    loss /= count
    if not math.isfinite(loss + kl):
        raise QualityError("the loss is not finite: the weights overflow in their dtype; try --dtype, or --no-evaluate")
    perplexity = math.exp(min(loss, 700.0))
    if source is None:
        return Quality(loss, perplexity)
    return Quality(loss, perplexity, kl / count, agree / count)


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
) -> dict[str, Any]:
    """Measures models one after the other on the same text; the first is what the others are held against.

    Args:
        models: folders, models, or functions that make one when its turn comes, to be measured in the first's dtype.
        also: what else to find out about each, for its row.
        optional: those whose row is left out where they fail.
        untrained: those that cannot rightly predict better than the first: converted from it, and not trained.
        own: the first one's loss on what it writes itself, nats a token; None finds out.

    Returns:
        {"data", "tokens", "device", "warnings" (what makes it doubtful that the text says anything, as
        `sqa_convert.text_fit.misfits` has it), and per model its `Quality` as a dict}.

    Raises:
        RecipeError: a model does not fit into the device's memory, or cannot be compared with the first.
    """
    device = held_out.device
    result: dict[str, Any] = {"data": held_out.name, "tokens": held_out.tokens, "device": device_name(device)}
    result["warnings"] = []
    source: Predictions | None = None
    fit: Fit | None = None
    first: dict[str, Any] = {}
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
            kind = (model.config.is_encoder_decoder, model.config.vocab_size)
            first.setdefault("dtype", model.dtype)
            if kind != first.setdefault("kind", kind):
                raise RecipeError(
                    f"{folder} cannot be held against {next(iter(models.values()))}: other kind or vocabulary"
                )
            predictions = predict(model, held_out, step)
            result[name] = asdict(measure(predictions, source)) | ({} if also is None else also(model))
            if fit is None:
                fit = held_out.fit(model, result[name]["loss"], own, "model" if name == "model" else "source")
        except Exception as error:
            if name in optional:  # by whatever it fails, the others are worth having
                continue
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise RecipeError(f"the {name} model does not fit on {device}: --device cpu or --no-evaluate") from error
        source = source or predictions
    if fit is not None:
        losses = {name: result[name]["loss"] for name in models if name in result and name in untrained}
        result["warnings"] = misfits(fit, "--data", losses)
    return result


def untrained(folder: Path, against: str) -> set[str]:
    """{"model"} where a folder is a conversion of `against` that was not trained since."""
    try:
        report = read_json(folder / REPORT, "")
    except CheckpointError:
        return set()
    converted = is_ours(report) and "uptraining" not in report and report["source"]["name"] == against
    return {"model"} if converted else set()


@undisturbed
def evaluate(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    data: str | None = None,
    text_column: str = TEXT_COLUMN,
    tokens: int = DEFAULT_TOKENS,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Loss and perplexity of a model on held-out text; with `against`, also KL and agreement with that model.

    Args:
        folder: a model folder, "sample:gpt2" or a hub id.
        against: likewise, usually the source; of the same kind and vocabulary.
        data: as `sqa_convert.data.documents` takes it, its held-out part is used; by default the built-in corpus.
        text_column: of a table, the one that holds the text.
        tokens: of text.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        seed: of the span corruption of T5.

    Returns:
        "data" (what the text is), "tokens" (predicted), "device", "warnings" (a list of {"rule", "value", "bound",
        "text"}: why the text may say nothing of the model), and for "model" and "against" a dict each: "loss"
        in nats a token, "perplexity", "kl" to `against` in nats a token, and "top1", the share of predictions whose
        most likely token is that of `against`. "kl" and "top1" are None where there is nothing to compare with.

    Raises:
        CheckpointError: a model or its tokenizer cannot be loaded.
        DataError: there is too little text, or the tokenizer does not fit the model.
        RecipeError: the models cannot be compared, or one does not fit into the device's memory.
        QualityError: the loss is not finite.
    """
    from .checkpoint import resolve

    models = {} if against is None else {"against": resolve(str(against))}
    models["model"] = resolve(str(folder))
    held_out = prepare(models["model"], data, text_column=text_column, tokens=tokens, device=device, seed=seed)
    return compare(models, held_out, untrained=untrained(models["model"], str(against)))
