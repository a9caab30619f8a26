"""The two architectures: every way to run them gives the same numbers."""

import inspect

import pytest
import torch
from helpers import (
    SOURCES,
    UNEVEN,
    VOCABULARY,
    convert_model,
    gpt2,
    inputs_for,
    logits,
    padded,
    sqa_gpt2,
    sqa_t5,
    t5,
    tokens,
    use_attention,
)
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AttentionInterface,
    AutoModel,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from sqa_convert.models import SQAGPT2Config, SQAT5Config

MAKERS = {"gpt2": sqa_gpt2, "t5": sqa_t5}
HEADS = [(6, 1), (6, 3), (6, 6), (8, 4), "uneven"]


def made(family, heads):
    return MAKERS[family](**UNEVEN[family]) if heads == "uneven" else MAKERS[family](*heads)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_identity_conversion_keeps_the_logits(name, attention):
    source = SOURCES[name]()
    use_attention(source, attention)
    result = convert_model(source, 12, 12)
    use_attention(result, attention)
    ids, mask = padded()
    for case in ((ids, None), (ids, mask)):
        expected, found = logits(source, *case), logits(result, *case)
        if "t5" in name:
            assert torch.equal(found, expected)
        else:
            close(found, expected)


@pytest.mark.parametrize("name", ["gpt2", "t5", "mt5"])
def test_identity_conversion_keeps_every_step_of_cached_generation(name):
    source = SOURCES[name]()
    result = convert_model(source, 12, 12)
    ids, mask = padded(length=9)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    options |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    expected, found = source.generate(ids, **options), result.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        if name == "gpt2":
            close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("heads", HEADS)
def test_eager_equals_sdpa(family, heads):
    model = made(family, heads)
    for case in ((tokens(), None), padded()):
        use_attention(model, "sdpa")
        expected = logits(model, *case)
        use_attention(model, "eager")
        close(logits(model, *case), expected, 1e-4)


@pytest.mark.integration
def test_flex_attention_equals_sdpa():
    # Its CPU kernel wants a head size of 16 or more, and takes grouped queries only when compiled.
    model = sqa_gpt2(8, 4, head_dim=16, n_positions=128)
    ids, mask = padded(length=20)
    expected = logits(model, ids, mask)
    use_attention(model, "flex_attention")
    close(logits(model, ids, mask), expected, 1e-4)


def test_flash_attention_is_offered_for_gpt2_alone():
    assert sqa_gpt2()._supports_flash_attn
    assert not sqa_t5()._supports_flash_attn


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("heads", HEADS)
def test_dynamic_and_static_cache_equal_no_cache(family, heads):
    model = made(family, heads)
    ids, mask = padded(length=9)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    without = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, use_cache=True, **options), without)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), without)
    assert torch.equal(model.generate(ids, num_beams=1, **options), without)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("heads", [(8, 4), "uneven"])
def test_beams_with_cache_equal_beams_without(family, heads):
    model = made(family, heads)
    ids, mask = padded(length=9)
    options = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_static_cache_step_by_step_equals_one_pass():
    for model in (made(family, heads) for family in MAKERS for heads in ((8, 4), "uneven")):
        ids = tokens(2, 8)
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs = {"encoder_outputs": model.encoder(tokens(2, 5)), "decoder_input_ids": ids}
            cache = EncoderDecoderCache(
                StaticCache(config=model.config, max_cache_len=12), StaticCache(config=model.config, max_cache_len=5)
            )
        else:
            cache = StaticCache(config=model.config, max_cache_len=12)
        expected = model(**inputs, use_cache=False).logits
        key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        steps = [model(**inputs | {key: ids[:, i : i + 1]}, past_key_values=cache, use_cache=True) for i in range(8)]
        close(torch.cat([s.logits for s in steps], 1), expected, 1e-4)


