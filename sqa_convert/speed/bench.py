"""Models timed beside each other, against length: prefill, decoding, training."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..caller_settings import undisturbed
from ..devices import choose_device, device_name
from ..errors import RecipeError
from ..evaluation.load import Converted, load_model, located
from ..heads.partition import VARIANTS, variant_heads
from ..progress import Progress, in_notebooks
from .measurement import Measurement
from .settings import GRID, LENGTHS, Settings
from .timing import alternate, peak_memory
from .workloads import (
    Workload,
    attention_layer,
    bytes_read,
    check_kinds,
    distinct_layers,
    extend_positions,
    flops,
    layer_workload,
    model_workload,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULTS = Settings()


@undisturbed
def bench(
    models: Mapping[str, str | Path | PreTrainedModel | Converted] | Converted, settings: Settings = DEFAULTS, *,
    trust_remote_code: bool = False, progress: Progress = in_notebooks,
) -> dict[str, Any]:  # fmt: skip
    """Measures models side by side, each against the first.

    Args:
        models: what to call them, and each one's folder, or the model in memory, of which a copy is timed; or what
            `convert` returned alone, which is timed beside its source.
        settings: how to measure.
        trust_remote_code: let code that the folders bring along run.
        progress: called as the work goes on.

    Returns:
        What was measured where, and under "rows" a row for every model, part, mode and length: "seconds" of a run and
        "speedup" over the first model as median, low and high over the rounds, "ideal" (the speed-up that counting
        promises), "tokens_per_second", "flops" and, where known, "cache_bytes" and "peak_bytes".

    Raises:
        RecipeError: the settings cannot be, the models have different dtypes, or nothing fits into memory.
        CheckpointError: a model cannot be loaded.
    """
    settings.check()
    device = choose_device(settings.device)
    lengths = settings.lengths or LENGTHS.get(device.type, LENGTHS["cuda"])
    loaded, extended = {}, []
    if isinstance(models, Converted):
        models = {"source": models.source, "converted": models}
    for name, given in models.items():
        model = _timed(located(given), settings, trust_remote_code)
        if extend_positions(model, max(lengths)):
            extended.append(name)
        loaded[name] = model.to(device)
    check_kinds(loaded)
    dtypes = {name: str(model.dtype).removeprefix("torch.") for name, model in loaded.items()}
    if len(set(dtypes.values())) > 1:
        told = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise RecipeError(f"{told}: these cannot be compared; give --dtype")
    measured = []
    heads = {name: heads_of(model.config) for name, model in loaded.items()}
    cells = [(part, mode, length) for part in settings.parts for mode in settings.modes for length in lengths]
    for i, (part, mode, length) in enumerate(cells):
        progress("measure", i, len(cells), f"{part}, {mode}, {length:,} tokens")
        make = model_workload if part == "model" else layer_workload
        of = loaded if part == "model" else _layers(loaded, mode, heads)
        measured += _measure(of, make, part, mode, length, settings, device)
    progress("measure", len(cells), len(cells))
    return _result(measured, settings, device, heads, extended)


def _layers(models: Mapping[str, Any], mode: str, heads: dict[str, str]) -> dict[str, nn.Module]:
    """An attention layer of each model; where its layers differ the first of each kind, whose heads are noted, too."""
    layers: dict[str, nn.Module] = {}
    for name, model in models.items():
        distinct = distinct_layers(model, mode)
        for (q_heads, kv_heads), layer in sorted(distinct.items(), key=lambda item: item[1]):
            called = name if len(distinct) == 1 else f"{name}, layer {layer}"
            heads.setdefault(called, f"{q_heads}/{kv_heads}")
            layers[called] = attention_layer(model, mode, layer)
    return layers


def _timed(given: Path | PreTrainedModel, settings: Settings, trust_remote_code: bool) -> PreTrainedModel:
    """The model to time, on the CPU. Raises CheckpointError."""
    from transformers import PreTrainedModel

    attention, dtype = settings.attention, settings.dtype
    if isinstance(given, Path):
        return load_model(given, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=attention)
    model = copy.deepcopy(given).eval()
    for module in model.modules():  # transformers 5.17 leaves out the stacks inside
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(attention)
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


@undisturbed
def bench_layers(
    heads: int, head_dim: int, variants: tuple[str, ...] = GRID, settings: Settings = DEFAULTS,
    progress: Progress = in_notebooks,
) -> dict[str, Any]:  # fmt: skip
    """Measures one causal attention layer of random weights in several variants, each against the first.

    Args:
        heads: H of "mha", whose fractions the variants keep; the width is heads x head_dim.
        head_dim: d.
        variants: of "mha" and VARIANTS, or "Hq/Hkv".
        settings: how to measure; `parts` does not count.
        progress: called as the work goes on.

    Returns:
        As `bench`, for the part "attention".

    Raises:
        RecipeError: the settings or variants cannot be.
    """
    from ..models import SQAGPT2Config
    from ..models.modeling_sqa_gpt2 import SQAGPT2Attention

    settings.check()
    if not variants:
        raise RecipeError(f"--variants: choose mha, {', '.join(VARIANTS)}, or Hq/Hkv")
    if heads < 1 or head_dim < 1:
        raise RecipeError(f"--heads {heads} --head-dim {head_dim}: give 1 or more of each")
    device = choose_device(settings.device)
    dtype = getattr(torch, "float32" if settings.dtype == "auto" else settings.dtype)
    lengths = settings.lengths or LENGTHS.get(device.type, LENGTHS["cuda"])
    layers, head_counts = {}, {}
    for name in variants:
        query_heads, key_value_heads = grid_heads(name, heads)
        config = SQAGPT2Config(
            n_embd=heads * head_dim, n_head=query_heads, num_key_value_heads=key_value_heads, head_dim=head_dim
        )
        _check_attention(settings.attention, dtype)
        config._attn_implementation = settings.attention
        torch.manual_seed(0)
        layers[name] = SQAGPT2Attention(config, 0).to(device, dtype).eval()
        head_counts[name] = f"{query_heads}/{key_value_heads}"
    measured = []
    cells = [(mode, length) for mode in settings.modes for length in lengths]
    for i, (mode, length) in enumerate(cells):
        progress("measure", i, len(cells), f"{mode}, {length:,} tokens")
        measured += _measure(layers, layer_workload, "attention", mode, length, settings, device)
    progress("measure", len(cells), len(cells))
    return _result(measured, settings, device, head_counts) | {"head_dim": head_dim}


def _check_attention(attention: str, dtype: torch.dtype) -> None:
    """Raises RecipeError where a kernel is not there, or does not take the dtype."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    known = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if attention in known and not (known[attention]() and dtype != torch.float32):
        raise RecipeError(f"--attn {attention} needs its package, a GPU, and --dtype bfloat16 or float16")


