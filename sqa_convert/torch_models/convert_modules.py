"""`convert_modules`: every `nn.MultiheadAttention` of a model fitted to what it does on batches, and replaced."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..caller_settings import undisturbed
from ..devices import choose_device
from ..errors import RecipeError
from ..heads import AUTO, Convert, Method, Partition
from ..layers.transformer_layers import put_modules
from ..parse_amounts import amount, check_seed
from ..progress import Progress, Stages, in_notebooks
from .asked_conversion import Asked
from .converted_modules import ConvertedModules
from .find_attention import bare, find_attention
from .fit_modules import STAGES, fit_blindly, fit_to_batches
from .run_batches import Run, Runner, at_rest
from .take_batches import take_batches


@undisturbed
def convert_modules(
    model: nn.Module,
    q_groups: int | None = None,
    kv_groups: int | None = None,
    *,
    variant: str | None = None,
    calibration: Iterable[Any] | None,
    run: Run | None = None,
    method: str | Method | Convert = AUTO,
    partition: str | Partition | Mapping[str, Partition] | None = None,
    refit: bool | None = None,
    refine_steps: int | None = None,
    modules: Sequence[str] | None = None,
    positions: int | str | None = None,
    inplace: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress = in_notebooks,
) -> ConvertedModules:
    """Converts the `nn.MultiheadAttention` modules of any torch model to Sparse Query Attention.

    Each is fitted by what it does on the batches: closed form, refit and refine, as a checkpoint's attention is, masks
    and padding respected; then a `SparseQueryAttention` takes its place. No labels are used.

    Args:
        model: any that holds such modules, as `nn.Transformer` and many models of images and audio do.
        q_groups: query heads to keep in each, Hq; None: all.
        kv_groups: key/value heads to keep, a divisor of `q_groups`; None: as many.
        variant: instead of the two numbers, a name of `sqa_convert.VARIANTS`.
        calibration: batches, as of a DataLoader; a tenth of the sequences is held out. None: from the weights alone.
        run: how a batch is run: a function of model and batch that returns what matters of the model's output. By
            default a mapping is given by name, of a list or tuple as many as the model requires, all else as it is.
        method: "auto", which tries several for each module; or a name of `sqa_convert.METHODS`, a `Method`, or a
            function as `register_method` takes it.
        partition: which heads go together: "searched", "contiguous", a `Partition` for all modules, or one for each by
            its name, where those without one stay as they are unless heads are asked for; by default as suits the
            method.
        refit: fit output projections by least squares; by default with "auto", "svd" and "procrustes".
        refine_steps: of layer-wise training; by default 100 with these methods, else 0.
        modules: names of those to convert, with `*` for any part; by default all.
        positions: as many query positions of each module as batches are taken for, also as "400k"; by default 20 for
            each unknown of a fit, at least 65,536.
        inplace: replace them in `model` itself, in place of a copy.
        device: to compute on, such as "auto" or "cuda"; by default where the model is. The result is where it was.
        seed: of everything random.
        progress: called as the work goes on.

    Returns:
        The converted model in the mode that `model` is in, and a report.

    Raises:
        RecipeError: an argument is not possible.
        UnsupportedModelError: there is no such module.
        DataError: the model cannot be run on the batches, or they are none.
        QualityError: no fit is finite.
    """
    asked = Asked(
        q_groups, kv_groups, variant, method, partition, refit, refine_steps, modules, calibration is not None
    )
    asked.check()
    check_seed(seed)
    wanted = None if positions is None else amount(positions, "--positions")
    if wanted == 0:
        raise RecipeError(f"--positions {positions}: give 1 or more")
    inside = bare(model)
    found, kept = find_attention(inside, modules)
    planned = asked.planned(found)
    work = inside if inplace else copy.deepcopy(inside)
    attentions = {name: work.get_submodule(name) for name in found}
    home = attentions[next(iter(attentions))].out_proj.weight.device
    chosen = home if device is None else choose_device(device)
    before = sum(p.numel() for p in work.parameters())
    try:
        with at_rest(work.to(chosen)):
            if calibration is None:
                fitted = fit_blindly(asked, planned, attentions)
            else:
                stages = Stages(progress, STAGES)
                runner = Runner(work, run, chosen)
                batches = take_batches(runner, attentions, calibration, wanted, planned)
                fitted = fit_to_batches(asked, planned, attentions, runner, batches, seed, stages)
    finally:
        work.to(home)
    for name, layer in fitted.layers.items():
        module = attentions[name]
        layer.to(home).train(module.training).requires_grad_(module.out_proj.weight.requires_grad)
    result = put_modules(work, {attentions[name]: layer for name, layer in fitted.layers.items()})
    after = sum(p.numel() for p in result.parameters())
    report = fitted.report | {"kept": kept | fitted.kept, "parameters": {"before": before, "after": after}}
    return ConvertedModules(result, report)
