"""A pretend accelerator: "pretend" computes on the CPU, and refuses to meet the CPU's tensors as a real one does.

Registering it changes torch for the rest of the process, so it is done in one of its own: `python pretend_device.py`
runs whatever of this package computes on a device, on that one.
"""

import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from sqa_convert import Calibration, convert, convert_modules
from sqa_convert.calibration.distillation_loss import Targets, aligned_labels, distillation_loss
from sqa_convert.evaluation.evaluate import compare
from sqa_convert.evaluation.generation import answer_scores, continuations
from sqa_convert.evaluation.held_out_batches import HeldOut
from sqa_convert.evaluation.held_out_text import prepare
from sqa_convert.evaluation.instead_of_logits import instead_of_logits
from sqa_convert.evaluation.load import load_config, load_model
from sqa_convert.layers import KeyValueCache, SparseQueryAttention
from sqa_convert.speed.bench import bench
from sqa_convert.speed.settings import Settings
from sqa_convert.text.tokenizers import load_tokenizer

NAME = "pretend"
MAY_MEET = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}
"""operations that move tensors between devices, or take indices from the CPU"""


class PretendTensor(torch.Tensor):
    """A tensor on the device; `held` is what it is computed with."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=f"{NAME}:0",
            requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, held, requires_grad=False):
        self.held = held

    def __repr__(self):
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"

    def __getitem__(self, index):  # torch makes a tensor of a list by a way that a wrapper is not asked about
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return on_the_device(operation, *args, **kwargs or {})


def on_the_device(operation, *args, **kwargs):
    """Runs an operation on what the tensors hold; its results are on the device, unless it says otherwise."""
    given = pytree.tree_leaves((args, kwargs))
    name = operation.overloadpacket.__name__
    strangers = [t for t in given if isinstance(t, torch.Tensor) and not isinstance(t, PretendTensor)]
    if name not in MAY_MEET and any(stranger.dim() for stranger in strangers):
        raise RuntimeError(f"{operation}: expected all tensors on one device, found {NAME} and cpu")
    wanted = kwargs.get("device")
    here = torch.device(wanted).type == NAME if wanted is not None else name != "_local_scalar_dense"
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)

    def held(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value.held if isinstance(value, PretendTensor) else value

    results = operation(*pytree.tree_map(held, args), **pytree.tree_map(held, kwargs))
    known = {id(tensor.held): tensor for tensor in given if isinstance(tensor, PretendTensor)}
    known |= {id(stranger): stranger for stranger in strangers}  # what is changed in place comes back as it is

    def returned(value):
        if not isinstance(value, torch.Tensor) or id(value) in known:
            return known.get(id(value), value)
        return PretendTensor(value) if here else value

    return pytree.tree_map(returned, results)


class Module:
    """`torch.pretend`."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]


def _made_here_and_moved(make):
    def made(*args, device=None, **kwargs):
        return make(*args, **kwargs) if device is None else make(*args, device="cpu", **kwargs).to(device)

    return made


