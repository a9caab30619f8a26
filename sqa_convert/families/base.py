"""What a family of checkpoints tells of itself: its names, its shapes, and how one attention site is stored.

Nothing here or in a family's tables imports torch, so that a plan can be made from headers alone.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UnsupportedModelError, one_line, shown
from ..heads.weights import AttentionHeads

if TYPE_CHECKING:
    from ..checkpoints.dtypes import Array
    from ..heads.attend import Attention

_NOT_CARRIED = ("_name_or_path", "transformers_version", "auto_map", "custom_pipelines", "return_dict")
"""of config.json: what the source says of its own files and code, and tuples as outputs, which no longer work"""

_OTHER_TASK = re.compile(r"(Classification|QuestionAnswering|MultipleChoice|Forecasting)$")
"""of a class's name that no library knows: it has a head other than a language model's"""

MOST_LAYERS, MOST_HEADS, MOST_LABELS = 2_000, 4_096, 100_000
"""beyond any model there is; larger ones would fill the memory before a weight is looked for"""

Shape = tuple[int, ...]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Site:
    """One attention of one layer."""

    kind: str
    """"encoder", "decoder" (causal self-attention) or "cross" """
    layer: int
    prefix: str
    """of its tensor names, in source and result"""


@dataclass(frozen=True)
class Written:
    """One tensor that a converted site consists of."""

    shape: Shape
    like: str
    """the source tensor whose dtype it keeps"""


@dataclass(frozen=True)
class Dimensions:
    """Sizes that plan and report need."""

    heads: int
    head_dim: int
    width: int
    """D, the model width"""
    context: int
    """tokens: the longest input the model knows, or its usual training length"""


class Family(ABC):
    """A model family. A new one is one subclass here and its two files in `models/`."""

    model_types: ClassVar[tuple[str, ...]]
    """config.json's `model_type` of the sources"""
    site_kinds: ClassVar[tuple[str, ...]]
    model_files: ClassVar[tuple[str, ...]]
    """in `models/`, shipped with every result"""
    auto_map: ClassVar[Mapping[str, str]]
    """Auto class -> "file.Class" """
    sentence_layer: ClassVar[str] = ""
    """the "file.Class" that sentence-transformers loads a result by; "" where its own does"""
    tokenizer_class: ClassVar[str]
    """of sources that do not name theirs"""
    architectures: ClassVar[Mapping[str, str]]
    """class of the source -> our class; the first is assumed where a config names none, or one of its author's own"""
    attributes: ClassVar[Mapping[str, str]]
    """keys of config.json that are read, and the name transformers knows each by as well; "" where it has no other"""
    untied: ClassVar[str] = '"tie_word_embeddings": false'
    """what a config.json has to say of a head that is not the embeddings"""

    def has_language_model_head(self, config: Config) -> bool:
        """Whether loss and KL can be measured."""
        architecture = self.architectures[self.source_architecture(config)]
        return architecture.endswith(("ForCausalLM", "ForConditionalGeneration"))

    def check(self, config: Config) -> None:
        """Raises UnsupportedModelError when this family's converter cannot take the model."""
        named = config.get("architectures")
        if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
            raise UnsupportedModelError(f"config.json: architectures is {shown(named)}, not a list of class names")
        if config.get("quantization_config"):
            raise UnsupportedModelError("quantized checkpoints are not supported; give the original weights")
        for key, value in config.items():
            if key.endswith(("_implementation", "_implementation_internal")) and "/" in str(value):
                raise UnsupportedModelError(
                    f"config.json: {shown(key)} {shown(value)} is code on the hub; leave it out"
                )
        if config.get("transformers_weights") is not None:
            raise UnsupportedModelError("config.json: transformers_weights names other weights; leave it out")
        integers(config, ("num_labels",), "/".join(self.model_types), optional=True, least=0, most=MOST_LABELS)
        architecture = self.source_architecture(config)
        if architecture not in self.architectures:
            known = f"{'/'.join(self.model_types)}: {', '.join(self.architectures)}"
            raise UnsupportedModelError(f"{shown(architecture)} is not supported; of {known}")

    def source_architecture(self, config: Config) -> str:
        """The class of transformers that loads the source; for one that it does not know, the family's first."""
        return next(iter(self.architectures)) if self.own_class(config) else self._named(config)

    def own_class(self, config: Config) -> str | None:
        """The class that a config names, where that is its author's and not one of transformers; else None."""
        name = self._named(config)
        if name in self.architectures or _OTHER_TASK.search(name):
            return None
        return None if _in_transformers(name) else name

    def _named(self, config: Config) -> str:
        names = config.get("architectures") or [next(iter(self.architectures))]
        return str(names[0])

    def completed(self, config: Config) -> Config:
        """config.json by the family's own names, completed as transformers' class completes it.

        To load that class takes longer than a plan, so it is asked only where the file has other names, or lacks some.

        Raises:
            UnsupportedModelError: the class refuses the file.
        """
        aliases = {alias: key for key, alias in self.attributes.items() if alias in config}
        missing = {*aliases.values(), *(key for key in self.attributes if key not in config)}
        if not missing:
            return config
        from transformers import CONFIG_MAPPING

        try:
            given = {key: config[key] for key in (*self.attributes, *aliases) if key in config}
            complete = CONFIG_MAPPING[config["model_type"]].from_dict(given)
        except Exception as error:  # validation fails in several ways
            raise UnsupportedModelError(f"config.json is not what transformers reads: {one_line(error)}") from error
        own = {key: value for key, value in config.items() if key not in aliases}
        return own | {key: getattr(complete, key) for key in missing}

    @abstractmethod
    def dimensions(self, config: Config) -> Dimensions: ...

    @abstractmethod
    def sites(self, config: Config) -> list[Site]: ...

    @abstractmethod
    def canonical(self, name: str) -> str | None:
        """The name a source tensor has in the result, or None for one that is left out."""

    @abstractmethod
    def required(self, config: Config) -> dict[str, Shape]:
        """Canonical name and shape of every tensor of the model, without copies and what `optional` names."""

    def optional(self, config: Config) -> dict[str, Shape]:
        """Canonical name and shape of tensors that the model has, and a source need not store."""
        return {}

    def bias_group(self, name: str) -> str | None:
        """The name of a bias without its layer, as users read it; None for every other tensor.

        Where a source has none of a group they are zeros.
        """
        return None

    def hint(self, name: str, stored: Shape, config: Config) -> str:
        """What to add about a tensor whose shape is not what config.json calls for."""
        return ""

    @abstractmethod
    def tied(self, config: Config) -> Mapping[str, str]:
        """Canonical names that are copies, each with that of the tensor it is a copy of. Either may be stored."""

    def separate(self, config: Config) -> frozenset[str]:
        """Of `tied`, the names that may also hold numbers of their own."""
        return frozenset()

    @abstractmethod
    def consumed(self, site: Site) -> list[str]:
        """Canonical names of the source tensors that `read` replaces."""

    @abstractmethod
    def read(self, site: Site, get: Callable[[str], Array], dimensions: Dimensions) -> AttentionHeads[Array]:
        """The site's weights in the canonical layout; `get` takes a canonical name."""

    @abstractmethod
    def attention(self, site: Site, config: Config) -> Attention:
        """How the site attends."""

    @abstractmethod
    def norms(self, site: Site) -> tuple[str, str]:
        """Canonical prefixes of the norms that the inputs of queries, and of keys and values, come from."""

    @abstractmethod
    def write(self, site: Site, heads: AttentionHeads[Array]) -> dict[str, Array]:
        """The tensors of the converted site."""

    @abstractmethod
    def written(self, site: Site, config: Config, q_heads: int, kv_heads: int) -> dict[str, Written]:
        """Names, shapes and dtypes of what `write` returns, known before any weight is read."""

    @abstractmethod
    def result_config(self, config: Config, heads: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        """config.json of the result but for provenance; `heads` holds (Hq, Hkv) of every site kind, of its
        layers the mean, rounded."""

    def uneven_config(self, heads: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, Any]:
        """What config.json of a result says besides where layers of a kind differ.

        Args:
            heads: (Hq, Hkv) of every layer of each site kind.

        Raises:
            UnsupportedModelError: the family's models have the same numbers of heads in all layers.
        """
        raise UnsupportedModelError(
            f"{'/'.join(self.model_types)}: all layers of a kind must keep the same numbers of heads"
        )

    def common_config(self, config: Config, model_type: str) -> dict[str, Any]:
        """The entries every result has."""
        carried = {k: v for k, v in config.items() if k not in _NOT_CARRIED}
        source = self.source_architecture(config)
        auto_map = dict(self.auto_map)
        if source.endswith("EncoderModel"):
            encoder = auto_map["AutoModelForTextEncoding"]
            auto_map = {"AutoConfig": auto_map["AutoConfig"], "AutoModel": encoder, "AutoModelForTextEncoding": encoder}
        return carried | {"model_type": model_type, "architectures": [self.architectures[source]], "auto_map": auto_map}


@cache
def _in_transformers(name: str) -> bool:
    """Whether transformers has something of that name. Loads none of its classes, and takes half a second."""
    import transformers

    return name in dir(transformers)


def labels(config: Config) -> int:
    """How many a classifier tells apart, as transformers reads it."""
    named = config.get("id2label")
    return config.get("num_labels") or (len(named) if isinstance(named, Mapping) else 0) or 2


def mean_counts(heads: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Mean query heads and mean key/value heads of the layers, rounded: of heads that are shared out what was asked."""
    return round(fmean(q for q, _ in heads)), max(1, round(fmean(kv for _, kv in heads)))


def uneven_kinds(heads: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[list[int]]]:
    """Of (Hq, Hkv) of every layer those of the kinds whose layers differ, as config.json holds them."""
    return {kind: [list(counts) for counts in layers] for kind, layers in heads.items() if len(set(layers)) > 1}


def join_heads(weights: Array) -> Array:
    """(heads, d, D) -> (heads * d, D), the weight of a Linear that makes the heads."""
    return weights.reshape(-1, weights.shape[-1])


def split_heads(weight: Array, head_dim: int) -> Array:
    """(heads * d, D) -> (heads, d, D)"""
    return weight.reshape(-1, head_dim, weight.shape[-1])


def integers(
    config: Config, keys: Iterable[str], where: str, *, optional: bool = False, least: int = 1, most: int = 2**31 - 1
) -> list[int]:
    """The whole numbers under `keys`, from `least` to `most`.

    With `optional` a key may also be missing or null, and is then left out.

    Raises:
        UnsupportedModelError: naming the first that is none.
    """
    values = []
    for key in keys:
        value = config.get(key)
        if optional and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UnsupportedModelError(
                f"{where} config.json: {key} is {shown(repr(value))}, not a whole number from {least} to {most:,}"
            )
        values.append(value)
    return values
