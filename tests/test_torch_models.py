"""Models of others with `nn.MultiheadAttention`: converted by what they do on batches, whatever they are built like."""

import copy
import math
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sqa_convert
from sqa_convert import Partition
from sqa_convert.errors import CheckpointError, DataError, QualityError, RecipeError, UnsupportedModelError
from sqa_convert.heads.attend import Attention
from sqa_convert.layers import SparseQueryAttention
from sqa_convert.layers.multihead_weights import attention_of, heads_of
from sqa_convert.torch_models.call_inputs import MasksDifferError, call_of

WIDTH, HEADS, LENGTH = 16, 4, 6
FAST = {"refine_steps": 2}


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)


def random_transformer(**settings):
    """Whose weights are large enough that heads differ."""
    torch.manual_seed(3)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 2 * WIDTH, dropout=0.1, batch_first=True, **settings)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=0.4)
            nn.init.normal_(module.in_proj_bias, std=0.2)
    return model


def texts(count=20, rows=4):
    return [(torch.randn(rows, LENGTH, WIDTH), torch.randn(rows, LENGTH, WIDTH)) for _ in range(count)]


class Classifier(nn.Module):
    """An encoder in the middle of other layers, as an image model is."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, padding=None):
        return {"logits": self.head(self.encoder(x, src_key_padding_mask=padding).mean(1)), "names": ["a"]}


def attentions(model, kind=SparseQueryAttention):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def test_every_attention_is_replaced_and_the_source_stays():
    model = random_transformer().train()
    before = copy.deepcopy(model.state_dict())
    result = sqa_convert.convert_modules(model, 2, 1, calibration=texts(), **FAST)
    assert len(attentions(model, nn.MultiheadAttention)) == 3 and not attentions(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    made = attentions(result.model)
    assert set(made) == set(attentions(model, nn.MultiheadAttention))
    assert {(layer.q_groups, layer.kv_groups, layer.training) for layer in made.values()} == {(2, 1, True)}
    assert result.model.training and all(p.requires_grad for p in result.model.parameters())
    entries = result.report["modules"]
    assert [entry["module"] for entry in entries] == list(made)
    for entry in entries:
        assert set(entry["errors"]) == {"converted", "refit", "refined"} and entry["error"] == min(
            entry["errors"].values()
        )
        assert (entry["heads"], entry["query_heads"], entry["key_value_heads"]) == (4, 2, 1)
    assert result.report["calibration"] == {
        "batches": 20, "positions": 18 * 4 * LENGTH, "held_out_positions": 2 * 4 * LENGTH, "refit": True,
        "refine_steps": 2,
    }  # fmt: skip
    count = sum(p.numel() for p in result.model.parameters())
    assert result.report["parameters"]["after"] == count < result.report["parameters"]["before"]
    assert not result.report["warnings"]
    shown = str(result)
    assert "decoder.layers.0.multihead_attn" in shown and "4 → 2/1" in shown and "averaged heads" in shown


def test_fitted_heads_are_nearer_to_the_source_than_averaged_ones():
    model, batches = random_transformer().eval(), texts(20, 8)
    fitted = sqa_convert.convert_modules(model, 2, 2, calibration=batches, refine_steps=10)
    assert fitted.report["output_error"] < 0.7 * fitted.report["output_error_of_mean"]
    blind = sqa_convert.convert_modules(model, 2, 2, calibration=None)
    assert blind.report["calibration"] is blind.report["output_error"] is None
    with torch.no_grad():
        wanted, found, unfitted = (m.eval()(*batches[-1]) for m in (model, fitted.model, blind.model))
    assert (found - wanted).norm() < (unfitted - wanted).norm()


def test_torchs_fused_kernels_do_not_meet_what_they_do_not_know():
    """In eval mode an nn.TransformerEncoder packs padded texts for kernels that know nn.MultiheadAttention alone."""
    x, padding = torch.randn(4, LENGTH, WIDTH), torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4], [3], [1]])
    model = Classifier().eval()
    assert model.encoder.use_nested_tensor
    fewer = sqa_convert.convert_modules(model, 2, 2, calibration=[x] * 2, **FAST).model
    again = sqa_convert.load_modules(Classifier().eval(), fewer.state_dict())
    expected = fewer(x, padding)["logits"].detach()  # with gradients there is no packing
    with torch.no_grad():
        close(fewer(x, padding)["logits"], expected)
        close(again(x, padding)["logits"], expected)
    assert model.encoder.use_nested_tensor


def test_at_all_heads_the_model_is_the_same():
    model = random_transformer().eval()
    result = sqa_convert.convert_modules(model, HEADS, HEADS, calibration=texts(2))
    assert result.report["output_error"] < 1e-10
    source, target = texts(1)[0]
    with torch.no_grad():
        close(result.model(source, target), model(source, target))


def test_heads_that_are_copies_merge_without_loss():
    model = random_transformer().eval()
    with torch.no_grad():
        for module in attentions(model, nn.MultiheadAttention).values():
            for tensor in (module.in_proj_weight, module.in_proj_bias):
                for part in tensor.chunk(3):
                    heads = part.unflatten(0, (HEADS, -1))
                    heads[2], heads[3] = heads[0].clone(), heads[1].clone()  # merged by neither neighbours nor luck
    result = sqa_convert.convert_modules(model, 2, 2, calibration=texts(), refine_steps=0)
    assert result.report["output_error"] < 1e-6 < result.report["output_error_of_mean"]
    assert {entry["partition"] for entry in result.report["modules"]} == {(((0, 2),), ((1, 3),))}


@pytest.mark.parametrize("form", ["tensor", "with labels", "mapping", "loader"])
def test_batches_are_taken_as_people_have_them(form):
    x, labels = torch.randn(40, LENGTH, WIDTH), torch.zeros(40).long()
    padding = torch.arange(LENGTH) >= torch.randint(3, LENGTH, (40, 1))
    batches = {
        "tensor": [x[:20], x[20:]],
        "with labels": [(x[:20], labels[:20]), [x[20:], labels[20:]]],
        "mapping": [{"x": x, "padding": padding, "labels": labels}] * 2,
        "loader": DataLoader(TensorDataset(x, labels), batch_size=8),
    }[form]
    result = sqa_convert.convert_modules(Classifier(), variant="ssqa", calibration=batches, **FAST)
    calibration = result.report["calibration"]
    counted = int((~padding).sum())
    expected = {"mapping": (counted, counted), "loader": (32 * LENGTH, 8 * LENGTH)}.get(
        form, (20 * LENGTH, 20 * LENGTH)
    )
    assert (calibration["positions"], calibration["held_out_positions"]) == expected


def test_as_many_batches_are_taken_as_are_needed():
    def forever():
        while True:
            yield torch.randn(4, LENGTH, WIDTH)

    result = sqa_convert.convert_modules(Classifier(), 2, 2, calibration=forever(), positions=200, **FAST)
    assert result.report["calibration"]["batches"] == -(-200 // (4 * LENGTH))


class Pooled(nn.Module):
    """A last attention that reads one query a sequence; whole numbers come out, of which there is no gradient."""

    def __init__(self):
        super().__init__()
        self.inner = Classifier()
        self.pool = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x):
        x = self.inner.encoder(x)
        return self.pool(self.query.expand(len(x), -1, -1), x, x)[0].argmax(-1)


def test_an_attention_that_reads_little_is_not_waited_for_without_end():
    def forever():
        while True:
            yield torch.randn(4, LENGTH, WIDTH)

    result = sqa_convert.convert_modules(Pooled(), 2, 2, calibration=forever(), positions=60, **FAST)
    assert result.report["calibration"]["batches"] == 10  # of 24 positions, and 4 queries of the last attention
    assert len(result.report["modules"]) == 3 and result.report["output_error"] is None


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("there is none")


def test_a_model_without_gradients_is_converted_all_the_same():
    run = lambda model, x: NoGradient.apply(model(x)["logits"])  # noqa: E731
    result = sqa_convert.convert_modules(
        Classifier(), 2, 2, calibration=[torch.randn(8, LENGTH, WIDTH)] * 2, run=run, **FAST
    )
    assert len(result.report["modules"]) == 2


@pytest.mark.parametrize("wrapped", ["bfloat16", "compiled", "parallel"])
def test_models_as_people_run_them(wrapped):
    model = Classifier().eval()
    x = [torch.randn(8, LENGTH, WIDTH) for _ in range(2)]
    given = {
        "bfloat16": lambda: model.to(torch.bfloat16),
        "compiled": lambda: torch.compile(model),
        "parallel": lambda: nn.DataParallel(model),
    }[wrapped]()
    dtype = torch.bfloat16 if wrapped == "bfloat16" else torch.float32
    result = sqa_convert.convert_modules(given, 2, 2, calibration=[UserDict(x=batch.to(dtype)) for batch in x], **FAST)
    assert type(result.model) is Classifier and {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.report["output_error"] < 1


def test_how_a_batch_is_run_can_be_said():
    seen = []

    def run(model, batch):
        seen.append(batch)
        return model(torch.ones(2, LENGTH, WIDTH) * batch)["logits"]

    result = sqa_convert.convert_modules(Classifier(), 2, 2, calibration=[1.0, 2.0], run=run, **FAST)
    assert {1.0, 2.0} == set(seen)
    assert "20 are advised" in result.report["warnings"][0]


def test_padding_counts_in_nothing():
    x, padding = torch.randn(24, LENGTH, WIDTH), torch.arange(LENGTH) >= torch.randint(2, LENGTH, (24, 1))
    model = Classifier().eval()
    results = []
    for noise in (0.0, 100.0):
        spoiled = x + noise * padding[..., None] * torch.randn_like(x)
        batches = [{"x": spoiled[:20], "padding": padding[:20]}, {"x": spoiled[20:], "padding": padding[20:]}]
        run = lambda model, batch: model.encoder(batch["x"], src_key_padding_mask=batch["padding"])[~batch["padding"]]  # noqa: E731
        results.append(sqa_convert.convert_modules(model, 2, 1, calibration=batches, run=run, **FAST))
    for clean, spoiled in zip(*(attentions(r.model).values() for r in results), strict=True):
        for ours, theirs in zip(clean.parameters(), spoiled.parameters(), strict=True):
            close(ours, theirs, 1e-3)


def masked(kind):
    """A mask as nn.MultiheadAttention takes it, of 3 sequences, and the padding beside it."""
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4], [2]])
    added = torch.randn(LENGTH, LENGTH)
    return {
        "causal": {"attn_mask": causal},
        "causal hint": {"attn_mask": causal, "is_causal": True, "need_weights": False},
        "causal, padded": {"attn_mask": causal < 0, "key_padding_mask": padding},
        "causal, padded on the left": {"attn_mask": causal < 0, "key_padding_mask": padding.flip(1)},
        "window": {"attn_mask": (torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]).abs() > 2},
        "added": {"attn_mask": added},
        "by sequence": {"attn_mask": torch.randn(3, LENGTH, LENGTH).repeat_interleave(HEADS, 0)},
        "padding": {"key_padding_mask": padding},
        "padding that weighs": {"key_padding_mask": torch.randn(3, LENGTH).masked_fill(padding, -torch.inf)},
        "nothing for one": {"key_padding_mask": torch.arange(LENGTH) >= torch.tensor([[LENGTH], [0], [3]])},
    }[kind]


KINDS = ["causal", "causal hint", "causal, padded", "causal, padded on the left", "window", "added", "by sequence",
         "padding", "padding that weighs", "nothing for one"]  # fmt: skip


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_heads_are_fitted_to_is_what_the_module_makes(kind, batch_first):
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).eval()
    x = torch.randn(3, LENGTH, WIDTH)
    given = masked(kind)
    turned = x if batch_first else x.transpose(0, 1)
    expected = module(turned, turned, turned, **given)[0]
    call = call_of(module, (turned, turned, turned), given)
    assert call.causal == (kind in ("causal", "causal hint", "causal, padded"))
    assert call.inputs.memory is call.inputs.values is None
    expected = expected if batch_first else expected.transpose(0, 1)
    for inputs, causal in ((call.inputs, call.causal), (call.explicit, False)):
        made = attention_of(module, causal).layer(heads_of(module), *inputs.arguments)
        assert made.isfinite().all()
        close(inputs.count(made), inputs.count(expected))
    padding = given.get("key_padding_mask")
    real = ~padding if padding is not None and padding.dtype == torch.bool else None
    real = padding > -torch.inf if kind == "padding that weighs" else real
    assert call.inputs.positions == (3 * LENGTH if real is None else int(real.sum()))


def test_other_keys_and_values_are_what_is_read():
    module = nn.MultiheadAttention(WIDTH, HEADS, kdim=5, vdim=7, batch_first=True)
    query, key, value = torch.randn(2, 3, WIDTH), torch.randn(2, LENGTH, 5), torch.randn(2, LENGTH, 7)
    inputs = call_of(module, (query, key, value), {}).inputs
    close(attention_of(module).layer(heads_of(module), *inputs.arguments), module(query, key, value)[0])
    one = call_of(module, (query[0], key[0], value[0]), {}).inputs
    close(attention_of(module).layer(heads_of(module), *one.arguments)[0], module(query[0], key[0], value[0])[0])


def test_masks_that_differ_by_head_cannot_be_read():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = torch.randn(2, LENGTH, WIDTH)
    with pytest.raises(MasksDifferError):
        call_of(module, (x, x, x), {"attn_mask": torch.randn(2 * HEADS, LENGTH, LENGTH)})


class Detector(nn.Module):
    """Queries and keys with positions, values without, as DETR has them; learned queries read an image."""

    def __init__(self):
        super().__init__()
        self.itself = nn.MultiheadAttention(WIDTH, HEADS)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=12)
        self.positions, self.queries = (
            nn.Parameter(torch.randn(LENGTH, 1, WIDTH)),
            nn.Parameter(torch.randn(4, 1, WIDTH)),
        )
        self.unused = nn.MultiheadAttention(WIDTH, HEADS)
        self.biased = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
        self.by_head = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x):
        placed = x + self.positions
        x = x + self.itself(placed, placed, x)[0]
        x = x + self.biased(x, x, x)[0]
        mask = torch.arange(HEADS * x.shape[1])[:, None, None] * torch.ones(LENGTH, LENGTH) / 10
        x = x + self.by_head(x, x, x, attn_mask=mask * torch.eye(LENGTH))[0]
        queries = self.queries.expand(-1, x.shape[1], -1)
        return self.cross(queries, x[..., :10], x[..., :12], need_weights=False)[0]


def test_attention_of_any_shape_is_converted_and_what_cannot_be_stays():
    model, batches = Detector(), [torch.randn(LENGTH, 8, WIDTH) for _ in range(12)]
    result = sqa_convert.convert_modules(model, 2, 2, calibration=batches, refine_steps=10)
    assert set(attentions(result.model)) == {"itself", "cross"}
    assert set(attentions(result.model, nn.MultiheadAttention)) == {"unused", "biased", "by_head"}
    kept = result.report["kept"]
    assert (
        kept["unused"] == "no batch reaches it"
        and "add_bias_kv" in kept["biased"]
        and "differ by head" in kept["by_head"]
    )
    assert result.report["output_error"] < result.report["output_error_of_mean"]
    assert "stays: no batch reaches it" in str(result)


def test_masks_that_are_causal_in_some_batches_alone():
    """The last batches are held out: here alone they have another mask, or alone the causal one."""
    later = torch.ones(LENGTH, LENGTH).triu(1).bool()
    model = nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)}).eval()
    run = lambda model, batch: model["a"](batch[0], batch[0], batch[0], attn_mask=batch[1])[0]  # noqa: E731
    x = torch.randn(4, 30, LENGTH, WIDTH)
    for masks in ((later, later, later, None), (None, None, None, later)):
        batches = list(zip(x, masks, strict=True))
        same = sqa_convert.convert_modules(model, 3, 3, calibration=batches, run=run, refine_steps=0).report
        entry = same["modules"][0]
        assert entry["error"] == pytest.approx(same["output_error"], rel=0.05)  # of the same module on the same batches


def test_modules_that_not_all_batches_reach():
    model = nn.ModuleDict({n: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for n in ("a", "b")})
    run = lambda model, batch: model[batch[0]](batch[1], batch[1], batch[1])[0]  # noqa: E731
    batches = [(n, torch.randn(20, LENGTH, WIDTH)) for n in "aaaab"]  # the last is held out
    result = sqa_convert.convert_modules(model, 2, 2, calibration=batches, run=run, **FAST)
    assert [entry["module"] for entry in result.report["modules"]] == ["a", "b"]
    assert result.report["calibration"]["held_out_positions"] == 8 * LENGTH  # a tenth of what `a` reads


def test_what_counts_in_nothing_stays():
    """All of it is padding."""
    model, x = Classifier(), torch.randn(4, LENGTH, WIDTH)
    batches = [{"x": x, "padding": torch.ones(4, LENGTH).bool()}] * 2
    run = lambda model, batch: model.encoder.layers[0].self_attn(  # noqa: E731
        batch["x"], batch["x"], batch["x"], key_padding_mask=batch["padding"])[0].nan_to_num()  # fmt: skip
    result = sqa_convert.convert_modules(model, 2, 2, calibration=batches, run=run, **FAST)
    kept = result.report["kept"]
    assert kept["encoder.layers.1.self_attn"] == "no batch reaches it"
    assert kept["encoder.layers.0.self_attn"] == "nothing that it reads counts"
    assert result.report["modules"] == [] and "stays" in str(result)


def test_a_module_in_two_places_is_one_afterwards():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)})
    model["b"] = model["a"]
    run = lambda model, x: model["b"](x, model["a"](x, x, x)[0], x)[0]  # noqa: E731
    result = sqa_convert.convert_modules(model, 2, 1, calibration=[torch.randn(4, LENGTH, WIDTH)] * 2, run=run, **FAST)
    assert result.model["a"] is result.model["b"] and isinstance(result.model["a"], SparseQueryAttention)
    assert result.report["calibration"]["positions"] == 2 * 4 * LENGTH  # one of two batches, called twice


def test_some_modules_by_their_names_and_in_place():
    model = random_transformer()
    result = sqa_convert.convert_modules(model, 2, 2, calibration=texts(2), modules=["decoder.*"], inplace=True, **FAST)
    assert result.model is model
    assert set(attentions(model)) == {"decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"}
    assert result.report["kept"] == {"encoder.layers.0.self_attn": "not asked for"}


def test_heads_by_module():
    mine = Partition((((0, 3),), ((1,),), ((2,),)))
    result = sqa_convert.convert_modules(
        random_transformer(), calibration=texts(2), partition={"encoder.layers.0.self_attn": mine}, **FAST
    )
    made = attentions(result.model)
    assert (made["encoder.layers.0.self_attn"].q_groups, made["decoder.layers.0.self_attn"].q_groups) == (3, 4)
    assert result.report["modules"][0]["partition"] == mine.groups


def test_an_attention_alone_is_a_model():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    run = lambda model, x: model(x, x, x)[0]  # noqa: E731
    result = sqa_convert.convert_modules(
        module, 2, 1, calibration=torch.randn(10, 4, LENGTH, WIDTH).unbind(), run=run, **FAST
    )
    assert isinstance(result.model, SparseQueryAttention) and result.report["output_error"] > 0
    again = sqa_convert.load_modules(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), result.model.state_dict())
    x = torch.randn(2, LENGTH, WIDTH)
    close(again(x, x, x)[0], result.model(x, x, x)[0])


def test_the_same_seed_gives_the_same_layers_and_the_caller_keeps_what_was_set():
    batches, model = texts(4), random_transformer()
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, second = (sqa_convert.convert_modules(model, 2, 1, calibration=batches, **FAST).model for _ in range(2))
    assert torch.equal(torch.rand(1), expected) and torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["dict", "pt", "safetensors"])
def test_what_was_saved_is_loaded_again(tmp_path, kind):
    from safetensors.torch import save_file

    result = sqa_convert.convert_modules(
        random_transformer(), 2, 1, calibration=texts(2), modules=["*.self_attn"], **FAST
    )
    state = result.model.eval().state_dict()
    given = state if kind == "dict" else tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.save(state, given)
    elif kind == "safetensors":
        save_file(state, given)
    loaded = sqa_convert.load_modules(random_transformer(), given).eval()
    source, target = texts(1)[0]
    with torch.no_grad():
        close(loaded(source, target), result.model(source, target), 0)
    with pytest.raises(CheckpointError, match="another model"):
        sqa_convert.load_modules(nn.Transformer(WIDTH, HEADS, 2, 1, 2 * WIDTH), given)


def test_weights_of_another_model_change_nothing():
    result = sqa_convert.convert_modules(random_transformer(), 2, 1, calibration=None)
    state = result.model.state_dict()
    last = list(state)[-1]
    model = random_transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for wrong in (state | {last: torch.ones(3, 3)}, {k: v for k, v in state.items() if k != last}, state | {"x": 1}):
        with pytest.raises(CheckpointError, match="another model"):
            sqa_convert.load_modules(model, wrong)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(CheckpointError, match="is a ConvertedModules: give a state_dict"):
        sqa_convert.load_modules(model, result)


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        sqa_convert.load_modules(random_transformer(), tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="a list: it must be a state_dict"):
        sqa_convert.load_modules(random_transformer(), tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (UnsupportedModelError, "holds no nn.MultiheadAttention", {"model": nn.Linear(2, 2)}),
        (RecipeError, "model is a int", {"model": 3}),
        (RecipeError, "give q_groups and kv_groups, or variant", {"q_groups": None, "kv_groups": None}),
        (RecipeError, "q_groups=5", {"q_groups": 5, "kv_groups": 5}),
        (RecipeError, "kv_groups=2 must divide q_groups=3", {"q_groups": 3}),
        (RecipeError, "this model has encoder", {"modules": ["x.*"]}),
        (RecipeError, "method='best'", {"method": "best"}),
        (RecipeError, "partition='sorted'", {"partition": "sorted"}),
        (RecipeError, "partition for nothing", {"partition": {"nothing": Partition.identity(4)}}),
        (RecipeError, "refine_steps=-1", {"refine_steps": -1}),
        (RecipeError, "refine_steps=2.5", {"refine_steps": 2.5}),
        (RecipeError, "positions='many'", {"positions": "many"}),
        (RecipeError, "seed=-1", {"seed": -1}),
        (QualityError, "is not finite", {"calibration": [(torch.full((2, LENGTH, WIDTH), math.nan),) * 2] * 2}),
        (DataError, "embedding dimension", {"model": nn.MultiheadAttention(8, 4), "calibration": [texts(1)[0] * 2]}),
        (RecipeError, "need calibration", {"calibration": None, "refit": True}),
        (RecipeError, "positions=0", {"positions": 0}),
        (DataError, "there is no batch", {"calibration": []}),
        (DataError, "not one Tensor", {"calibration": torch.ones(3)}),
        (DataError, "batch of Tensor with tensors of shapes \\(3, 3\\)", {"calibration": [torch.ones(3, 3)]}),
        (DataError, "no batch reaches", {"run": lambda model, batch: batch}),
    ],
)  # fmt: skip
def test_what_is_not_possible_is_one_line(error, said, arguments):
    given = {"model": random_transformer(), "q_groups": 2, "kv_groups": 2, "calibration": texts(1)} | arguments
    with pytest.raises(error, match=said) as raised:
        sqa_convert.convert_modules(**given)
    assert "\n" not in str(raised.value)


def test_the_definition_of_attention_knows_masks_and_values():
    """What fits are held to, against torch."""
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x, values, mask = torch.randn(3, LENGTH, WIDTH), torch.randn(3, LENGTH, WIDTH), torch.randn(3, LENGTH, LENGTH)
    attended = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [2]])
    later = torch.arange(LENGTH) > torch.arange(LENGTH)[:, None]
    expected, weights = module(
        x, x, values, attn_mask=mask.masked_fill(later, -torch.inf).repeat_interleave(HEADS, 0),
        key_padding_mask=torch.zeros(3, LENGTH).masked_fill(~attended, -torch.inf), average_attn_weights=False,
    )  # fmt: skip
    attention, heads, rows = Attention(module.head_dim**-0.5, causal=True), heads_of(module), torch.tensor([0, 3, 5])
    close(attention.layer(heads, x, None, attended, values, mask), expected)
    close(attention.patterns(heads, x, rows, None, attended, mask), weights[:, :, rows])