def cache_bytes(cache):
    layers = cache.layers if not isinstance(cache, EncoderDecoderCache) else [
        *cache.self_attention_cache.layers, *cache.cross_attention_cache.layers
    ]  # fmt: skip
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("heads", [(8, 4), (6, 1), (12, 12)])
def test_measured_cache_is_exactly_smaller_by_the_kv_heads(name, heads):
    source = SOURCES[name]()
    result = convert_model(source, *heads)
    ids = tokens(2, 11)
    sizes = [cache_bytes(m(**inputs_for(m, ids), use_cache=True).past_key_values) for m in (source, result)]
    assert sizes[1] * 12 == sizes[0] * heads[1]


@pytest.mark.skipif(
    "per_layer_config" not in inspect.getsource(GenerationMixin._get_static_cache_init_shape),
    reason="this release of transformers lays out such a cache by one number of heads",
)
@torch.no_grad()
def test_a_cache_that_is_made_before_the_first_token_has_room_by_layer():
    model = made("gpt2", "uneven")
    ids = tokens(2, 9)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = model.generate(ids, use_cache=False, **options)
    how = {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 4}
    kept = model.generate(ids, **how, return_dict_in_generate=True, **options)
    assert torch.equal(kept.sequences, whole)
    assert [layer.keys.shape[1] for layer in kept.past_key_values.layers] == [4, 6]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_token_sees_a_later_one(attention):
    for model in (sqa_gpt2(8, 4, attention), sqa_t5(8, 4, attention)):
        ids = tokens(1, 10)
        changed = ids.clone()
        changed[0, 6:] = (changed[0, 6:] + 1) % VOCABULARY
        key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        other = {"input_ids": tokens(1, 5)} if model.config.is_encoder_decoder else {}
        before, after = (model(**other | {key: t}).logits[0] for t in (ids, changed))
        assert torch.equal(before[:6], after[:6])
        assert not torch.equal(before[6:], after[6:])


@torch.no_grad()
@pytest.mark.parametrize("family", MAKERS)
def test_padding_changes_nothing(family):
    model = MAKERS[family](8, 4)
    ids = tokens(1, 9)
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    if family == "gpt2":
        close(logits(model, left, mask), logits(model, ids), 1e-4)
    else:  # T5's positions are relative, so the encoder output does not move
        close(model.encoder(left, attention_mask=mask)[0][:, 4:], model.encoder(ids)[0], 1e-4)


@torch.no_grad()
def test_output_attentions_are_distributions_of_all_query_heads():
    model = sqa_gpt2(6, 3, "eager")
    attentions = model(tokens(2, 7), output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 6, 7, 7)] * 2
    close(attentions[0].sum(-1), torch.ones(2, 6, 7))
    model = sqa_t5(6, 3, "eager", site_heads={"encoder": [4, 2], "cross": [5, 5]})
    result = model(input_ids=tokens(2, 7), decoder_input_ids=tokens(2, 5), output_attentions=True)
    assert result.encoder_attentions[0].shape == (2, 4, 7, 7)
    assert result.decoder_attentions[0].shape == (2, 6, 5, 5)
    assert result.cross_attentions[1].shape == (2, 5, 5, 7)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("heads", [(6, 3), "uneven"])
