"""Checkpoints made to do harm, and what the command has to make of each."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.families import family_of

GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 48, "n_head": 12, "n_layer": 2,
    "n_positions": 64, "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 20, "d_kv": 4, "num_heads": 12,
    "d_ff": 24, "num_layers": 2, "vocab_size": 61, "is_encoder_decoder": True, "decoder_start_token_id": 0,
}  # fmt: skip
CONFIGS = {"gpt2": GPT2, "t5": T5}
ATTENTION, OUTSIDE = "transformer.h.1.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"
SECRET = "what lies outside is nobody's business"
REFUSED, DONE = 3, 0
Place = Path
"""a folder that holds `source`, the checkpoint, `secret.txt`, which is not its own, and `canary` once code has run"""


@dataclass(frozen=True)
class Case:
    """A hostile checkpoint."""

    spoil: Callable[[Place], object]
    """makes a sound one hostile"""
    base: str = "gpt2"
    """a sound one: of CONFIGS, "bin", or "sample" with its tokenizer"""
    dry: int = REFUSED
    """exit code of a dry run"""
    full: int = REFUSED
    """of a conversion"""
    evaluated: int | None = None
    """of a conversion that is measured, where the tokenizer is what is hostile"""


def header_of(config: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A sound safetensors header and how many bytes follow it."""
    header, end = {}, 0
    for name, shape in family_of(config).required(config).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    return header, end


