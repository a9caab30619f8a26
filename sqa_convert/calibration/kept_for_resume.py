"""What a calibration has finished, kept in files, so that one that was stopped goes on from there to the same bits.

Tensors are kept as safetensors and the rest as JSON beside them. Every file says what it is of: one that belongs to
other work, or is damaged, is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..conversion.convert_site import ConvertedSite, SiteRecord
from ..families import Site
from ..heads import AttentionHeads, Partition
from ..progress import step_done
from .fitter import SiteFitter
from .text import Text

Tensors = Mapping[str, Tensor]

Weighed = tuple[ConvertedSite, dict[tuple[int, int], float] | None]
"""a site converted evenly, and what it costs by its numbers of heads"""

ENDING = ".safetensors"


class KeptParts:
    """Parts of one calibration by name, each in a file of its own.

    Args:
        folder: where they are; None: nothing is kept.
        of: what the calibration depends on, as JSON holds it.
    """

    def __init__(self, folder: Path | None = None, of: Mapping[str, Any] | None = None) -> None:
        self.folder, self._full = folder, False
        self.whole = False
        """whether the calibration is finished"""
        self._key = _digest([json.dumps(of, sort_keys=True).encode()])

    @property
    def count(self) -> int:
        """Of the files that there are."""
        return 0 if self.folder is None else len(list(self.folder.glob(f"*{ENDING}")))

    def depend_on(self, more: bytes) -> None:
        """What is kept from now on, and found, depends on this too."""
        self._key = _digest([self._key.encode(), more])

    def find(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors of a part and what is told of it; None where there is none."""
        if self.folder is None or not self._file(name).is_file():
            return None
        with contextlib.suppress(OSError, SafetensorError, ValueError), safe_open(self._file(name), "pt") as file:
            kept = file.metadata() or {}
            # Numbers that lie in memory as a fresh tensor's do are computed with to the same bits.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            if kept.get("key") == self._key and kept.get("check") == _check(tensors, kept["told"]):
                return tensors, json.loads(kept["told"])
        return None

    def keep(self, name: str, tensors: Tensors, told: Any = None) -> None:
        """Keeps a part. Where that cannot be, for want of room, nothing is kept any more."""
        if self.folder is None or self._full:
            return
        text = json.dumps(told)
        metadata = {"key": self._key, "told": text, "check": _check(tensors, text)}
        new = self._file(name).with_suffix(".new")
        try:
            save_file(dict(tensors), new, metadata)
            new.replace(self._file(name))
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            self._full = True

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / (re.sub(r"[^\w.]+", "-", name) + ENDING)

    def text(self, kept: bool, make: Callable[[], Text]) -> Text:
        """Calibration text; what else is kept from now on is of this text.

        Args:
            kept: whether it is one of the parts; if not, it is made each time.
        """
        found = self.find("text") if kept else None
        text = make() if found is None else _read_text(*found)
        tensors = _tensors_of(text)
        if kept and found is None:
            self.keep("text", tensors, _told_of(text))
        self.depend_on(_check(tensors, json.dumps(_told_of(text))).encode())
        return text

    def metrics(self, sites: Sequence[Site], make: Callable[[], dict[Site, Tensor]]) -> dict[Site, Tensor]:
        """Fisher matrices of sites."""
        found = self.find("sensitivity")
        if found is not None:
            return {site: found[0][site.prefix] for site in sites if site.prefix in found[0]}
        metrics = make()
        self.keep("sensitivity", {site.prefix: _plain(matrix) for site, matrix in metrics.items()})
        return metrics

    def weighed(
        self,
        sites: Sequence[Site],
        fitters: Callable[[Sequence[Site]], Iterable[tuple[Site, SiteFitter]]],
        make: Callable[[Site, SiteFitter], Weighed],
    ) -> dict[Site, Weighed]:
        """Each site converted evenly, and what it costs by its numbers of heads (query, key/value)."""
        weighed: dict[Site, Weighed] = {}
        for site in sites:
            found = self.find(f"weigh {site.prefix}")
            if found is not None:
                costs = found[1].pop("costs")
                weighed[site] = _read_site(*found), costs and {(q, kv): cost for q, kv, cost in costs}
        for site, fitter in fitters([site for site in sites if site not in weighed]):
            made, costs = make(site, fitter)
            weighed[site] = _plain_site(made), costs
            tensors, told = _parts_of(weighed[site][0])
            told["costs"] = costs and [[*counts, cost] for counts, cost in costs.items()]
            self.keep(f"weigh {site.prefix}", tensors, told)
        return {site: weighed[site] for site in sites}

    def converted(
        self,
        stage: str,
        names: Sequence[str],
        sites: Sequence[Site],
        fitters: Callable[[Sequence[Site]], Iterable[tuple[Site, SiteFitter]]],
        make: Callable[[str, Site, SiteFitter], ConvertedSite],
    ) -> dict[str, dict[Site, ConvertedSite]]:
        """Every site converted in each of the ways that are named.

        Args:
            fitters: of some sites, one at a time.
            make: converts a site in a way.
        """
        made = {name: dict(self._found(f"{stage} {name}", sites)) for name in names}
        missing = [site for site in sites if any(site not in of_sites for of_sites in made.values())]
        for site, fitter in fitters(missing):
            for number, name in enumerate(names):
                step_done(number / len(names))
                if site not in made[name]:
                    made[name][site] = _plain_site(make(name, site, fitter))
                    self.keep(f"{stage} {name} {site.prefix}", *_parts_of(made[name][site]))
        return {name: {site: of_sites[site] for site in sites} for name, of_sites in made.items()}

    def _found(self, name: str, sites: Sequence[Site]) -> Iterator[tuple[Site, ConvertedSite]]:
        for site in sites:
            found = self.find(f"{name} {site.prefix}")
            if found is not None:
                yield site, _read_site(*found)

    def trained(self, make: Callable[[], tuple[Tensors, dict[str, Any]]]) -> tuple[Tensors, dict[str, Any]]:
        """Tensors that were trained, and a report of it."""
        found = self.find("polish")
        if found is not None:
            return found
        tensors, told = make()
        self.keep("polish", {name: _plain(tensor) for name, tensor in tensors.items()}, told)
        return tensors, told


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _check(tensors: Tensors, told: str) -> str:
    """Tells whole content from damaged."""
    value = zlib.crc32(told.encode())
    for name in sorted(tensors):
        value = zlib.crc32(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode(), value)
        value = zlib.crc32(_plain(tensors[name]).reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def _plain(tensor: Tensor) -> Tensor:
    """The same numbers on the CPU, one behind the other."""
    return tensor.detach().cpu().contiguous()


def _plain_site(made: ConvertedSite) -> ConvertedSite:
    heads = {name: None if t is None else _plain(t).clone() for name, t in vars(made.heads).items()}
    return ConvertedSite(AttentionHeads(**heads), made.record)


def _parts_of(made: ConvertedSite) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: tensor for name, tensor in vars(made.heads).items() if tensor is not None}
    return tensors, asdict(made.record) | {"partition": made.record.partition.groups}


def _read_site(tensors: Tensors, told: dict[str, Any]) -> ConvertedSite:
    groups = tuple(tuple(tuple(cluster) for cluster in group) for group in told["partition"])
    return ConvertedSite(AttentionHeads(**tensors), SiteRecord(**told | {"partition": Partition(groups)}))


_LISTS = ("batches", "held_out")


def _tensors_of(text: Text) -> dict[str, Tensor]:
    return {
        f"{kind} {number} {name}": _plain(tensor).clone()
        for kind in _LISTS
        for number, batch in enumerate(getattr(text, kind))
        for name, tensor in batch.items()
    }


def _told_of(text: Text) -> dict[str, Any]:
    counts = {f"{kind} count": len(getattr(text, kind)) for kind in _LISTS}
    return {name: value for name, value in vars(text).items() if name not in _LISTS} | {"lists": counts}


def _read_text(tensors: Tensors, told: dict[str, Any]) -> Text:
    counts = told.pop("lists")
    batches: dict[str, Any] = {kind: [{} for _ in range(counts[f"{kind} count"])] for kind in _LISTS}
    for key, tensor in tensors.items():
        kind, number, name = key.split(" ")
        batches[kind][int(number)][name] = tensor
    return Text(**batches, **told)
