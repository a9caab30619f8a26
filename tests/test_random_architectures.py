"""Whatever the architecture, what is promised of the result is what comes out."""

from typing import NamedTuple

import pytest
import torch
from helpers import gpt2, inputs_for, t5, tokens, use_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sqa_convert import convert
from sqa_convert.heads import METHODS, Partition

CONTEXT = 9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDEST = 160  # heads times their dimension: what keeps an example under a second


class Architecture(NamedTuple):
    family: str
    heads: int
    head_dim: int
    width: int
    layers: int
    decoder_layers: int
    q_groups: int
    kv_groups: int
    dtype: str
    tied: bool
    gated: bool
    method: str
    seed: int

    def model(self):
        torch.manual_seed(self.seed)
        if self.family == "gpt2":
            model = gpt2(
                self.heads, self.head_dim, self.layers, n_positions=CONTEXT, tie_word_embeddings=self.tied, n_inner=12
            )
        else:
            model = t5(
                self.heads, self.layers, d_kv=self.head_dim, d_model=self.width, d_ff=12, n_positions=CONTEXT,
                num_decoder_layers=self.decoder_layers, tie_word_embeddings=self.tied,
                feed_forward_proj="gated-gelu" if self.gated else "relu",
            )  # fmt: skip
        return model.to(DTYPES[self.dtype])


@st.composite
def architectures(draw, dtypes=tuple(DTYPES)):
    heads = draw(st.integers(1, 25))
    q_groups = draw(st.integers(1, heads))
    layers = draw(st.integers(1, 4))
    return Architecture(
        family=draw(st.sampled_from(["gpt2", "t5"])),
        heads=heads,
        head_dim=draw(st.integers(2, min(80, WIDEST // heads))),
        width=draw(st.integers(1, 80)),
        layers=layers,
        decoder_layers=draw(st.integers(1, layers)),  # more than encoder layers breaks the stock model's cache
        q_groups=q_groups,
        kv_groups=draw(st.sampled_from([n for n in range(1, q_groups + 1) if q_groups % n == 0])),
        dtype=draw(st.sampled_from(dtypes)),
        tied=draw(st.booleans()),
        gated=draw(st.booleans()),
        method=draw(st.sampled_from(sorted(METHODS))),
        seed=draw(st.integers(0, 2**32)),
    )


def many(examples):
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


def linear_flops(model):
    """Of what is not attention: feed-forward and language model head."""
    ends = (".mlp", "DenseReluDense")
    parts = [module for name, module in model.named_modules() if name.endswith(ends) or name == "lm_head"]
    return sum(2 * CONTEXT * p.numel() for part in parts for p in part.parameters() if p.ndim == 2)


@many(30)
@given(architecture=architectures(), whole=st.booleans())
@pytest.mark.integration
def test_parameters_cache_operations_and_dtype_are_as_promised(tmp_path_factory, architecture, whole):
    folder = tmp_path_factory.mktemp("random")
    source = architecture.model()
    source.save_pretrained(folder / "source")
    how = {"method": architecture.method, "output": folder / "sqa", "calibration": None}
    how["partition"] = (
        {"decoder.0": Partition.identity(architecture.heads)} if whole and architecture.layers > 1 else None
    )
    conversion = convert(folder / "source", architecture.q_groups, architecture.kv_groups, **how)
    auto = AutoModelForCausalLM if architecture.family == "gpt2" else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(folder / "sqa", dtype="auto").eval()

    cost = conversion.report["cost"]["after"]
    assert model.num_parameters() == cost["parameters"]
    with safe_open(folder / "sqa" / "model.safetensors", "pt") as weights:
        stored = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in stored.values()} == {source.dtype} == {model.dtype}
    loaded = model.state_dict()
    assert stored.keys() <= loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())

    use_attention(model, "eager")
    ids = tokens(2, CONTEXT)
    inputs = inputs_for(model, ids)
    if architecture.family == "t5":
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        result = model(**inputs, use_cache=True)
        caches = result.past_key_values
        caches = (
            [caches] if architecture.family == "gpt2" else [caches.self_attention_cache, caches.cross_attention_cache]
        )
        held = sum(layer.keys.nbytes + layer.values.nbytes for cache in caches for layer in cache.layers)
        assert held == cost["kv_cache_bytes_per_token"] * ids.numel()

        with FlopCounterMode(display=False) as counter:
            model(**{name: value[:1] for name, value in inputs.items()}, use_cache=False)
        assert conversion.report["context_tokens"] == CONTEXT
        assert counter.get_total_flops() - linear_flops(model) == cost["attention_flops"]

        model.float()
        decoded = "input_ids" if architecture.family == "gpt2" else "decoder_input_ids"
        whole = model(**inputs, use_cache=False).logits
        first = model(**inputs | {decoded: ids[:, :-1]}, use_cache=True)
        last = model(**inputs | {decoded: ids[:, -1:]}, past_key_values=first.past_key_values).logits
    assert whole.isfinite().all() and whole.shape[-1] == source.config.vocab_size
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-3, atol=1e-3)


