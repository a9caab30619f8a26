"""Attention sites with their activations on calibration text, which stay for the next stage where they are few."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.source import Source
from ..conversion.convert_site import read_site
from ..conversion.plan import Plan
from ..families import Site
from .activations import Batch, capture
from .fitter import SiteFitter
from .text import Text

KEPT = 1e9
"""bytes of activations of all sites, at most, that stay"""


class SiteFitters:
    """Fitters of a source's attention sites.

    Args:
        model: the source, or its twin, that reads the text.
        plan: which sites there are; how many heads they keep does not matter.
        source: the same model's weights.
        device: to compute on.
        text: to fit to.
        metrics: of the sites' outputs.
        room: bytes of activations that may be held.
        generator: makes one for a purpose.
        bfloat16: whether `model` is a twin, whose layers read activations in it.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        source: Source,
        device: torch.device,
        text: Text,
        metrics: Mapping[Site, Tensor],
        room: float,
        generator: Callable[[str], torch.Generator],
        bfloat16: bool,
    ) -> None:
        self.model, self.plan, self.source, self.device, self.text = model, plan, source, device, text
        self.metrics, self.room, self.generator, self.bfloat16 = metrics, room, generator, bfloat16
        self._kept: dict[tuple[Site, float], SiteFitter] = {}

    def __call__(self, sites: Sequence[Site], share: float) -> Iterator[tuple[Site, SiteFitter]]:
        """Fitters of some sites, one at a time, with such a share of each batch of the text to fit to."""
        batches = [first(batch, share) for batch in self.text.batches]
        stays = 2 * len(self.plan.converted_sites) * self._bytes(batches) <= min(KEPT, self.room)  # in- and outputs
        missing = [site for site in sites if (site, share) not in self._kept]
        made = self._made(missing, batches)
        for site in sites:
            fitter = self._kept.get((site, share)) or next(made)
            if stays:
                self._kept[site, share] = fitter
            yield site, fitter

    def forget(self) -> None:
        """Lets go of what stayed."""
        self._kept.clear()

    def _made(self, sites: Sequence[Site], batches: Sequence[Batch]) -> Iterator[SiteFitter]:
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        for group in self._groups(sites, batches):
            activations = capture(self.model, group, [*batches, *self.text.held_out], self.device, dtype)
            for site in group:
                inputs = activations.pop(site)
                yield SiteFitter(
                    self.plan.family.attention(site, self.plan.source_config),
                    read_site(self.plan, self.source, site).tensors(),
                    inputs[: len(batches)],
                    inputs[len(batches) :],
                    self.metrics.get(site),
                    self.device,
                    self.generator(site.prefix),
                    self.bfloat16,
                )

    def _groups(self, sites: Sequence[Site], batches: Sequence[Batch]) -> Iterator[Sequence[Site]]:
        """Sites whose activations fit into memory together, at least one."""
        size = max(1, int(self.room // self._bytes(batches)))
        for start in range(0, len(sites), size):
            yield sites[start : start + size]

    def _bytes(self, batches: Sequence[Batch]) -> int:
        """Of what a site reads."""
        tokens = sum(batch["input_ids"].numel() for batch in [*batches, *self.text.held_out])
        return tokens * self.plan.dimensions.width * (2 if self.bfloat16 else 4)


def first(batch: Batch, share: float) -> Batch:
    """The first sequences of a batch."""
    count = math.ceil(share * len(batch["input_ids"]))
    return {name: tensor[:count] for name, tensor in batch.items()}