def test_gradient_checkpointing_gives_the_same_gradients(family, heads):
    model = made(family, heads)
    ids = tokens(2, 9)

    def gradients():
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        close(checkpointed[name], gradient, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", MAKERS)
def test_compiles_once_for_all_lengths_without_graph_breaks(family):
    model = made(family, "uneven")
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in (19, 37, 29):
        inputs = {"input_ids": tokens(2, length), "use_cache": False}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens(2, length // 3)
        close(compiled(**inputs).logits, model(**inputs).logits, 1e-4)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_single_position_attends_as_the_same_position_of_many():
    model = sqa_t5(6, 3, attention="eager")
    ids, written, mask = tokens(2, 7), tokens(2, 5), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    cache = model(ids, mask, decoder_input_ids=written[:, :-1], use_cache=True).past_key_values
    more = {"attention_mask": mask, "output_attentions": True}
    last = model(ids, decoder_input_ids=written[:, -1:], past_key_values=cache, **more)
    full = model(ids, decoder_input_ids=written, **more)
    close(last.logits, full.logits[:, -1:], 1e-5)
    for one, all_of_them in zip(last.decoder_attentions + last.cross_attentions,
                                full.decoder_attentions + full.cross_attentions, strict=True):  # fmt: skip
        close(one, all_of_them[:, :, -1:], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_every_shape_reach_a_single_position(attention):
    model = sqa_t5(6, 3, attention)
    layer = model.decoder.block[0].layer[1].EncDecAttention
    hidden, read = torch.randn(2, 1, 20), torch.randn(2, 7, 20)
    mask = torch.where(torch.rand(2, 6, 1, 7) < 0.3, -1e4, 0.0)
    of_all = mask[:, :1]
    twice = hidden.expand(-1, 2, -1)
    for one in (mask, of_all, None):
        many = None if one is None else one.expand(-1, -1, 2, -1)
        alone = layer(hidden, one, key_value_states=read)[0]
        close(alone, layer(twice, many, key_value_states=read)[0][:, :1], 1e-5)


@pytest.mark.parametrize("option", ["scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_score_scaling_options_reach_the_scores(option):
    """The identity tests compare with the stock model; here: the option is not a no-op that passes by accident."""
    ids = tokens()
    on = gpt2(**{option: True})
    off = gpt2(**{option: False})
    off.load_state_dict(on.state_dict())
    for model in (on, off):
        use_attention(model, "eager")
    result = convert_model(on, 12, 12)
    use_attention(result, "eager")
    if option == "reorder_and_upcast_attn":  # shows only below float32
        on, off, result = on.bfloat16(), off.bfloat16(), result.bfloat16()
        assert not torch.equal(logits(on, ids), logits(off, ids))
        assert (logits(result, ids) - logits(on, ids)).abs().max() < 0.2
    else:
        assert (logits(on, ids) - logits(off, ids)).abs().max() > 1e-2
        close(logits(result, ids), logits(on, ids))


@torch.no_grad()
def test_every_t5_layer_follows_its_own_bias_table():
    """With q and k zero only the position bias attends; a merged head must follow its cluster's mean column."""
    source = t5(heads=4, layers=3)
    for name, parameter in source.named_parameters():
        if name.endswith((".q.weight", ".k.weight")):
            parameter.zero_()
        if "relative_attention_bias" in name:
            parameter.mul_(10)
    result = convert_model(source, 2, 1)
    use_attention(result, "eager")
    use_attention(source, "eager")
    ids = tokens(1, 9)
    before, after = (m.encoder(ids, output_attentions=True).attentions for m in (source, result))
    for old, new in zip(before, after, strict=True):
        mixed = torch.stack([old[0, [0, 1]].log().mean(0), old[0, [2, 3]].log().mean(0)]).softmax(-1)
        close(new[0], mixed, 1e-4)
    # and a table changed in one layer alone changes that layer alone
    table = result.encoder.block[1].layer[0].SelfAttention.relative_attention_bias.weight
    table.add_(torch.randn_like(table) * 5)
    changed = result.encoder(ids, output_attentions=True).attentions
    assert [torch.equal(a, b) for a, b in zip(changed, after, strict=True)] == [True, False, True]


@torch.no_grad()
def test_t5_computes_buckets_once_a_stack(monkeypatch):
    model = sqa_t5(6, 3, num_layers=3)
    attention = type(model.encoder.block[0].layer[0].SelfAttention)
    calls = []
    bucket = attention._relative_position_bucket
    monkeypatch.setattr(
        attention, "_relative_position_bucket", staticmethod(lambda d, **k: calls.append(len(d)) or bucket(d, **k))
    )
    model(input_ids=tokens(2, 7), decoder_input_ids=tokens(2, 5), use_cache=False)
    assert calls == [7 + 7 - 1, 5 + 5 - 1]


def test_t5_loss_does_not_depend_on_gradient_accumulation(tmp_path):
    ids = tokens(8, 9)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(1)
        model = sqa_t5(6, 3)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append(next((e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@torch.no_grad()
def test_serving_engines_can_replace_the_attention():
    """What vLLM's and SGLang's transformers backends do: AutoModel.from_config, an own attention, keyword arguments."""
    seen = []

    def attention(module, query, key, value, mask, scaling=None, attention_instances=None, **kwargs):
        seen.append((module.layer_idx, query.shape, key.shape, value.shape, mask, scaling, attention_instances))
        return query.transpose(1, 2), None

    AttentionInterface.register("test_engine", attention)
    config = SQAGPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=40, n_layer=2, n_head=8, num_key_value_heads=4, head_dim=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 16)
    model = AutoModel.from_config(config, attn_implementation="test_engine")
    assert model._supports_attention_backend
    marker = object()
    model(tokens(1, 10), use_cache=False, attention_instances=marker, return_dict=False)
    shapes = ((1, 8, 10, 16), (1, 4, 10, 16), (1, 4, 10, 16))
    assert seen == [(layer, *shapes, None, 0.25, marker) for layer in (0, 1)]
    assert not model._keys_to_ignore_on_load_unexpected  # vLLM would drop every name these patterns match
    assert {name.rpartition(".")[2] for name in model.config.base_model_tp_plan if name.startswith("h.")} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip


@pytest.mark.parametrize("config", [SQAGPT2Config, SQAT5Config])
def test_config_refuses_heads_that_do_not_divide(config):
    with pytest.raises(Exception, match="multiple"):
        config(num_attention_heads=8, num_key_value_heads=3)


def test_config_with_heads_by_site_survives_saving(tmp_path):
    model = sqa_t5(6, 3, site_heads={"encoder": [4, 2]}, scale_decoder_outputs=False)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert back.config.heads("encoder") == (4, 2)
    assert back.config.heads("cross") == back.config.heads("decoder") == (6, 3)
    assert back.config.scale_decoder_outputs is False
    ids = tokens()
    assert torch.equal(logits(back.eval(), ids), logits(model, ids))


@pytest.mark.parametrize("family", MAKERS)
def test_config_with_heads_by_layer_survives_saving(family, tmp_path):
    model = made(family, "uneven")
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    for kind, layers in UNEVEN[family]["layer_heads"].items():
        assert [back.config.heads(kind, layer) for layer in (0, 1)] == [tuple(counts) for counts in layers]
    ids = tokens()
    assert torch.equal(logits(back.eval(), ids), logits(model, ids))


def test_heads_by_layer_are_not_to_be_taken_for_those_of_all_layers():
    config = made("gpt2", "uneven").config
    table = config.to_dict()
    assert (config.num_attention_heads, config.num_key_value_heads) == (table["n_head"], table["num_key_value_heads"])
    assert not {"n_head", "num_key_value_heads"} & set(config)  # so that nothing reads them without being told
    layers = [(layer.num_attention_heads, layer.num_key_value_heads) for layer in config.per_layer_config]
    assert layers == [config.heads("decoder", layer) for layer in (0, 1)] == [(8, 4), (6, 6)]


@pytest.mark.parametrize("layers", [[[8, 4]], [[8, 4], [6, 4]], [[8, 4], [0, 0]]])
def test_config_refuses_heads_by_layer_that_cannot_be(layers):
    with pytest.raises(Exception, match=r"layers|multiple"):
        SQAGPT2Config(n_layer=2, layer_heads={"decoder": layers})
    for kind in ("encoder", "decoder", "cross"):
        with pytest.raises(Exception, match=r"layers|multiple"):
            SQAT5Config(num_layers=2, layer_heads={kind: layers})


def test_dynamic_cache_is_the_default():
    model = sqa_gpt2(6, 3)
    assert isinstance(model(tokens(1, 4), use_cache=True).past_key_values, DynamicCache)
