"""Every attention site fitted at several numbers of heads, each once: kept on disk, and put together as models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory, gettempdir

import torch

from ..conversion.convert_site import ConvertedSite
from ..errors import RecipeError
from ..families import Site
from ..heads import Partition
from ..heads.allocate import Counts
from ..progress import step_done
from .fitter import SiteFitter
from .replaced_sites import Replacement


def check_room(sites: int, width: int, head_dim: int, counts: Sequence[Counts]) -> None:
    """Raises RecipeError where fits of so many sites at all these numbers of heads do not fit on the disk."""
    needed = 4 * 2 * width * head_dim * sites * sum(q + kv for q, kv in counts)  # query and output, key and value
    folder = gettempdir()
    free = disk_usage(folder).free
    if needed > free:
        raise RecipeError(
            f"--settings: fits at {len(counts)} of them take {needed / 1e9:,.1f} GB in {folder}, where "
            f"{free / 1e9:,.1f} GB are free: give fewer, or another folder in the environment's TMPDIR"
        )


@dataclass
class SiteFits:
    """Converted sites by their numbers of heads, and what each costs alone."""

    kl_alone: dict[Site, dict[Counts, float]] = field(default_factory=dict)
    """of the source with the site alone converted; nothing where it keeps all heads"""
    _folder: TemporaryDirectory[str] = field(default_factory=lambda: TemporaryDirectory(prefix="sqa-fits-"))

    def add(
        self,
        fitters: Iterable[tuple[Site, SiteFitter]],
        counts: Sequence[Counts],
        replacement: Replacement,
        method: str,
        refit: bool,
        refine_steps: int,
    ) -> None:
        """Fits sites, one at a time, at each of the counts."""
        for site, fitter in fitters:
            heads = len(fitter.heads.query)
            self.kl_alone[site] = {(heads, heads): 0.0}
            for done, kept in enumerate(counts):
                step_done(done / len(counts))
                converted = fitter.convert(method, Partition.contiguous(heads, *kept), True, refit)
                if refine_steps:
                    converted = fitter.refine(converted, refine_steps)
                kl = replacement.kl({site: converted.heads})
                if kl is not None:
                    self.kl_alone[site][kept] = kl
                    torch.save(converted, self._file(site, kept))

    def model(self, counts: Mapping[Site, Counts]) -> dict[Site, ConvertedSite] | None:
        """The fits of a model, those of sites that keep all heads left out; None where one was not finite."""
        fits = {}
        for site, kept in counts.items():
            if kept not in self.kl_alone[site]:
                return None
            if self._file(site, kept).exists():
                fits[site] = torch.load(self._file(site, kept), weights_only=False)  # our own, of this process
        return fits

    def _file(self, site: Site, kept: Counts) -> Path:
        return Path(self._folder.name) / f"{site.kind}-{site.layer}-{kept[0]}-{kept[1]}"
