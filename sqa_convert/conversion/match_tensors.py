"""Which tensors of a source are the model's, by the family's names; copies are told from tensors of their own.

Needs no weights. Checkpoints of the same model differ: in the names of tied weights, in biases that are left out, in
heads that were trained beside the language model's.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from ..checkpoints.dtypes import DTYPES, FLOATING
from ..checkpoints.in_memory import ModelSource
from ..checkpoints.source import Source, TensorInfo
from ..errors import CheckpointError, UnsupportedModelError
from ..families import Family

_SHOWN = 4  # names in a sentence


@dataclass(frozen=True)
class Stored:
    """The tensors of a source by their canonical names."""

    names: dict[str, str]
    """canonical name -> name in the source, without copies"""
    infos: dict[str, TensorInfo]
    """of these and of `zeros`"""
    zeros: dict[str, TensorInfo]
    """biases that the source does without"""
    copies: tuple[tuple[str, str], ...]
    """pairs of names in the source that must hold the same numbers; only the first of each is in `names`"""
    others: frozenset[str]
    """names of what is no part of the model, such as further heads"""
    notes: tuple[str, ...]


def stored_tensors(family: Family, source: Source) -> Stored:
    """The model's tensors in a source.

    Raises:
        CheckpointError: config and weights disagree.
        UnsupportedModelError: a model in memory computes with more than transformers' class has.
    """
    required = family.required(source.config)
    names, copies = _without_copies(family, source, _canonical_names(family, source), required)
    for twin, name in source.twins.items():
        if (canonical := family.canonical(twin)) in required and canonical is not None:
            names.setdefault(canonical, name)
    zeros = _absent_biases(family, source, names, required)
    own_head = {name: shape for name, shape in family.optional(source.config).items() if name in names}
    for name, shape in (required | own_head).items():
        if name not in zeros:
            _check(family, source, names, name, shape)
    for name, info in source.index.items():
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{source.name}: {name} is {info.dtype}, which is not supported")
    others = frozenset(names.keys() - required.keys() - own_head.keys())
    _check_layers(source, others, required.keys() | own_head.keys())
    notes = []
    if own_class := family.own_class(source.config):
        taken = family.source_architecture(source.config)
        notes.append(f"{own_class} is none of transformers' classes: taken for the {taken} that its weights are")
    if zeros:
        biases = dict.fromkeys(str(family.bias_group(name)) for name in zeros)
        notes.append(f"the source has no {_listing(biases)}: they are zeros, as transformers takes them")
    if others:
        notes.append(f"no part of the model, carried over as they are and never trained: {_listing(sorted(others))}")
    infos = {name: source.index[stored_name] for name, stored_name in names.items()} | zeros
    return Stored(names, infos, zeros, copies, others, tuple(notes))


def _check_layers(source: Source, others: Iterable[str], known: Iterable[str]) -> None:
    """Raises UnsupportedModelError where a layer of a model in memory has tensors that transformers' class has not.

    They take part in what it computes. Those of a file do not: transformers leaves them out, too.
    """
    if not isinstance(source, ModelSource):
        return
    layers = tuple({f"{name.rpartition('.')[0]}." for name in known})
    for name in sorted(others):
        if name.startswith(layers):
            raise UnsupportedModelError(
                f"{source.name}: {name} belongs to a layer that transformers' class has without it; a result would "
                "compute something else. Merge what was added into the layer's weights, or take it out"
            )


def _listing(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _canonical_names(family: Family, source: Source) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in source.index:
        canonical = family.canonical(name)
        if canonical is None:
            continue
        if canonical in names:
            raise CheckpointError(f"{source.name}: {names[canonical]} and {name} are the same tensor")
        names[canonical] = name
    return names


def _without_copies(
    family: Family, source: Source, names: dict[str, str], required: Container[str]
) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """One name for each group of tied tensors, whichever the source stores; and the pairs that must be equal."""
    copies = []
    separate = family.separate(source.config)
    for copy, original in family.tied(source.config).items():
        if copy not in names:
            continue
        if original not in names and copy not in required:
            names = {original if name == copy else name: stored for name, stored in names.items()}
        elif original in names and copy not in separate:
            pair = names[original], names.pop(copy)
            sizes = [list(source.index[name].shape) for name in pair]
            if sizes[0] != sizes[1]:
                raise CheckpointError(
                    f"{source.name}: {pair[1]} has shape {sizes[1]} and {pair[0]} {sizes[0]}, where config.json says "
                    "that they are one tensor (tie_word_embeddings)"
                )
            copies.append(pair)
    return names, tuple(copies)


def _absent_biases(
    family: Family, source: Source, names: Mapping[str, str], required: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    """Biases of a group that the source has none of, as zeros in the dtype of the weights beside them."""
    groups: dict[str, list[str]] = {}
    for name in required:
        if group := family.bias_group(name):
            groups.setdefault(group, []).append(name)
    zeros = {}
    for members in groups.values():
        if not any(name in names for name in members):
            for name in members:
                weight = names.get(name.removesuffix("bias") + "weight")
                if weight is not None:  # else that is what is missing
                    zeros[name] = TensorInfo(required[name], source.index[weight].dtype, "")
    return zeros


def _check(family: Family, source: Source, names: Mapping[str, str], name: str, shape: tuple[int, ...]) -> None:
    if name not in names:
        wrapped = next((stored for stored in source.index if stored.endswith(f".{name}")), None)
        hint = "" if wrapped is None else f"; there is {wrapped}: save the model without what it is wrapped in"
        hint += "".join(f"; {note}" for note in source.notes)
        raise CheckpointError(f"{source.name}: tensor {name} is missing, which config.json calls for{hint}")
    info = source.index[names[name]]
    if info.shape != shape:
        hint = ", the other way round" if info.shape == shape[::-1] else family.hint(name, info.shape, source.config)
        raise CheckpointError(
            f"{source.name}: {names[name]} has shape {list(info.shape)}, config.json calls for {list(shape)}{hint}"
        )
    if info.dtype not in FLOATING:
        raise CheckpointError(f"{source.name}: {names[name]} is {info.dtype}; weights must be {', '.join(FLOATING)}")
