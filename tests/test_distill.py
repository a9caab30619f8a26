import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers import gpt2, t5, tokens

from sqa_convert.calibration import distillation_loss as distill
from sqa_convert.calibration.distillation_loss import Targets, aligned_labels, distillation_loss
from sqa_convert.evaluation.held_out_batches import HeldOut
from sqa_convert.evaluation.instead_of_logits import instead_of_logits
from sqa_convert.evaluation.measure import predict
from sqa_convert.text.collate import IGNORED


def plain(hidden, head, targets, ce):
    """The definition, with whole arrays of logits."""
    kept = targets.labels != IGNORED
    log_p = (hidden @ head.T).log_softmax(-1)[kept]
    loss = hidden.new_zeros(())
    if ce > 0:
        loss = loss - ce * log_p.gather(1, targets.labels[kept][:, None]).sum()
    if ce < 1:
        q = (targets.hidden @ targets.head.T).softmax(-1)[kept]
        loss = loss + (1 - ce) * (q * (q.log() - log_p)).sum()
    return loss


@pytest.mark.parametrize("ce", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_chunked_loss_and_its_gradients_are_the_plain_formulas(ce, chunk, monkeypatch):
    monkeypatch.setattr(distill, "_CHUNK_LOGITS", (chunk * 11, chunk * 11))
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 5))
    labels[1, 2:], labels[0, 0] = IGNORED, IGNORED
    teacher = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    targets = Targets(labels, *teacher) if ce < 1 else Targets(labels)
    ours, expected = distillation_loss(hidden, head, targets, ce), plain(hidden, head, targets, ce)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(3 * loss, (hidden, head)) for loss in (ours, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


def test_a_frozen_head_gets_no_gradient_and_costs_none():
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
    distillation_loss(hidden, head, Targets(torch.zeros(2, 3, dtype=torch.long)), 1.0).backward()
    assert hidden.grad is not None and head.grad is None


@pytest.mark.parametrize("make", [gpt2, t5])
def test_cross_entropy_through_the_head_is_the_models_own_loss(make):
    model = make()
    whole = model.config.is_encoder_decoder
    batch = {"input_ids": tokens(2, 12), "labels": tokens(2, 7 if whole else 12)}
    if not whole:
        batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, -3:] = IGNORED
    expected = model(**batch)
    labels = aligned_labels(batch["labels"], whole)
    inputs = {"input_ids": batch["input_ids"]}
    if whole:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    with instead_of_logits(model, lambda h, w: distillation_loss(h, w, Targets(labels), 1.0)):
        loss = model(**inputs).logits / (labels != IGNORED).sum()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert model(**batch).logits.shape == expected.logits.shape  # the head is itself again


@pytest.mark.parametrize("run", ["predict", "hidden states"])
def test_a_hook_that_accelerate_has_put_around_a_head_stays(run):
    model, ids, calls = gpt2(), tokens(2, 9), []

    class Counted(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    add_hook_to_module(model.lm_head, Counted())
    if run == "predict":
        predict(model, HeldOut([{"input_ids": ids, "labels": ids}], "", 0, torch.device("cpu")))
    else:
        assert distill.hidden_states(model, {"input_ids": ids}).shape == (2, 9, 48)
    assert calls == []  # as the head was not needed
    model(ids)
    assert calls == [model.lm_head]


def test_the_loss_of_bfloat16_logits_is_summed_in_float32():
    hidden, head = torch.randn(1, 4096, 8), torch.randn(50, 8)
    targets = Targets(torch.randint(0, 50, (1, 4096)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(hidden, head, targets, 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(hidden, head, targets, 1.0), rtol=1e-2, atol=0)
