"""Rows are padded to be computed side by side: what stands there counts in nothing, to the bit."""

import copy

import pytest
import torch
from helpers import gpt2, t5

from sqa_convert.calibration.activations import capture
from sqa_convert.calibration.fisher import sensitivity
from sqa_convert.calibration.fitter import SiteFitter
from sqa_convert.checkpoints.in_memory import ModelSource
from sqa_convert.conversion.convert_site import read_site
from sqa_convert.conversion.plan import make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.evaluation.held_out_batches import HeldOut
from sqa_convert.evaluation.measure import measure, predict
from sqa_convert.text.collate import IGNORED, PackedCollator
from sqa_convert.text.tokenized_rows import causal_batches, pair_batches

CPU = torch.device("cpu")
LENGTHS = (24, 23, 22, 17, 9, 8, 7, 3) * 2


def rows(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 61, (length,), generator=generator) for length in LENGTHS]


def padded(kind, fill):
    """Batches whose padding is `fill`, or drawn."""
    if kind == "gpt2":
        batches = causal_batches(rows(0), 0, 64)
        padding = [(batch["labels"] == IGNORED) & (torch.arange(batch["labels"].shape[1]) > 0) for batch in batches]
    else:
        batches = pair_batches(list(zip(rows(0), rows(1), strict=True)), 0, 64)
        padding = [batch.get("attention_mask", torch.ones(1)) == 0 for batch in batches]
    assert any(bool(mask.any()) for mask in padding)
    for batch, mask in zip(batches, padding, strict=True):
        ids = batch["input_ids"]
        drawn = torch.randint(61, ids.shape, generator=torch.Generator().manual_seed(5)) if fill is None else fill
        batch["input_ids"] = torch.where(mask, drawn, ids)
    return batches


def everything(model, kind, fill):
    """All that is computed of a text: Fisher matrices, statistics, refit, refine, errors, loss and KL."""
    source = ModelSource(model)
    plan = make_plan(source, Request(6, 3))
    batches = padded(kind, fill)
    metrics = sensitivity(model, plan.sites, batches, CPU, torch.Generator().manual_seed(0))
    results = [metrics[site] for site in plan.sites]
    for site, inputs in capture(model, plan.sites, batches, CPU).items():
        attention = plan.family.attention(site, plan.source_config)
        heads = read_site(plan, source, site).tensors()
        parts = inputs[:-1], inputs[-1:]
        fitter = SiteFitter(attention, heads, *parts, metrics[site], CPU, torch.Generator().manual_seed(0))
        results += [t for t in vars(fitter.statistics).values() if t is not None]
        site_ = fitter.refine(fitter.convert("svd", plan.partitions[site], True, True), 3)
        results += [t for t in vars(site_.heads).values() if t is not None]
        results.append(torch.tensor([site_.record.errors[stage] for stage in ("converted", "refit", "refined")]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    held_out = HeldOut(batches, "", 0, CPU)
    expected = predict(model, held_out)
    quality = measure(predict(other, held_out), expected)
    return [*results, torch.tensor([measure(expected).loss, quality.loss, quality.kl])]


@pytest.mark.parametrize(("kind", "make"), [("gpt2", gpt2), ("t5", t5)])
def test_padding_counts_in_nothing(kind, make):
    model = make(layers=2).eval()
    first, second = (everything(model, kind, fill) for fill in (0, None))
    assert len(first) == len(second) > 20
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_in_a_block_are_computed_as_if_each_were_alone():
    model = gpt2(layers=2, n_positions=64).eval()
    block = [row for row in rows(0)[:4] if len(row) < 23]
    batch = PackedCollator(64, 0)([(0, block)])
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0]
        start = 0
        for row in block:
            alone = model(input_ids=row[None]).logits[0]
            torch.testing.assert_close(together[start : start + len(row)], alone, rtol=1e-4, atol=1e-4)
            assert labels[0, start] == IGNORED and torch.equal(labels[0, start + 1 : start + len(row)], row[1:])
            start += len(row)
    assert (labels[0, start:] == IGNORED).all()
