"""The layers: at all heads nothing but `nn.MultiheadAttention`, with fewer what the mathematics says."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sqa_convert import VARIANTS, Partition
from sqa_convert.errors import RecipeError
from sqa_convert.heads import variant_heads
from sqa_convert.layers import (
    KeyValueCache,
    SparseQueryAttention,
    SparseQueryTransformer,
    SparseQueryTransformerDecoderLayer,
    SparseQueryTransformerEncoderLayer,
    grouped_attention,
)
from sqa_convert.layers.multihead_weights import heads_of

DRAWN = 240  # configurations
AT_ONCE = 30


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance)


def settings(draw):
    heads, d = draw.choice([1, 2, 3, 4]), draw.choice([2, 4])
    width = heads * d
    return {
        "embed_dim": width, "num_heads": heads, "dropout": draw.choice([0.0, 0.0, 0.3]),
        "bias": draw.random() < 0.7, "add_bias_kv": draw.random() < 0.15, "add_zero_attn": draw.random() < 0.15,
        "kdim": draw.choice([None, None, width, 5]), "vdim": draw.choice([None, None, width, 7]),
        "batch_first": draw.random() < 0.5,
    }  # fmt: skip


def a_mask(draw, shape, floating, causal=False):
    """Nobody is masked from all keys: of those rows torch makes what is no number."""
    blocked = ~torch.ones(shape).bool().tril() if causal else torch.rand(shape) < 0.3
    blocked[..., 0] = False
    if not floating:
        return blocked
    return torch.zeros(shape).masked_fill(blocked, -torch.inf) + (0 if causal else torch.randn(shape))


def call(draw, module):
    """Arguments of one call: (query, key, value), and the rest by name."""
    batch, length, keys = draw.choice([1, 2, 3]), draw.choice([1, 2, 5]), draw.choice([1, 4, 6])
    batched, itself = draw.random() < 0.8, draw.random() < 0.4
    itself = itself and module.kdim == module.vdim == module.embed_dim
    keys = length if itself else keys

    def input_of(count, width):
        if not batched:
            return torch.randn(count, width, requires_grad=True)
        shape = (batch, count) if module.batch_first else (count, batch)
        return torch.randn(*shape, width, requires_grad=True)

    query = input_of(length, module.embed_dim)
    key = query if itself else input_of(keys, module.kdim)
    value = query if itself else input_of(keys, module.vdim)
    floating = draw.random() < 0.5
    given = {"need_weights": draw.random() < 0.6, "average_attn_weights": draw.random() < 0.5}
    if draw.random() < 0.4:
        given["key_padding_mask"] = a_mask(draw, (batch, keys) if batched else (keys,), floating)
    kind = draw.choice([None, "causal", 2, 3])
    extra = module.bias_k is not None or module.add_zero_attn
    if kind == "causal" and not extra:  # by its hint torch leaves out the key that comes from no input
        given |= {"attn_mask": a_mask(draw, (length, keys), floating, causal=True), "is_causal": True}
    elif kind in (2, 3):
        shape = (length, keys) if kind == 2 else ((batch if batched else 1) * module.num_heads, length, keys)
        given["attn_mask"] = a_mask(draw, shape, floating)
    return (query, key, value), given


def results(module, inputs, given):
    """Output, weights, and the gradients of inputs and of all weights by name."""
    torch.manual_seed(1)  # of dropout
    for leaf in inputs:
        leaf.grad = None
    output, weights = module(*inputs, **given)
    (
        (output * torch.linspace(0, 1, output.shape[-1])).sum() + (0 if weights is None else weights.square().sum())
    ).backward()
    return output, weights, [leaf.grad for leaf in inputs]


def gradients(module):
    """Of an nn.MultiheadAttention or its equal, as one vector in the same order."""
    if isinstance(module, SparseQueryAttention):
        linears = (module.q_proj, module.k_proj, module.v_proj)
        found = [linear.weight.grad for linear in linears] + [
            linear.bias.grad for linear in linears if linear.bias is not None
        ]
    elif module._qkv_same_embed_dim:
        found = [module.in_proj_weight.grad]
    else:
        found = [module.q_proj_weight.grad, module.k_proj_weight.grad, module.v_proj_weight.grad]
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_bias is not None:
        found.append(module.in_proj_bias.grad)
    found += [p.grad for p in (*module.out_proj.parameters(), module.bias_k, module.bias_v) if p is not None]
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("start", range(0, DRAWN, AT_ONCE))
def test_at_all_heads_it_is_torchs_own_with_any_arguments(start):
    for seed in range(start, start + AT_ONCE):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        given_settings = settings(draw)
        module = nn.MultiheadAttention(**given_settings)
        for name, parameter in module.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
        module.train(draw.random() < 0.7)
        layer = SparseQueryAttention.from_multihead(module)
        inputs, given = call(draw, module)
        expected, found = results(module, inputs, given), results(layer, inputs, given)
        context = f"seed {seed}: {given_settings} {sorted(given)}"
        assert (found[1] is None) == (not given["need_weights"]), context
        for ours, theirs in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
            if theirs is not None:
                assert ours.shape == theirs.shape, context
                torch.testing.assert_close(
                    ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda said, at=context: f"{at}: {said}"
                )
        torch.testing.assert_close(gradients(layer), gradients(module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_at_all_heads_it_equals_torchs_fused_kernel(batch_first):
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    layer = SparseQueryAttention.from_multihead(module)
    x, padding = torch.randn(3, 3, 16), torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()
    with torch.no_grad():
        close(layer(x, x, x, key_padding_mask=padding)[0], module(x, x, x, key_padding_mask=padding)[0])


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_attention_is_torchs_with_heads_repeated(kv_heads, mask):
    query, key, value = torch.randn(2, 6, 5, 4), torch.randn(2, kv_heads, 5, 4), torch.randn(2, kv_heads, 5, 3)
    given = {"bool": torch.rand(2, 1, 5, 5) > 0.3, "float": torch.randn(6, 5, 5)}.get(mask)
    if mask == "bool":
        given[..., 0] = True
    repeated = (key.repeat_interleave(6 // kv_heads, 1), value.repeat_interleave(6 // kv_heads, 1))
    expected = scaled_dot_product_attention(query, *repeated, given, is_causal=mask == "causal", scale=0.3)
    arguments = {"attn_mask": given, "is_causal": mask == "causal", "scale": 0.3}
    output, nothing = grouped_attention(query, key, value, **arguments)
    same, weights = grouped_attention(query, key, value, **arguments, need_weights=True)
    assert nothing is None
    close(output, expected)
    close(same, expected)
    close(weights @ repeated[1], expected)
    averaged = grouped_attention(query, key, value, **arguments, need_weights=True, average_attn_weights=True)[1]
    close(averaged, weights.mean(1))


def test_dropped_weights_are_those_returned():
    query, key = torch.randn(1, 4, 6, 3), torch.randn(1, 2, 6, 3)
    output, weights = grouped_attention(query, key, key, dropout_p=0.5, need_weights=True)
    assert 0 < (weights == 0).sum() < weights.numel()
    close(output, weights @ key.repeat_interleave(2, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_its_heads_and_attends(variant):
    layer = SparseQueryAttention(24, 12, batch_first=True, variant=variant)
    counts = variant_heads(variant, 12)
    assert (layer.q_groups, layer.kv_groups) == counts
    assert [tuple(p.weight.shape) for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)] == [
        (2 * counts[0], 24), (2 * counts[1], 24), (2 * counts[1], 24), (24, 2 * counts[0])
    ]  # fmt: skip
    x = torch.randn(2, 5, 24)
    output, weights = layer(x, x, x, average_attn_weights=False)
    heads = [linear(x).unflatten(-1, (-1, 2)).transpose(1, 2) for linear in (layer.q_proj, layer.k_proj, layer.v_proj)]
    key, value = (kv.repeat_interleave(counts[0] // counts[1], 1) for kv in heads[1:])
    expected = (heads[0] @ key.mT / 2**0.5).softmax(-1)
    close(weights, expected)
    close(output, layer.out_proj((expected @ value).transpose(1, 2).flatten(2)))


def copies(partition, d=3):
    """A module whose heads are copies within the groups of a partition; output projections differ."""
    module = nn.MultiheadAttention(partition.heads * d, partition.heads, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    with torch.no_grad():
        for matrix in (module.in_proj_weight, module.in_proj_bias):
            for part, groups in zip(matrix.chunk(3), (partition.clusters, *[partition.kv_groups] * 2), strict=True):
                heads = part.unflatten(0, (-1, d))
                for group in groups:
                    heads[list(group)] = heads[group[0]].clone()
    return module


@pytest.mark.parametrize("method", ["mean", "first", "svd"])
def test_expanded_heads_contract_without_loss(method):
    partition = Partition((((0, 3), (5,)), ((1,), (2, 4))))
    module = copies(partition)
    layer = SparseQueryAttention.from_multihead(module, method=method, partition=partition)
    assert (layer.q_groups, layer.kv_groups) == (4, 2)
    x = torch.randn(2, 7, 18)
    close(layer(x, x, x)[0], module(x, x, x)[0], 1e-5)
    found = SparseQueryAttention.from_multihead(module, 4, 2)  # the partition is searched for
    close(found(x, x, x)[0], module(x, x, x)[0], 1e-5)


def test_keys_and_values_of_other_widths_are_converted():
    module = nn.MultiheadAttention(12, 4, kdim=5, vdim=7)
    layer = SparseQueryAttention.from_multihead(module, 2, 1)
    assert (layer.k_proj.in_features, layer.v_proj.in_features) == (5, 7)
    output, weights = layer(torch.randn(3, 2, 12), torch.randn(6, 2, 5), torch.randn(6, 2, 7))
    assert output.shape == (3, 2, 12) and weights.shape == (2, 3, 6)


def test_the_layer_is_the_modules_in_dtype_and_mode():
    module = nn.MultiheadAttention(8, 4, dropout=0.2, batch_first=True).to(torch.bfloat16).eval().requires_grad_(False)
    layer = SparseQueryAttention.from_multihead(module, 2)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16} and not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert (layer.dropout, layer.batch_first, layer.kv_groups) == (0.2, True, 2)
    close(layer.out_proj.bias, module.out_proj.bias, 0.1)


def test_masks_of_the_heads_there_were_are_taken():
    layer = SparseQueryAttention(12, 6, batch_first=True, q_groups=3, kv_groups=1)
    x, mask = torch.randn(2, 4, 12), torch.randn(2, 4, 4)
    expected = layer(x, x, x, attn_mask=mask.repeat_interleave(3, 0))[0]
    close(layer(x, x, x, attn_mask=mask.repeat_interleave(6, 0))[0], expected)
    close(layer(x, x, x, attn_mask=mask)[0], expected)


@pytest.mark.parametrize("rotary_base", [None, 10000.0])
def test_decoding_with_a_cache_is_reading_at_once(rotary_base):
    layer = SparseQueryAttention(16, 4, batch_first=True, q_groups=4, kv_groups=2, rotary_base=rotary_base)
    x = torch.randn(3, 7, 16)
    expected = layer(x, x, x, is_causal=True, need_weights=False)[0]
    cache, found = KeyValueCache(), []
    for piece in x.split([3, 1, 2, 1], 1):
        found.append(layer(piece, piece, piece, is_causal=True, need_weights=False, cache=cache)[0])
    close(torch.cat(found, 1), expected)
    assert len(cache) == 7 and cache.nbytes == 2 * 3 * 2 * 7 * 4 * 4
    cache.reorder(torch.tensor([2, 2]))
    assert cache.key.shape == (2, 2, 7, 4)


def test_rotary_scores_know_distances_alone():
    layer = SparseQueryAttention(8, 2, batch_first=True, rotary_base=100.0)
    x = torch.randn(1, 1, 8).expand(1, 6, 8)  # the same everywhere: scores differ by distance alone
    weights = layer(x, x, x, average_attn_weights=False)[1].log()
    steps = weights[..., :-1] - weights[..., 1:]
    close(steps[..., 1:, 1:], steps[..., :-1, :-1], 1e-4)
    assert steps.abs().max() > 1e-3


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_are_torchs_but_for_their_attention(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first).eval()
    ours = SparseQueryTransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first).eval()
    attention = SparseQueryAttention.from_multihead(layer.self_attn)
    ours.load_state_dict(
        {name: p for name, p in layer.state_dict().items() if not name.startswith("self_attn.")}
        | {f"self_attn.{name}": p for name, p in attention.state_dict().items()}
    )
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [1]])
    expected, found = (
        nn.TransformerEncoder(one, 2, enable_nested_tensor=False).eval()(x, src_key_padding_mask=padding)
        for one in (layer, ours)
    )
    close(found[~padding], expected[~padding], 1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_with_fewer_heads_trains(batch_first):
    model = SparseQueryTransformer(16, 4, 1, 2, 32, batch_first=batch_first, variant="xsqa")
    attentions = [module for module in model.modules() if isinstance(module, SparseQueryAttention)]
    assert len(attentions) == 5 and {(a.q_groups, a.kv_groups) for a in attentions} == {(1, 1)}
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    x, y = torch.randn(3, 3, 16), torch.randn(3, 3, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    padding = torch.tensor([[0, 0, 1]]).bool().expand(3, 3)
    output = model(x, y, tgt_mask=causal, tgt_is_causal=True, src_key_padding_mask=padding)
    output.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():  # nothing of torch's fused kernels is tried
        assert model.eval()(x, y, src_key_padding_mask=padding).shape == y.shape
    decoder = SparseQueryTransformerDecoderLayer(16, 4, 32, q_groups=2, kv_groups=1)
    assert (decoder.self_attn.q_groups, decoder.multihead_attn.kv_groups) == (2, 1)


def test_fresh_weights_are_drawn_as_torchs():
    wide = {
        name: SparseQueryAttention(64, 4, **sizes)
        for name, sizes in {"one": {}, "two": {"kdim": 16, "vdim": 16}}.items()
    }
    torchs = {
        name: nn.MultiheadAttention(64, 4, **sizes)
        for name, sizes in {"one": {}, "two": {"kdim": 16, "vdim": 16}}.items()
    }
    for name, layer in wide.items():
        heads = heads_of(torchs[name])
        for linear, expected in ((layer.q_proj, heads.query), (layer.k_proj, heads.key)):
            assert linear.weight.std().item() == pytest.approx(expected.std().item(), rel=0.1)
            assert linear.weight.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.05)
            assert not linear.bias.any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim 10"),
        ({"embed_dim": 8, "num_heads": 4, "q_groups": 5}, "q_groups=5"),
        ({"embed_dim": 8, "num_heads": 4, "q_groups": 3, "kv_groups": 2}, "kv_groups=2 must divide q_groups=3"),
        ({"embed_dim": 8, "num_heads": 4, "variant": "tiny"}, "variant='tiny'"),
        ({"embed_dim": 8, "num_heads": 4, "variant": "sqa", "q_groups": 2}, "give it, or q_groups"),
        ({"embed_dim": 6, "num_heads": 2, "rotary_base": 100.0}, "no pairs"),
    ],
)
def test_settings_that_are_not_possible_are_refused_by_name(settings, said):
    with pytest.raises(RecipeError, match=said):
        SparseQueryAttention(**settings)


def test_what_cannot_be_read_is_refused():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return query, None

    for module, said in [
        (nn.Linear(3, 3), "not Linear"),
        (Own(8, 4), "Own computes attention in a way of its own"),
        (nn.MultiheadAttention(8, 4, add_bias_kv=True), "add_bias_kv=True"),
        (nn.MultiheadAttention(8, 4, add_zero_attn=True), "add_zero_attn=True"),
    ]:
        with pytest.raises(RecipeError, match=said):
            SparseQueryAttention.from_multihead(module, 2)
    with pytest.raises(RecipeError, match="partition of 6 heads"):
        SparseQueryAttention.from_multihead(nn.MultiheadAttention(8, 4), partition=Partition.identity(6))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"key": torch.ones(2, 3, 7)}, "key of width 8"),
        ({"value": torch.ones(2, 4, 8)}, "as many"),
        ({"attn_mask": torch.zeros(3, 4)}, "attn_mask of shape"),
        ({"attn_mask": torch.zeros(3, 3).long()}, "int64"),
        ({"key_padding_mask": torch.zeros(2, 4)}, "key_padding_mask of shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(given, said):
    layer = SparseQueryAttention(8, 4, batch_first=True, q_groups=2)
    x = torch.ones(2, 3, 8)
    with pytest.raises(RecipeError, match=said):
        layer(**{"query": x, "key": x, "value": x} | given)


def test_a_layer_is_copied_saved_and_compiled_as_any(tmp_path):
    layer = SparseQueryAttention(8, 4, batch_first=True, q_groups=2, kv_groups=1).eval()
    other = SparseQueryAttention(8, 4, batch_first=True, q_groups=2, kv_groups=1).eval()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(2, 3, 8)
    expected = layer(x, x, x)[0]
    close(other(x, x, x)[0], expected)
    close(copy.deepcopy(layer)(x, x, x)[0], expected)
    exported = torch.export.export(layer, (x, x, x), {"need_weights": False}).module()
    close(exported(x, x, x, need_weights=False)[0], expected)
