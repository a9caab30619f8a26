"""How fast models are beside each other: time, memory and cache against length, and what counting would promise."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .callers import undisturbed
from .devices import choose_device, device_name
from .errors import RecipeError
from .evaluation import load_model
from .heads.partition import VARIANTS, variant_heads
from .progress import Progress, silent
from .timing import Spread, alternate, peak_memory
from .workloads import (
    MODES,
    Workload,
    attention_layer,
    bytes_read,
    extend_positions,
    flops,
    layer_workload,
    model_workload,
)

DTYPES = ("float32", "bfloat16", "float16")
PARTS = ("model", "attention")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
LONGEST = 2**22
"""tokens"""
LENGTHS = {"cpu": (256, 1024), "mps": (1024, 4096), "cuda": (1024, 4096, 32768)}
"""tokens, where none are told"""
GRID = ("mha", "gqa", "mqa", "sqa", "ssqa", "xsqa", "xsmqa")
"""the variants of SQA's paper (arXiv 2510.01817, table 1)"""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    lengths: tuple[int, ...] = ()
    """Tokens; empty: as suits the device."""
    modes: tuple[str, ...] = MODES
    """Of "prefill", "decode" and "train"."""
    batch: int = 1
    """Rows."""
    dtype: str = "auto"
    """"float32", "bfloat16", "float16"; "auto": as stored, which must be the same for all."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    attention: str = "sdpa"
    """The attention kernel, a name of ATTENTION."""
    repeats: int = 5
    """Rounds; each times every model once."""
    compiled: bool = False
    """By torch.compile with dynamic shapes."""
    parts: tuple[str, ...] = PARTS
    """Of "model" (the whole) and "attention" (one layer)."""

    def check(self) -> None:
        """Raises RecipeError for what cannot be."""
        if any(not 2 <= length <= LONGEST for length in self.lengths):
            raise RecipeError(f"--lengths {','.join(map(str, self.lengths))}: give 2 to {LONGEST:,} tokens")
        for flag, value in (("--batch", self.batch), ("--repeats", self.repeats)):
            if value < 1:
                raise RecipeError(f"{flag} {value}: give 1 or more")
        for flag, given, known in (("--modes", self.modes, MODES), ("--parts", self.parts, PARTS)):
            if not given or not set(given) <= set(known):
                raise RecipeError(f"{flag} {','.join(given)}: choose of {', '.join(known)}")
        choices: dict[str, tuple[str, tuple[str, ...]]] = {
            "--dtype": (self.dtype, ("auto", *DTYPES)),
            "--attn": (self.attention, ATTENTION),
        }
        for flag, (one, allowed) in choices.items():
            if one not in allowed:
                raise RecipeError(f"{flag} {one}: choose {', '.join(allowed)}")


@dataclass(frozen=True)
class Measurement:
    """One model in one mode at one length."""

    model: str
    part: str
    """of PARTS"""
    mode: str
    length: int
    batch: int
    dtype: str
    device: str
    attention: str
    tokens: int
    """in a run, of all rows"""
    seconds: list[float]
    """of a run, in each round; empty where memory did not suffice"""
    flops: int
    """as torch counts them"""
    bytes_read: int | None = None
    """of decoding: weights and cache"""
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    """held during a run above what is held between runs"""

    def to_json(self, base: Measurement) -> dict[str, Any]:
        """With what follows, beside `base`."""
        row = asdict(self)
        if self.seconds:
            spread = Spread.of(self.seconds)
            row["seconds"] = asdict(spread)
            row["tokens_per_second"] = self.tokens / spread.median
        else:
            row["seconds"], row["out_of_memory"] = None, True
        row["ideal"] = ideal(base, self)
        if self.seconds and base.seconds:
            row["speedup"] = asdict(speedup(base, self))
        return row


def speedup(base: Measurement, other: Measurement) -> Spread:
    """How many times as fast `other` is, round by round. Raises RecipeError where the two cannot be compared."""
    for key in ("part", "mode", "length", "batch", "dtype", "device", "attention"):
        if getattr(base, key) != getattr(other, key):
            raise RecipeError(
                f"{base.model} was measured with {key} {getattr(base, key)}, {other.model} with {getattr(other, key)}: "
                "these cannot be compared"
            )
    if len(base.seconds) != len(other.seconds):
        raise RecipeError(f"{base.model} was timed {len(base.seconds)} times, {other.model} {len(other.seconds)} times")
    return Spread.of([a / b for a, b in zip(base.seconds, other.seconds, strict=True)])


def ideal(base: Measurement, other: Measurement) -> float | None:
    """The speed-up that counting promises: of floating point operations, in decoding of bytes to be read.

    None in decoding where memory did not suffice for one of them, so that its bytes are not known.
    """
    if other.mode != "decode":
        return base.flops / other.flops
    if base.bytes_read is None or other.bytes_read is None:
        return None
    return base.bytes_read / other.bytes_read


@undisturbed
def bench(
    models: Mapping[str, str | Path], settings: Settings = Settings(), *, trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Measures models side by side, each against the first.

    Args:
        models: what to call them, and their folders.
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
    for name, folder in models.items():
        model = load_model(
            folder, dtype=settings.dtype, trust_remote_code=trust_remote_code, attn_implementation=settings.attention
        )
        if extend_positions(model, max(lengths)):
            extended.append(name)
        loaded[name] = model.to(device)
    dtypes = {name: str(model.dtype).removeprefix("torch.") for name, model in loaded.items()}
    if len(set(dtypes.values())) > 1:
        told = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise RecipeError(f"{told}: these cannot be compared; give --dtype")
    measured = []
    cells = [(part, mode, length) for part in settings.parts for mode in settings.modes for length in lengths]
    for i, (part, mode, length) in enumerate(cells):
        progress("measure", i, len(cells), f"{part}, {mode}, {length:,} tokens")
        make = model_workload if part == "model" else layer_workload
        of = {n: model if part == "model" else attention_layer(model, mode) for n, model in loaded.items()}
        measured += _measure(of, make, part, mode, length, settings, device)
    progress("measure", len(cells), len(cells))
    heads = {name: heads_of(model.config) for name, model in loaded.items()}
    return _result(measured, settings, device, heads, extended)


@undisturbed
def bench_layers(
    heads: int, head_dim: int, variants: tuple[str, ...] = GRID, settings: Settings = Settings(),
    progress: Progress = silent,
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
    from .models import SQAGPT2Config
    from .models.modeling_sqa_gpt2 import SQAGPT2Attention

    settings.check()
    if not variants:
        raise RecipeError(f"--variants: choose mha, {', '.join(VARIANTS)}, or Hq/Hkv")
    if heads < 1 or head_dim < 1:
        raise RecipeError(f"--heads {heads} --head-dim {head_dim}: give 1 or more of each")
    device = choose_device(settings.device)
    dtype = getattr(torch, "float32" if settings.dtype == "auto" else settings.dtype)
    lengths = settings.lengths or LENGTHS.get(device.type, LENGTHS["cuda"])
    layers, kept = {}, {}
    for name in variants:
        query_heads, key_value_heads = grid_heads(name, heads)
        config = SQAGPT2Config(
            n_embd=heads * head_dim, n_head=query_heads, num_key_value_heads=key_value_heads, head_dim=head_dim
        )
        _check_attention(settings.attention, dtype)
        config._attn_implementation = settings.attention
        torch.manual_seed(0)
        layers[name] = SQAGPT2Attention(config, 0).to(device, dtype).eval()
        kept[name] = f"{query_heads}/{key_value_heads}"
    measured = []
    cells = [(mode, length) for mode in settings.modes for length in lengths]
    for i, (mode, length) in enumerate(cells):
        progress("measure", i, len(cells), f"{mode}, {length:,} tokens")
        measured += _measure(layers, layer_workload, "attention", mode, length, settings, device)
    progress("measure", len(cells), len(cells))
    return _result(measured, settings, device, kept) | {"head_dim": head_dim}


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
    """ "12", "8/4" or "encoder 8/4, decoder 12/12, cross 12/12": query heads, when converted with key/value heads."""
    if not hasattr(config, "heads"):
        return str(config.num_attention_heads)
    sites = ("encoder", "decoder", "cross") if config.is_encoder_decoder else ("decoder",)
    counts = {site: "/".join(map(str, config.heads(site))) for site in sites}
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
    found = []
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
        found.append(
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
    return found


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