@cache
def values(size: int) -> bytes:
    """Numbers of a fixed seed."""
    generator = random.Random(0)
    return struct.pack(f"<{size // 4}f", *(generator.gauss(0, 0.3) for _ in range(size // 4)))


def put(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file, as is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def build(place: Place, base: str) -> Path:
    """Writes a sound checkpoint as `place/source`."""
    source = place / "source"
    (place / "secret.txt").write_text(SECRET)
    if base == "sample":
        shutil.copytree(SAMPLES / "gpt2", source)
        return source
    source.mkdir()
    config = CONFIGS["gpt2" if base == "bin" else base]
    (source / "config.json").write_text(json.dumps(config))
    header, size = header_of(config)
    put(source / "model.safetensors", header, values(size))
    if base == "bin":
        save_bin(place, {})
    return source


def save_bin(place: Place, extra: dict[Any, Any], **options: Any) -> None:
    import torch
    from safetensors.torch import load_file

    weights = place / "source" / "model.safetensors"
    if weights.exists():
        torch.save(load_file(weights), place / "sound.bin")
        weights.unlink()
    content = torch.load(place / "sound.bin", weights_only=True)
    torch.save(content | extra, place / "source" / "pytorch_model.bin", **options)


# Headers


def header(change: Callable[[dict[str, Any]], object], extra: int = 0) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        content, size = header_of(GPT2)
        change(content)
        put(place / "source" / "model.safetensors", content, values(size) + bytes(extra))

    return spoil


def entry(name: str = ATTENTION, **fields: Any) -> Callable[[Place], None]:
    return header(lambda content: content[name].update(fields))


def added(name: str, extra: int = 0, **fields: Any) -> Callable[[Place], None]:
    """One tensor more, at the end."""

    def change(content: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for e in content.values())
        content[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end + extra]} | fields

    return header(change, extra)


def raw(text: bytes, length: int | None = None) -> Callable[[Place], None]:
    return lambda place: put(place / "source" / "model.safetensors", text, bytes(64), length)


def with_text(change: Callable[[str], str]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        content, size = header_of(GPT2)
        put(place / "source" / "model.safetensors", change(json.dumps(content)).encode(), values(size))

    return spoil


def large_header(place: Place) -> None:
    path = place / "source" / "model.safetensors"
    path.write_bytes((99_000_000).to_bytes(8, "little"))
    os.truncate(path, 10**8)


def many(place: Place, count: int = 100_001) -> None:
    content, size = header_of(GPT2)
    content |= {f"x.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [size, size]} for i in range(count)}
    put(place / "source" / "model.safetensors", content, values(size))


def shift(content: dict[str, Any], by: int) -> None:
    """All of the tensors after the first, their bytes moved."""
    for found in list(content.values())[1:]:
        found["data_offsets"] = [n + by for n in found["data_offsets"]]


FIRST, SECOND = "transformer.wte.weight", "transformer.wpe.weight"
HEADERS = {
    "empty file": Case(lambda p: (p / "source" / "model.safetensors").write_bytes(b"")),
    "seven bytes": Case(lambda p: (p / "source" / "model.safetensors").write_bytes(b"\1" * 7)),
    "header of 2^63": Case(raw(b"{}", 2**63)),
    "header of -1": Case(raw(b"{}", 2**64 - 1)),
    "header beyond the file": Case(raw(b"{}", 1000)),
    "header of 0": Case(raw(b"{}", 0)),
    "header of 99 MB": Case(large_header),
    "header not UTF-8": Case(raw(b'{"\xff\xfe": 1}')),
    "header is a list": Case(raw(b"[]")),
    "header is a number": Case(raw(b"5")),
    "header nested deeply": Case(raw(b'{"a":' * 100_000)),
    "header with NaN": Case(with_text(lambda t: t.replace("61", "NaN", 1))),
    "duplicate names": Case(with_text(lambda t: t[:-1] + ", " + t[1:])),
    "duplicate fields": Case(with_text(lambda t: t.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F16"', 1))),
    "half a character in a name": Case(with_text(lambda t: t.replace("transformer.wte", "\\ud800", 1))),
    "name that steers the terminal": Case(added("\x1b]0;owned\x07\x1b[2J")),
    "name of two lines": Case(added("a\nerror: all is well")),
    "name of a megabyte": Case(added("x" * 10**6)),
    "no name": Case(added("")),
    "name that is a path": Case(added("../../secret.txt"), dry=DONE, full=DONE),
    "100,001 tensors": Case(many),
    "offsets negative": Case(entry(data_offsets=[-8, 0])),
    "offsets overlapping": Case(header(lambda h: h[SECOND].update(data_offsets=h[FIRST]["data_offsets"]))),
    "offsets with a hole": Case(header(lambda h: shift(h, 16), 16)),
    "offsets one byte off": Case(header(lambda h: shift(h, -1))),
    "offsets backwards": Case(header(lambda h: h[ATTENTION]["data_offsets"].reverse())),
    "offsets out of order": Case(header(lambda h: h.update({FIRST: h[SECOND], SECOND: h[FIRST]}))),
    "offsets beyond the file": Case(entry(data_offsets=[2**40, 2**40 + 4])),
    "offsets of 2^64": Case(entry(data_offsets=[2**64, 2**64 + 4])),
    "offsets are floats": Case(entry(data_offsets=[0.0, 1e3])),
    "offsets are text": Case(entry(data_offsets=["0", "4"])),
    "offsets are one number": Case(entry(data_offsets=[0])),
    "no offsets": Case(header(lambda h: h[ATTENTION].pop("data_offsets"))),
    "shape overflows": Case(entry(shape=[2**32, 2**32, 2**32])),
    "shape overflows beside a zero": Case(added("x", shape=[0, 2**62, 2**62])),
    "shape negative": Case(entry(shape=[-48, -144])),
    "shape of 2^64": Case(entry(shape=[2**64])),
    "shape is a float": Case(entry(shape=[48.0, 144])),
    "shape is text": Case(entry(shape="48,144")),
    "shape is null": Case(entry(shape=None)),
    "shape of a thousand dimensions": Case(added("x", 4, shape=[1] * 1000)),
    "shape of zeros": Case(header(lambda h: h[ATTENTION].update(shape=[0, 144]))),
    "shape without the bytes": Case(entry(shape=[480, 1440])),
    "dtype of 8 bits": Case(added("x", 1, dtype="F8_E4M3", shape=[1])),
    "weights of 8 bits": Case(entry(dtype="F8_E5M2", shape=[192, 144])),
    "dtype of 4 bits": Case(added("x", 1, dtype="F4", shape=[2])),
    "complex dtype": Case(added("x", 8, dtype="C64", shape=[1])),
    "unknown dtype": Case(entry(dtype="os.system")),
    "dtype is a number": Case(entry(dtype=5)),
    "dtype is null": Case(entry(dtype=None)),
    "dtype in small letters": Case(entry(dtype="f32")),
    "weights are bool": Case(entry(dtype="BOOL", shape=[192, 144])),
    "weights are integers": Case(entry(dtype="I32")),
    "entry is a list": Case(header(lambda h: h.update({ATTENTION: []}))),
    "metadata is no text": Case(header(lambda h: h.update(__metadata__={"format": [5]}))),
    "metadata is a tensor": Case(header(lambda h: h.update(__metadata__=h[ATTENTION]))),
    "truncated": Case(lambda p: os.truncate(p / "source" / "model.safetensors", 9000)),
    "bytes at the end": Case(header(lambda h: None, 64)),
    "a terabyte of nothing": Case(lambda p: os.truncate(p / "source" / "model.safetensors", 2**40)),
    "as if converted before": Case(added("transformer.h.0.attn.q_proj.weight", 4, shape=[1])),
    "NaN in the weights": Case(
        lambda p: put(p / "source" / "model.safetensors", header_of(GPT2)[0], b"\xff" * header_of(GPT2)[1]), dry=DONE
    ),
}


# Index

ONE = "all.safetensors"
"""what the weights are called that an index names"""


def index(weight_map: Any, spoil: Callable[[Path], object] = lambda source: None) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        (place / "source" / "model.safetensors").rename(place / "source" / ONE)  # which would be read before an index
        spoil(place / "source")
        content = {"metadata": {}, "weight_map": weight_map}
        (place / "source" / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def link(target: str, name: str) -> Callable[[Path], None]:
    def spoil(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(target)

    return spoil


def fifo(name: str) -> Callable[[Path], None]:
    def spoil(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        os.mkfifo(source / name)

    return spoil


def within(spoil: Callable[[Path], object]) -> Callable[[Place], object]:
    return lambda place: spoil(place / "source")


def moved_out(place: Place) -> None:
    (place / "source" / "model.safetensors").rename(place / "weights")
    link("../weights", "model.safetensors")(place / "source")


def twice(source: Path) -> None:
    shutil.copy(source / ONE, source / "b.safetensors")


def as_in_the_hub_cache(place: Place) -> None:
    """Not hostile: a snapshot's files are links to blobs beside it."""
    cache = place / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    for file in (place / "source").iterdir():
        target = cache / "blobs" / f"blob-{file.name}"
        file.rename(target)
        file.symlink_to(f"../../blobs/{target.name}")
    (place / "source").rename(cache / "snapshots" / ("0" * 40))
    (place / "source").symlink_to(cache / "snapshots" / ("0" * 40))


ALL = dict.fromkeys(header_of(GPT2)[0], ONE)
INDICES = {
    "index to ../": Case(index({"a": "../secret.txt"})),
    "index to an absolute path": Case(index({"a": "/etc/passwd"})),
    "index to ..": Case(index({"a": ".."})),
    "index to .": Case(index({"a": "."})),
    "index to nothing": Case(index({"a": ""})),
    "index to a list": Case(index({"a": [ONE]})),
    "index to null": Case(index({"a": None})),
    "index to a number": Case(index({"a": 2**70})),
    "index to a zero byte": Case(index({"a": "model\0.safetensors"})),
    "index to a name too long": Case(index({"a": "x" * 300 + ".safetensors"})),
    "index to a name of a megabyte": Case(index({"a": "x" * 10**6})),
    "index to half a character": Case(index({"a": "\ud800.safetensors"})),
    "index to a loop of links": Case(index({"a": "a.safetensors"}, link("a.safetensors", "a.safetensors"))),
    "index to a FIFO": Case(index({"a": "a.safetensors"}, fifo("a.safetensors"))),
    "index to a device": Case(index({"a": "a.safetensors"}, link("/dev/zero", "a.safetensors"))),
    "index to a folder": Case(index({"a": "a.safetensors"}, lambda s: (s / "a.safetensors").mkdir())),
    "index to a link outside": Case(index({"a": "a.safetensors"}, link("../secret.txt", "a.safetensors"))),
    "index to config.json": Case(index({"a": "config.json"})),
    "index to two kinds": Case(index({"a": ONE, "b": "b.bin"}, lambda s: (s / "b.bin").touch())),
    "index promises more": Case(index(ALL | {"more": ONE}), dry=DONE, full=DONE),  # as transformers takes it
    "one tensor in two files": Case(index(ALL | {"b": "b.safetensors"}, twice)),
    "index of 100,001 tensors": Case(index({f"x.{i}": ONE for i in range(100_001)})),
    "index of 100,001 files": Case(index({f"x.{i}": f"{i}.safetensors" for i in range(100_001)})),
    "weight_map is a list": Case(index([["a", "model.safetensors"]])),
    "weight_map is empty": Case(index({})),
    "index nested deeply": Case(
        lambda p: [
            index({})(p),
            (p / "source" / "model.safetensors.index.json").write_text('{"weight_map":' * 100_000),
        ]
    ),
    "index of 200 MB": Case(
        lambda p: [
            index(ALL)(p),
            os.truncate(p / "source" / "model.safetensors.index.json", 2 * 10**8),
        ]
    ),
    "index is a FIFO": Case(lambda p: [index(ALL)(p), fifo("model.safetensors.index.json")(p / "source")]),
    "index is a device": Case(
        lambda p: [index(ALL)(p), link("/dev/zero", "model.safetensors.index.json")(p / "source")]
    ),
    "weights are a FIFO": Case(within(fifo("model.safetensors"))),
    "weights are a device": Case(within(link("/dev/zero", "model.safetensors"))),
    "weights are a loop of links": Case(within(link("model.safetensors", "model.safetensors"))),
    "weights are a link outside": Case(moved_out, dry=DONE, full=DONE),
    "snapshot of the hub's cache": Case(as_in_the_hub_cache, dry=DONE, full=DONE),
}


# Config


def config(**changes: Any) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place / "source" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def config_text(change: Callable[[str], str | bytes]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place / "source" / "config.json"
        text = change(path.read_text())
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def appended(text: str) -> Callable[[Place], None]:
    """One more entry, of JSON that Python would not write."""
    return config_text(lambda old: f"{old[:-1]}, {text}}}")


def code(place: Place) -> None:
    """Python files that leave a canary when they are run, beside a config that asks for them."""
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "configuration_evil.py"):
        (place / "source" / name).write_text(f"open({str(place / 'canary')!r}, 'w')\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config(
        auto_map=dict.fromkeys(classes, "evil.Evil"),
        custom_pipelines={"text-generation": {"impl": "evil.Evil", "pt": ["AutoModelForCausalLM"]}},
    )(place)


T5_CONFIG = partial(Case, base="t5")
CONFIGURATIONS = {
    "config of 200 MB": Case(lambda p: os.truncate(p / "source" / "config.json", 2 * 10**8)),
    "config of 15 MB of lists": Case(appended('"x": [' + "[]," * 5_000_000 + "[]]")),
    "config of a megabyte of lists": Case(appended('"x": [' + "[]," * 330_000 + "[]]"), dry=DONE, full=DONE),
    "config nested deeply": Case(appended('"x": ' + "[" * 100_000 + "]" * 100_000)),
    "config is a FIFO": Case(within(fifo("config.json"))),
    "config is a device": Case(within(link("/dev/zero", "config.json"))),
    "config is a loop of links": Case(within(link("config.json", "config.json"))),
    "config is a link outside": Case(within(link("../secret.txt", "config.json"))),
    "config is a folder": Case(lambda p: [(p / "source/config.json").unlink(), (p / "source/config.json").mkdir()]),
    "config is empty": Case(config_text(lambda old: "")),
    "config is not UTF-8": Case(config_text(lambda old: old.encode("utf-16"))),
    "config is a list": Case(config_text(lambda old: f"[{old}]")),
    "config with NaN": Case(appended('"layer_norm_epsilon": NaN')),
    "config with Infinity": Case(appended('"x": -Infinity')),
    "config with 1e999": Case(appended('"layer_norm_epsilon": 1e999')),
    "config with 1e999 in what nobody reads": Case(appended('"x": {"y": [-1e999]}')),
    "config with an int of 5,000 digits": Case(appended('"x": 1' + "0" * 5000)),
    "config with half a character": Case(appended('"x": "\\ud800"')),
    "config with half a character as key": Case(appended('"\\udfff": 1')),
    "n_layer of 10^9": Case(config(n_layer=10**9)),
    "n_layer of 1,999": Case(config(n_layer=1999)),
    "n_head of 10^18": Case(config(n_head=10**18, n_embd=10**18)),
    "n_head of 10^7": Case(config(n_head=10**7, n_embd=10**7)),
    "n_embd of 4,000 digits": Case(appended('"n_embd": 12' + "0" * 4000)),
    "n_embd of 10^12": Case(config(n_embd=12 * 10**12)),
    "n_positions of 10^30": Case(config(n_positions=10**30)),
    "n_inner of 0": Case(config(n_inner=0)),
    "vocab_size of -1": Case(config(vocab_size=-1)),
    "vocab_size is true": Case(config(vocab_size=True)),
    "n_head is true": Case(config(n_head=True)),
    "n_layer is text": Case(config(n_layer="2")),
    "n_layer is 2.0": Case(config(n_layer=2.0)),
    "n_layer is a list": Case(config(n_layer=[2] * 10**6)),
    "n_layer is null": Case(config(n_layer=None)),
    "num_labels of 10^9": Case(config(num_labels=10**9)),
    "num_labels is text": Case(config(num_labels="many")),
    "id2label is text": Case(config(id2label="x" * 1000), dry=DONE),
    "model_type of another": Case(config(model_type="llama")),
    "model_type is a list": Case(config(model_type=["gpt2"] * 10**5)),
    "model_type of a megabyte": Case(config(model_type="gpt2" * 250_000)),
    "model_type steers the terminal": Case(config(model_type="gpt2\x1b[31m")),
    "model_type t5 with gpt2 weights": Case(config_text(lambda old: json.dumps(T5))),
    "model_type gpt2 with t5 weights": T5_CONFIG(config_text(lambda old: json.dumps(GPT2))),
    "model_type mt5 of a gpt2": Case(config(model_type="mt5")),
    "architectures of another": Case(config(architectures=["LlamaForCausalLM"])),
    "architectures of a megabyte": Case(config(architectures=["x" * 10**6])),
    "architectures is a table": Case(config(architectures={"GPT2LMHeadModel": 1})),
    "architectures holds numbers": Case(config(architectures=[1] * 10**6)),
    "architecture of t5": Case(config(architectures=["T5ForConditionalGeneration"])),
    "encoder-decoder gpt2": Case(config(is_encoder_decoder=True), dry=DONE, full=DONE),
    "activation of os.system": Case(config(activation_function="os.system"), dry=DONE),
    "epsilon is text": Case(config(layer_norm_epsilon="0"), dry=DONE),
    "dropout of 7": Case(config(resid_pdrop=7.0), dry=DONE),
    "dtype of os.system": Case(config(dtype="os.system", torch_dtype="os.system"), dry=DONE),
    "dtype is false": Case(config(dtype=False), dry=DONE),
    "dtype of a class": Case(config(dtype="device"), dry=DONE),
    "dtype of integers": Case(config(dtype="int8"), dry=DONE),
    "attention from the hub": Case(config(_attn_implementation="evil/kernel", attn_implementation="evil/kernel")),
    "weights of another name": Case(config(transformers_weights="../secret.safetensors")),
    "quantized": Case(config(quantization_config={"quant_method": "gptq"})),
    "config that is its own method": Case(config(to_dict=5, __class__="x"), dry=DONE),
    "auto_map with code": Case(code, dry=DONE, full=DONE),
    "heads of a t5 10^18": T5_CONFIG(config(num_heads=10**18)),
    "decoder of 10^9 layers": T5_CONFIG(config(num_decoder_layers=10**9)),
    "d_kv of 0": T5_CONFIG(config(d_kv=0)),
    "max_distance is text": T5_CONFIG(config(relative_attention_max_distance="far")),
    "max_distance of 16": T5_CONFIG(config(relative_attention_max_distance=16)),
    "max_distance of -1": T5_CONFIG(config(relative_attention_max_distance=-1)),
    "buckets of 10^12": T5_CONFIG(config(relative_attention_num_buckets=10**12)),
    "feed_forward_proj is a list": T5_CONFIG(config(feed_forward_proj=["relu"]), dry=DONE),
}


# Pickles


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touch(place: Place) -> Call:
    return Call(os.system, f"touch {place / 'canary'}")


def archive(
    pickled: bytes, method: int = zipfile.ZIP_STORED, before: bytes = b"", **more: bytes
) -> Callable[[Place], None]:
    """A zip file as torch.save makes it, around any pickle."""

    def spoil(place: Place) -> None:
        (place / "source" / "model.safetensors").unlink(missing_ok=True)
        path = place / "source" / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w", method) as file:
            if before:
                file.writestr("archive/data.PKL", before)
            file.writestr("archive/data.pkl", pickled)
            file.writestr("archive/byteorder", "little", zipfile.ZIP_STORED)
            file.writestr("archive/data/0", bytes(64), zipfile.ZIP_STORED)
            file.writestr("archive/version", "3\n", zipfile.ZIP_STORED)
            for name, content in more.items():
                file.writestr(f"archive/{name.replace('_', '.')}", content)

    return spoil


def legacy(pickled: bytes) -> Callable[[Place], None]:
    """A file as torch.save once made it, around any pickle."""

    def spoil(place: Place) -> None:
        (place / "source" / "model.safetensors").unlink(missing_ok=True)
        magic = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
        start = b"".join(pickle.dumps(part, 2) for part in magic)
        (place / "source" / "pytorch_model.bin").write_bytes(start + pickled + pickle.dumps([], 2))

    return spoil


def file_of(content: bytes) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        (place / "source" / "model.safetensors").unlink(missing_ok=True)
        (place / "source" / "pytorch_model.bin").write_bytes(content)

    return spoil


def tensors(make: Callable[[Any], dict[Any, Any]], **options: Any) -> Callable[[Place], None]:
    """What torch, which it is given, makes, beside the weights."""

    def spoil(place: Place) -> None:
        import torch

        save_bin(place, make(torch), **options)

    return spoil


def tar(mode: str) -> bytes:
    file = io.BytesIO()
    inner = b"x" * 1000
    with tarfile.open(fileobj=file, mode=f"w:{mode}") as made:
        for name in ("storages", "tensors", "pickle", "../../canary"):
            info = tarfile.TarInfo(name)
            info.size = len(inner)
            made.addfile(info, io.BytesIO(inner))
    return file.getvalue()


def tar_and_pickle(place: Place) -> None:
    """A pickle that is a tar file too, whose first header speaks of gigabytes."""
    magic = (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])
    info = tarfile.TarInfo()
    info.type, info.size = tarfile.XHDTYPE, 2**32
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    pickles = b"".join(pickle.dumps(part, 2) for part in magic)
    block[: len(pickles)] = pickles
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    file_of(bytes(block))(place)
    os.truncate(place / "source" / "pytorch_model.bin", 2**32 + 1024)


def two_directories(place: Place) -> None:
    """A zip file in which two readers find two directories."""
    archive(pickle.dumps({}, 2))(place)
    path = place / "source" / "pytorch_model.bin"
    sound = path.read_bytes()
    archive(pickle.dumps({"x": touch(place)}, 2))(place)
    path.write_bytes(path.read_bytes()[:-22] + sound)


def stretched(path: Path, size: int) -> None:
    """The last entry of a zip file becomes that large, of nothing that takes room on the disk."""
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    tail = bytearray(data[directory:])
    last = tail.rindex(b"PK\x01\x02")
    tail[last + 20 : last + 28] = struct.pack("<II", size - 1, size - 1)
    end = tail.rindex(b"PK\x05\x06")
    tail[end + 16 : end + 20] = struct.pack("<I", min(directory + size - 1, 2**32 - 1))
    os.truncate(path, directory)
    os.truncate(path, directory + size - 1)
    with path.open("ab") as file:
        file.write(tail)


def laughs(levels: int = 60) -> bytes:
    """A tuple of two references to a tuple of two references to …, as a key."""
    made = b"\x80\x02}(" + b")q\x00"
    for i in range(levels):
        made += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    return made + b"K\x01u."


def nested_lists(levels: int = 60) -> bytes:
    """Lists of two references each, called as a function, which an error message would write out."""
    made = b"\x80\x02]q\x00"
    for i in range(levels):
        made += b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e"
    return made + b")R."


EVIL = b"cposix\nsystem\n(X\x05\x00\x00\x00falsetR."
BYTES = b"\x80\x02c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR."  # two gigabytes
PICKLES = {
    "pickle with code": Case(lambda p: file_of(pickle.dumps({"x": touch(p)}, 2))(p)),
    "old file with code": Case(lambda p: legacy(pickle.dumps({"x": touch(p)}, 2))(p)),
    "zip file with code": Case(lambda p: archive(pickle.dumps({"x": touch(p)}, 2))(p)),
    "code of protocol 4": Case(lambda p: archive(pickle.dumps({"x": touch(p)}, 4))(p)),
    "code in another case": Case(lambda p: archive(pickle.dumps({}, 2), before=pickle.dumps({"x": touch(p)}, 2))(p)),
    "code beside weights": Case(lambda p: save_bin(p, {"x": touch(p)}), "bin"),
    "builtins": Case(lambda p: archive(pickle.dumps({"x": Call(eval, f"open({str(p / 'canary')!r}, 'w')")}, 2))(p)),
    "zip file with two directories": Case(two_directories),
    "zip bomb": Case(archive(b"\x80\x02}." + bytes(10**9), zipfile.ZIP_DEFLATED)),
    "compressed weights": Case(archive(b"\x80\x02}.", data_1=bytes(1000), method=zipfile.ZIP_DEFLATED)),
    "lzma": Case(archive(b"\x80\x02}.", zipfile.ZIP_LZMA)),
    "pickle of 2 GB": Case(
        lambda p: [
            archive(b"\x80\x02}.", **{"data/data_pkl": b""})(p),
            stretched(p / "source/pytorch_model.bin", 2**31),
        ]
    ),
    "TorchScript": Case(archive(b"\x80\x02}.", constants_pkl=b"\x80\x02).")),
    "another protocol": Case(archive(b"\x80\x03}.")),
    "zip file cut off": Case(lambda p: [archive(b"\x80\x02}.")(p), os.truncate(p / "source/pytorch_model.bin", 300)]),
    "zip file without a pickle": Case(archive(b"")),
    "tar": Case(file_of(tar(""))),
    "compressed tar": Case(file_of(tar("gz"))),
    "tar that is a pickle": Case(tar_and_pickle),
    "empty .bin": Case(file_of(b"")),
    "noise": Case(file_of(random.Random(0).randbytes(100_000))),
    "no end": Case(legacy(b"\x80\x02" + b"(" * 10**6)),
    "two million steps": Case(legacy(b"\x80\x02}" + b"}0" * 10**6 + b".")),
    "two gigabytes by one call": Case(archive(BYTES)),
    "two gigabytes by one call, old": Case(legacy(BYTES)),
    "a key that doubles": Case(archive(laughs())),
    "a key nested deeply": Case(archive(b"\x80\x02})" + b"\x85" * 900_000 + b"K\x01s.")),
    "a function that doubles": Case(archive(nested_lists())),
    "an int of two million digits": Case(
        archive(b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".")
    ),
    "memo of 2^31": Case(archive(b"\x80\x02}r\xff\xff\xff\x7f.")),
    "nothing on the stack": Case(archive(b"\x80\x02R.")),
    "text of 4 GB": Case(legacy(b"\x80\x02X\xff\xff\xff\xffabc")),
    "tensors without numbers": Case(tensors(lambda torch: {"x": torch.empty(10**9, device="meta")}), "bin"),
    "one number for a billion": Case(tensors(lambda torch: {"x": torch.ones(1).expand(10**9)}), "bin"),
    "sparse": Case(tensors(lambda torch: {"x": torch.ones(3).to_sparse()}), "bin"),
    "8 bits": Case(tensors(lambda torch: {"x": torch.ones(3).to(torch.float8_e5m2)}), "bin"),
    "name of the metadata": Case(tensors(lambda torch: {"__metadata__": torch.ones(2)}), "bin"),
    "half a character in a .bin": Case(tensors(lambda torch: {"\ud800": torch.ones(2)}), "bin"),
    "a number for a name": Case(tensors(lambda torch: {5: torch.ones(2)}), "bin"),
    "a sound .bin": Case(tensors(lambda torch: {}), "bin", dry=DONE, full=DONE),
    "a sound old .bin": Case(
        tensors(lambda torch: {}, _use_new_zipfile_serialization=False), "bin", dry=DONE, full=DONE
    ),
    "parameters": Case(tensors(lambda torch: {"x": torch.nn.Parameter(torch.ones(2))}), "bin", dry=DONE, full=DONE),
    ".bin is a FIFO": Case(within(lambda s: [(s / "model.safetensors").unlink(), fifo("pytorch_model.bin")(s)])),
    ".bin is a device": Case(
        within(lambda s: [(s / "model.safetensors").unlink(), link("/dev/zero", "pytorch_model.bin")(s)])
    ),
}


# What is carried over, and tokenizers


def text(name: str, content: str | bytes) -> Callable[[Place], None]:
    return lambda place: (place / "source" / name).write_bytes(  # type: ignore[return-value]
        content if isinstance(content, bytes) else content.encode()
    )


def tokenizer(change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place / "source" / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def settings(**changes: Any) -> Callable[[Place], None]:
    return tokenizer(lambda content: content.update(changes), "tokenizer_config.json")


def tokenizer_code(place: Place) -> None:
    code(place)
    settings(auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]}, tokenizer_class="Evil")(place)


def long_vocabulary(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {word: 2**32 - 1 - i for word, i in content["model"]["vocab"].items()}


Tokenizer = partial(Case, base="sample", dry=DONE, full=DONE, evaluated=REFUSED)
CARRIED = {
    "licence is a link outside": Case(within(link("../secret.txt", "LICENSE"))),
    "licence is a FIFO": Case(within(fifo("LICENSE"))),
    "tokenizer is a link outside": Case(within(link("../secret.txt", "tokenizer.json")), evaluated=REFUSED),
    "tokenizer is a FIFO": Case(within(fifo("tokenizer.json")), evaluated=REFUSED),
    "tokenizer is a device": Case(within(link("/dev/zero", "tokenizer.json")), evaluated=REFUSED),
    "tokenizer of 200 MB": Case(
        lambda p: [text("tokenizer.json", "{}")(p), os.truncate(p / "source/tokenizer.json", 2 * 10**8)]
    ),
    "settings of the tokenizer are a list": Case(text("tokenizer_config.json", "[]"), dry=DONE, full=DONE),
    "settings of the tokenizer nested deeply": Case(
        text("tokenizer_config.json", '{"a":' * 100_000), dry=DONE, full=DONE
    ),
    "settings of generation are a FIFO": Case(within(fifo("generation_config.json"))),
    "tokenizer with code": Tokenizer(tokenizer_code, evaluated=DONE),
    "tokenizer of no JSON": Tokenizer(text("tokenizer.json", "{")),
    "tokenizer of nothing": Tokenizer(text("tokenizer.json", "{}")),
    "tokenizer of 18 MB of lists": Case(text("tokenizer.json", "[" + "[]," * 5_900_000 + "[]]"), evaluated=REFUSED),
    "tokenizer of 18 MB of words": Tokenizer(text("tokenizer.json", json.dumps({f"{i}": i for i in range(1_000_000)}))),
    "tokenizer nested deeply": Tokenizer(text("tokenizer.json", "[" * 10**6)),
    "tokenizer of noise": Tokenizer(text("tokenizer.json", random.Random(0).randbytes(10**6))),
    "tokenizer with ids of 2^32": Tokenizer(tokenizer(long_vocabulary)),
    "tokenizer of another model": Tokenizer(tokenizer(lambda c: c["model"].update(type="Evil"))),
    "tokenizer without its merges": Tokenizer(tokenizer(lambda c: c["model"].update(merges=[["a", "nowhere"]]))),
    "tokenizer that adds tokens at 2^32": Tokenizer(
        tokenizer(lambda c: c.update(added_tokens=[{"id": 2**32 - 1, "content": "the", "special": False}]))
    ),
    "tokenizer of a file outside": Tokenizer(
        settings(vocab_file="/dev/zero", tokenizer_file="/dev/zero", merges_file="/dev/zero"), evaluated=DONE
    ),
    "tokenizer_class of os.system": Tokenizer(settings(tokenizer_class="os.system"), evaluated=None),
    "tokenizer_class is a number": Tokenizer(settings(tokenizer_class=5)),
    "chat template with code": Tokenizer(
        settings(chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"), evaluated=DONE
    ),
}
CATALOGUE: dict[str, Case] = HEADERS | INDICES | CONFIGURATIONS | PICKLES | CARRIED
