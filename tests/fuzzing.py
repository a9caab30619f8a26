"""Sound files of a checkpoint with a few bytes or values changed, by a generator or by a fuzzer's choices."""

from __future__ import annotations

import collections
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from hostile import GPT2, ONE, build, header_of, put, values

from sqa_convert import convert
from sqa_convert.checkpoints.find import open_source
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.errors import SQAError

REQUEST = Request(8, 4, method="mean", calibration=None)
HOSTILE = (
    None, True, False, 0, 1, -1, 2, 13, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "0", "..", "../x", "/dev/zero", "\0", "\x1b[2J", "\ud800", "x" * 5000, "gpt2", "t5",
    "GPT2Model", "F32", "F8_E4M3", "BOOL", "__metadata__", "model.safetensors", [], {}, [[]], [0], [0, 0], [1, 2, 3],
    ["GPT2LMHeadModel"], {"": 0},
)  # fmt: skip
"""values that have been trouble somewhere"""
_PLACES = {
    "config of gpt2": ("gpt2", "config.json"),
    "config of t5": ("t5", "config.json"),
    "config's bytes": ("gpt2", "config.json"),
    "header": ("gpt2", "model.safetensors"),
    "header's bytes": ("gpt2", "model.safetensors"),
    "index": ("indexed", "model.safetensors.index.json"),
    ".bin": ("bin", "pytorch_model.bin"),
    "old .bin": ("old", "pytorch_model.bin"),
}
KINDS = tuple(_PLACES)
"""what is changed of a checkpoint"""


def changed(content: Any, pick: random.Random) -> Any:
    """JSON with one of its values, names or entries changed."""
    if isinstance(content, dict) and content and pick.random() < 0.9:
        key = pick.choice(list(content))
        content = dict(content)
        action = pick.random()
        if action < 0.1:
            del content[key]
        elif action < 0.2:
            content[str(pick.choice(HOSTILE))] = content.pop(key)
        elif action < 0.3:
            content[str(pick.choice(HOSTILE))] = pick.choice(HOSTILE)
        else:
            content[key] = changed(content[key], pick)
        return content
    if isinstance(content, list) and content and pick.random() < 0.8:
        content = list(content)
        place = pick.randrange(len(content))
        if pick.random() < 0.2:
            del content[place]
        else:
            content[place] = changed(content[place], pick)
        return content
    if type(content) is int and pick.random() < 0.5:
        return content + pick.choice((-1, 1, 4, 8, -content, content, 2**32))
    return pick.choice(HOSTILE)


def damaged(data: bytes, pick: random.Random) -> bytes:
    """A few of its bytes changed, gone, or twice."""
    made = bytearray(data)
    for _ in range(pick.choice((1, 1, 2, 5, 20))):
        place = pick.randrange(len(made) + 1)
        action = pick.random()
        if action < 0.5 and place < len(made):
            made[place] = pick.choice((0, 255, made[place] ^ 1 << pick.randrange(8), pick.randrange(256)))
        elif action < 0.7:
            made[place:place] = pick.randbytes(pick.choice((1, 2, 8)))
        elif action < 0.9:
            del made[place : place + pick.choice((1, 2, 8, 100))]
        else:
            made[place:place] = made[max(0, place - 50) : place]
    return bytes(made)


class Checkpoints:
    """Sound checkpoints in a folder of its own, of which one file at a time is replaced."""

    def __init__(self, folder: Path) -> None:
        self.sound: dict[str, Path] = {}
        for base in ("gpt2", "t5", "bin", "old", "indexed"):
            place = folder / base
            place.mkdir()
            self.sound[base] = build(place, {"old": "bin", "indexed": "gpt2"}.get(base, base))
        (self.sound["indexed"] / "model.safetensors").rename(self.sound["indexed"] / ONE)
        import torch

        path = self.sound["old"] / "pytorch_model.bin"
        small = {name: tensor for name, tensor in torch.load(path, weights_only=True).items() if tensor.ndim == 1}
        torch.save(small, path, _use_new_zipfile_serialization=False)
        torch.save(small, self.sound["bin"] / "pytorch_model.bin")
        self.files = {
            base: {path.name: path.read_bytes() for path in source.iterdir()} for base, source in self.sound.items()
        }
        self.header, size = header_of(GPT2)
        self.values = values(size)

    def content(self, kind: str) -> bytes:
        """The sound file of a kind; of weights in safetensors the header alone."""
        if kind.startswith("header"):
            return json.dumps(self.header).encode()
        if kind == "index":
            index = {"metadata": {}, "weight_map": dict.fromkeys(self.header, ONE)}
            return json.dumps(index).encode()
        base, name = _PLACES[kind]
        return self.files[base][name]

    def mutated(self, kind: str, pick: random.Random) -> bytes:
        content = self.content(kind)
        if kind in ("config of gpt2", "config of t5", "header", "index"):
            made = json.loads(content)
            for _ in range(pick.choice((1, 1, 2, 3))):
                made = changed(made, pick)
            return json.dumps(made).encode()
        return damaged(content, pick)

    def write(self, kind: str, content: bytes) -> Path:
        """A checkpoint with one file replaced; returns its folder."""
        base, name = _PLACES[kind]
        source = self.sound[base]
        for path in source.iterdir():
            if path.name not in self.files[base]:
                path.unlink()
        for file, data in self.files[base].items():
            if (source / file).read_bytes() != data:
                (source / file).write_bytes(data)
        if kind.startswith("header"):
            put(source / name, content, self.values)
        else:
            (source / name).write_bytes(content)
        return source


def digest(source: Path) -> str:
    """What became of a checkpoint: the name of an SQAError, or "converted". Anything else is raised."""
    try:
        plan = make_plan(open_source(str(source)), REQUEST)
        assert plan.nbytes < 2**40
        convert(source, 8, 4, method="mean", calibration=None)
    except SQAError as error:
        assert len(str(error)) < 2000, len(str(error))
        return type(error).__name__
    return "converted"


def fuzz(inputs: int, seed: int, most_seconds: float = 2.0) -> dict[str, Any]:
    """Random inputs of every kind; what became of them, and whatever escaped."""
    became: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    escaped: dict[str, str] = {}
    slowest = 0.0
    folder = Path(tempfile.mkdtemp())
    try:
        checkpoints = Checkpoints(folder)
        for i in range(inputs):
            kind = KINDS[i % len(KINDS)]
            source = checkpoints.write(kind, checkpoints.mutated(kind, random.Random(f"{seed} {i}")))
            start = time.perf_counter()
            try:
                became[kind][digest(source)] += 1
            except Exception as error:
                escaped[f"{kind} {i}"] = f"{type(error).__name__}: {error}"[:300]
            taken = time.perf_counter() - start
            slowest = max(slowest, taken)
            if taken > most_seconds:
                escaped[f"{kind} {i}"] = f"{taken:.1f} s"
    finally:
        shutil.rmtree(folder)
    return {"became": became, "escaped": escaped, "slowest_s": round(slowest, 3)}