def register():
    """Makes the device known to torch; returns what must stay alive."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(on_the_device, "PrivateUse1")
    for name in ("tensor", "as_tensor"):  # they move what they make by a way that a wrapper is not asked about
        setattr(torch, name, _made_here_and_moved(getattr(torch, name)))
    return library


def methods(folder):
    """Every method, with and without fitting, and the choice among them."""
    for method in ("mean", "first", "select", "auto"):  # which tries svd and procrustes
        fitting = Calibration(tokens=64, refit=True, refine_steps=2)
        report = convert(folder, 6, 3, method, calibration=fitting, device=NAME).report
        assert "refined" in report["sites"][0]["output_error"], report


def measuring(folder, output):
    """Loss, KL and what both models write, as the command measures them."""
    convert(folder, 6, 3, "mean", output, device=NAME)
    held_out = prepare(folder, tokens=128, device=NAME)
    models = {"source": folder, "converted": output}
    there = compare(models, held_out)
    here = compare(models, prepare(folder, tokens=128, device="cpu"))
    for name in models:
        assert there[name]["loss"] == pytest.approx(here[name]["loss"], rel=1e-4)
    written = continuations(models, held_out)  # none where it fails
    assert written and all(set(text) == {"given", *models} for text in written)
    texts = HeldOut(held_out.batches[:1], "", 0, held_out.device)
    if load_config(folder).is_encoder_decoder:
        answer_scores(load_model(output).to(NAME), load_tokenizer(folder), texts)


def speed(folder, output):
    """Every mode of every part."""
    settings = Settings(lengths=(16,), repeats=1, device=NAME, parts=("model", "attention"))
    rows = bench({"source": folder, "converted": output}, settings)["rows"]
    assert {row["mode"] for row in rows} == {"prefill", "decode", "train"}
    assert all(row["seconds"] is not None for row in rows), rows


def distillation(folder, output):
    """The loss and its gradients, with and without a teacher."""
    batch = prepare(folder, tokens=128, device=NAME).batches[0]
    student, teacher = load_model(output).to(NAME), load_model(folder).to(NAME)
    decoder_only = not student.config.is_encoder_decoder
    labels = aligned_labels(batch["labels"], not decoder_only).to(NAME)
    inputs = {"input_ids": batch["input_ids"].to(NAME)}
    if not decoder_only:
        inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad(), instead_of_logits(teacher, lambda hidden, weight: hidden):
        targets = Targets(labels, teacher(**inputs).logits, teacher.get_output_embeddings().weight)
    for ce in (0.0, 0.5, 1.0):
        with instead_of_logits(student, lambda hidden, weight, ce=ce: distillation_loss(hidden, weight, targets, ce)):
            student(**inputs, use_cache=False).logits.backward()
    assert all(parameter.grad.device.type == NAME for parameter in student.parameters() if parameter.grad is not None)
    assert any(parameter.grad is not None for parameter in student.parameters())


def torch_models():
    """Layers in every way they are called, and a model of torch's own converted there."""
    model = torch.nn.Transformer(16, 4, 1, 1, 32, batch_first=True, dropout=0.0).to(NAME)
    source, target = torch.randn(3, 6, 16), torch.randn(3, 5, 16)
    later, padding = torch.ones(5, 5).triu(1).bool(), torch.arange(6) >= torch.tensor([[6], [4], [2]])

    def run(model, batch):
        masks = {"tgt_mask": later.to(NAME), "src_key_padding_mask": padding.to(NAME)}
        return model(*batch, **masks, memory_key_padding_mask=padding.to(NAME))

    conversion = convert_modules(model, 2, 1, calibration=[(source, target)] * 3, run=run, refine_steps=2)
    assert {p.device.type for p in conversion.model.parameters()} == {NAME}
    assert conversion.report["output_error"] < 1
    x = source.to(NAME)
    layer = SparseQueryAttention(
        16, 4, 0.1, add_bias_kv=True, batch_first=True, device=NAME, q_groups=2, kv_groups=1, rotary_base=100.0
    )
    cache = KeyValueCache()
    masked = {"key_padding_mask": padding.to(NAME), "attn_mask": torch.zeros(12, 6, 6).to(NAME)}
    for given in ({}, {"is_causal": True}, masked, {"need_weights": False, "is_causal": True, "cache": cache}):
        layer(x, x, x, **given)[0].sum().backward()
    assert len(cache) == 6


def main(folder, output):
    try:
        keep = register()  # noqa: F841 - must stay alive
        torch.ones(2, device=NAME).add_(1)
    except Exception as error:  # the interface is torch's own and may change
        sys.exit(f"no pretend device: {type(error).__name__}: {error}")
    methods(folder)
    measuring(folder, output)
    speed(folder, output)
    distillation(folder, output)
    torch_models()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