@many(10)
@given(architecture=architectures(("bfloat16", "float16")))
def test_half_precision_loses_no_more_than_its_rounding(architecture):
    dtype = DTYPES[architecture.dtype]
    source = architecture.model()
    counts = architecture.q_groups, architecture.kv_groups, architecture.method
    halves = convert(source, *counts, partition="contiguous", calibration=None).model.state_dict()
    wholes = convert(source.float(), *counts, partition="contiguous", calibration=None).model.state_dict()
    for name, half in halves.items():
        assert half.dtype == dtype or ".wo." in name  # T5's, which transformers keeps in float32 beside float16
        torch.testing.assert_close(half.float(), wholes[name], rtol=torch.finfo(dtype).eps, atol=1e-6)


def share(model, partition):
    """Gives the heads of a cluster the same queries and position bias, those of a group the same keys and values."""
    first_of_cluster = {h: cluster[0] for cluster in partition.clusters for h in cluster}
    first_of_group = {h: group[0] for group in partition.kv_groups for h in group}
    queries = torch.tensor([first_of_cluster[h] for h in range(partition.heads)])
    keys = torch.tensor([first_of_group[h] for h in range(partition.heads)])

    def picked(weight, heads):
        return weight.unflatten(0, (partition.heads, -1))[heads].flatten(0, 1)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn" in name:
                by_row = parameter.t() if parameter.ndim == 2 else parameter
                query, key, value = by_row.chunk(3)
                merged = torch.cat([picked(query, queries), picked(key, keys), picked(value, keys)])
                parameter.copy_(merged.t() if parameter.ndim == 2 else merged)
            elif name.endswith((".q.weight", ".k.weight", ".v.weight")):
                parameter.copy_(picked(parameter, queries if name.endswith(".q.weight") else keys))
            elif "relative_attention_bias" in name:
                parameter.copy_(parameter[:, queries])
    return model


@many(20)
@given(architecture=architectures(), method=st.sampled_from(["mean", "first", "svd"]), whole=st.booleans())
def test_heads_that_are_equal_merge_without_loss(architecture, method, whole):
    partition = Partition.contiguous(architecture.heads, architecture.q_groups, architecture.kv_groups)
    source = share(architecture._replace(dtype="float32").model(), partition)
    kinds = ("decoder",) if architecture.family == "gpt2" else ("encoder", "decoder", "cross")
    given = dict.fromkeys(kinds, partition) | ({"decoder.0": Partition.identity(architecture.heads)} if whole else {})
    converted = convert(source, method=method, partition=given, calibration=None).model
    inputs = inputs_for(source, tokens(2, CONTEXT))
    with torch.no_grad():
        expected, got = source(**inputs).logits, converted(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("heads, head_dim", [(1, 80), (25, 2), (25, 64)])
def test_the_extremes_convert(family, heads, head_dim):
    architecture = Architecture(family, heads, head_dim, 40, 1, 1, 1, 1, "bfloat16", True, False, "svd", 0)
    model = convert(architecture.model(), 1, 1, "mean").model
    with torch.no_grad():
        assert model(**inputs_for(model, tokens(1, CONTEXT))).logits.isfinite().all()