def grid_heads(name: str, heads: int) -> tuple[int, int]:
    """Query and key/value heads of a variant, or of "Hq/Hkv". Raises RecipeError."""
    if name.lower() == "mha":
        return heads, heads
    if name.lower() in VARIANTS:
        return variant_heads(name.lower(), heads)
    query_heads, _, key_value_heads = name.partition("/")
    if query_heads.isdecimal() and key_value_heads.isdecimal() and int(key_value_heads):
        counts = int(query_heads), int(key_value_heads)
        if counts[1] <= counts[0] <= heads and counts[0] % counts[1] == 0:
            return counts
    raise RecipeError(f"--variants {name}: choose mha, {', '.join(VARIANTS)}, or Hq/Hkv such as 8/4 of {heads} heads")


def heads_of(config: Any) -> str:
    """ "12", "8/4" or "encoder 8/4, decoder 12/12, cross 12/12": query heads, when converted with key/value heads.

    Where layers differ, those of the smallest and the largest: "4/2 to 12/6".
    """
    if not hasattr(config, "heads"):
        return str(config.num_attention_heads)
    decoder_layers = getattr(config, "num_decoder_layers", config.num_hidden_layers)
    layers = {"encoder": config.num_hidden_layers, "decoder": decoder_layers, "cross": decoder_layers}
    counts = {}
    for site in layers if config.is_encoder_decoder else ("decoder",):
        kept = {config.heads(site, layer) for layer in range(layers[site])}
        counts[site] = " to ".join("/".join(map(str, pair)) for pair in sorted({min(kept), max(kept)}))
    if len(set(counts.values())) == 1:
        return counts["decoder"]
    return ", ".join(f"{site} {count}" for site, count in counts.items())


def _measure(
    of: Mapping[str, nn.Module], make: Callable[..., Workload], part: str, mode: str, length: int, settings: Settings,
    device: torch.device,
) -> list[Measurement]:  # fmt: skip
    if settings.compiled:
        torch.compiler.reset()  # beyond some versions of one function torch goes on without compiling
    works: dict[str, Workload] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, module in of.items():
        with _out_of_memory() as lacking:
            works[name] = make(module, mode, length, settings.batch)
            runs[name] = torch.compile(works[name].run, dynamic=True) if settings.compiled else works[name].run
            runs[name]()
        if lacking:
            works.pop(name, None)
            runs.pop(name, None)
    seconds: dict[str, list[float]] = {}
    with _out_of_memory() as lacking:
        seconds = alternate(runs, settings.repeats, device)
    if lacking:  # each fits alone, all of them do not
        works.clear()
    measurements = []
    for name, module in of.items():
        measured: dict[str, Any] = {"tokens": 0, "seconds": []}
        if name in works:
            work = works[name]
            measured = {
                "tokens": work.tokens,
                "seconds": seconds[name],
                "bytes_read": bytes_read(module, work) if mode == "decode" else None,
                "cache_bytes": work.cache_bytes,
                "peak_bytes": peak_memory(runs[name], device),
            }
        measurements.append(
            Measurement(
                model=name,
                part=part,
                mode=mode,
                length=length,
                batch=settings.batch,
                dtype=str(next(module.parameters()).dtype).removeprefix("torch."),
                device=device_name(device),
                attention=settings.attention,
                flops=flops(module, make, mode, length, settings.batch),
                **measured,
            )
        )
    return measurements


@contextlib.contextmanager
def _out_of_memory() -> Iterator[list[str]]:
    """Stops where memory does not suffice, and says so in the list it gives."""
    lacking: list[str] = []
    try:
        yield lacking
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        lacking.append(str(error))


def _result(
    measured: list[Measurement],
    settings: Settings,
    device: torch.device,
    heads: Mapping[str, str],
    extended: list[str] | None = None,
) -> dict[str, Any]:
    import transformers

    if not any(m.seconds for m in measured):
        raise RecipeError(f"nothing fits into the memory of {device_name(device)}: shorter --lengths, smaller --batch")
    base = {(m.part, m.mode, m.length): m for m in reversed(measured)}  # the first of each
    return {
        "schema": 1,
        "device": device_name(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": date.today().isoformat(),
        "repeats": settings.repeats,
        "compiled": settings.compiled,
        "positions_extended": extended or [],
        "heads": dict(heads),
        "rows": [m.to_json(base[m.part, m.mode, m.length]) for m in measured],
    }
