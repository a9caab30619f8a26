"""Checkpoints of one model as different programs store them: names, copies, heads and biases."""

import json
import shutil

import pytest
import torch
from helpers import gpt2, logits, randomize, t5, tokens
from helpers import plain_convert as convert
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
)

from sqa_convert import Recipe, uptrain
from sqa_convert.checkpoints.find import SAMPLES
from sqa_convert.errors import CheckpointError, UnsupportedModelError

STORAGES = ("file", "shards", "bin")
KEYS = {
    "gpt2": ("n_head", "n_layer", "n_embd", "n_positions"),
    "t5": ("num_heads", "num_layers", "d_kv", "d_model"),
}
ALIASES = {
    "n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings", "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers",
    "d_kv": "head_dim", "d_model": "hidden_size",
}  # fmt: skip


def weights_of(model):
    """What a file holds of a model: every tensor once, tied or not."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def shards(folder, weights, ending=".safetensors", **more):
    """Two shards with an index, which may name more than they hold."""
    prefix, files = ("model", {}) if ending == ".safetensors" else ("pytorch_model", {})
    for i in range(2):
        files[f"{prefix}-0000{i + 1}-of-00002{ending}"] = dict(list(weights.items())[i::2])
    for file, part in files.items():
        if ending == ".bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part} | more
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{prefix}{ending}.index.json").write_text(index)
    return files


def store(folder, model, weights, storage="file", **changes):
    """A checkpoint of these weights, with changes to its config.json; a key that becomes None is left out."""
    folder.mkdir()
    config = model.config.to_dict() | {"architectures": [type(model).__name__]} | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if storage == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif storage == "file":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        shards(folder, weights)
    return folder


def result_of(out):
    return load_file(out / "model.safetensors")


EMBEDDINGS = {
    "gpt2": ("transformer.wte.weight", ("lm_head.weight",)),
    "t5": ("shared.weight", ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")),
}
MAKERS = {"gpt2": gpt2, "t5": t5}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ("lm_head.weight", "transformer.wte.weight")),
        ("gpt2", ("lm_head.weight",)),
        ("t5", ("shared.weight", *EMBEDDINGS["t5"][1])),
        ("t5", ("decoder.embed_tokens.weight",)),
        ("t5", ("encoder.embed_tokens.weight", "lm_head.weight")),
        ("t5", ("lm_head.weight",)),
    ],
)
def test_tied_weights_are_read_by_whatever_name_they_have_and_stored_once(family, names, storage, tmp_path):
    model, original = MAKERS[family](), EMBEDDINGS[family][0]
    weights = weights_of(model)
    embeddings = weights.pop(original)
    store(tmp_path / "source", model, {name: embeddings.clone() for name in names} | weights, storage)
    conversion = convert(tmp_path / "source", 12, 12, output=tmp_path / "out")
    stored = result_of(tmp_path / "out")
    assert torch.equal(stored[original], embeddings)
    assert not stored.keys() & set(EMBEDDINGS[family][1])
    ids = tokens()
    torch.testing.assert_close(logits(conversion.model, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    cost = conversion.report["cost"]
    assert cost["before"]["parameters"] == model.num_parameters()
    assert cost["after"]["parameters"] == conversion.model.num_parameters()


@pytest.mark.parametrize("copy", ["lm_head.weight", "decoder.embed_tokens.weight"])
@pytest.mark.parametrize("change", ["numbers", "size"])
def test_copies_that_differ_are_refused(copy, change, tmp_path):
    family = "gpt2" if copy.startswith("lm_head") else "t5"
    model, (original, _) = MAKERS[family](), EMBEDDINGS[family]
    weights = weights_of(model)
    weights[copy] = weights[original].clone()
    weights[copy][-1, -1] += 1
    if change == "size":
        weights[copy] = weights[copy][:32].clone()
    source = store(tmp_path / "source", model, weights)
    says = "differ, where config.json.*tie_word_embeddings" if change == "numbers" else r"\[32, .*one tensor"
    with pytest.raises(CheckpointError, match=says):
        convert(source, 8, 4, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [gpt2, t5])
def test_a_head_that_differs_is_the_models_own_where_config_says_so(make, tmp_path):
    model = make()
    weights = weights_of(model)
    weights["lm_head.weight"] = torch.randn(61, weights[EMBEDDINGS[model.config.model_type][0]].shape[1])
    says = {"tie_word_embeddings": False} | ({"scale_decoder_outputs": True} if make is t5 else {})
    source = store(tmp_path / "source", model, weights, **says)
    auto = AutoModelForSeq2SeqLM if make is t5 else AutoModelForCausalLM
    ids = tokens()
    result = convert(source, 12, 12, output=tmp_path / "out").model
    torch.testing.assert_close(
        logits(result, ids), logits(auto.from_pretrained(source).eval(), ids), rtol=1e-4, atol=1e-5
    )


def test_copies_may_have_other_dtypes(tmp_path):
    model = gpt2()
    weights = weights_of(model)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].half().float()
    weights["lm_head.weight"] = weights["transformer.wte.weight"].half()
    convert(store(tmp_path / "source", model, weights), 8, 4, output=tmp_path / "out")
    assert "lm_head.weight" not in result_of(tmp_path / "out")


def test_a_square_tensor_and_its_transpose_are_two():
    model = gpt2()
    square = torch.randn(48, 48)
    for block, weight in zip(model.transformer.h, (square, square.T), strict=True):
        block.attn.c_proj.weight = torch.nn.Parameter(weight)
    result = convert(model, 12, 12).model
    assert torch.equal(result.transformer.h[1].attn.o_proj.weight, square)


@pytest.mark.parametrize("storage", ["bin", "memory"])
def test_layers_that_are_one_in_memory_are_each_written(storage, tmp_path):
    model = gpt2()
    first, second = model.transformer.h
    second.load_state_dict(first.state_dict())
    second.mlp.c_fc.weight, second.attn.c_attn.weight = first.mlp.c_fc.weight, first.attn.c_attn.weight
    source = model
    if storage == "bin":
        source = store(tmp_path / "source", model, model.state_dict(), "bin")
    result = convert(source, 12, 12, output=tmp_path / "out").model
    ids = tokens()
    torch.testing.assert_close(logits(result, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    names = [f"transformer.h.{i}.mlp.c_fc.weight" for i in range(2)]
    assert torch.equal(*(result_of(tmp_path / "out")[name] for name in names))


VALUE_HEAD = {"v_head.summary.weight": torch.randn(1, 48), "v_head.summary.bias": torch.randn(1)}


@pytest.mark.parametrize("storage", STORAGES)
def test_further_heads_are_carried_over_and_named(storage, tmp_path):
    model = gpt2()
    source = store(tmp_path / "source", model, weights_of(model) | VALUE_HEAD, storage)
    conversion = convert(source, 8, 4, output=tmp_path / "out")
    stored = result_of(tmp_path / "out")
    assert all(torch.equal(stored[name], tensor) for name, tensor in VALUE_HEAD.items())
    assert any("v_head.summary.weight" in note for note in conversion.report["source"]["notes"])
    assert conversion.report["cost"]["after"]["parameters"] == conversion.model.num_parameters()
    ids = tokens()
    assert torch.equal(logits(conversion.model, ids), logits(convert(model, 8, 4).model, ids))


def test_the_second_head_of_a_double_heads_model_in_memory_is_carried_over(tmp_path):
    model = randomize(GPT2DoubleHeadsModel(gpt2().config))
    conversion = convert(model, 8, 4, output=tmp_path / "out")
    name = "multiple_choice_head.summary.weight"
    assert torch.equal(result_of(tmp_path / "out")[name], model.state_dict()[name])
    assert name in " ".join(conversion.report["source"]["notes"])


def with_tokenizer(folder, name):
    for path in (SAMPLES / name).iterdir():
        if "token" in path.name or path.name in ("vocab.json", "merges.txt", "spiece.model"):
            shutil.copyfile(path, folder / path.name)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.integration)])
def test_what_is_stored_twice_or_beside_the_model_survives_uptraining(name, tmp_path):
    own_head = {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False} if name == "t5" else {}
    model = MAKERS[name](heads=4, layers=1 if name == "gpt2" else 2, vocab_size=4096, **own_head)
    weights = weights_of(model)
    weights["lm_head.weight"] = weights[EMBEDDINGS[name][0]].clone()
    source = store(tmp_path / "source", model, weights | VALUE_HEAD, bos_token_id=0, eos_token_id=0)
    with_tokenizer(source, name)
    out = tmp_path / "out"
    convert(source, 2, 1, output=out)
    before = result_of(out)
    uptrain(out, Recipe(tokens=128, sequence_length=32, batch_size=2, evaluations=1), evaluate=False)
    after = result_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in VALUE_HEAD.items())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("k_proj.weight" in name or "k.weight" in name for name in moved)


def classifier(labels):
    config = gpt2().config
    config.num_labels = labels
    config.pad_token_id = 0
    return randomize(GPT2ForSequenceClassification(config))


@pytest.mark.parametrize(
    ("make", "head", "rows", "changes", "says"),
    [
        (gpt2, "lm_head.weight", 32, {"tie_word_embeddings": False}, r"\[32, 48\].*\[61, 48\]"),
        (gpt2, "lm_head.weight", 0, {"tie_word_embeddings": False}, "lm_head.weight is missing"),
        (t5, "lm_head.weight", 32, {"scale_decoder_outputs": False}, r"\[32, 20\].*\[61, 20\]"),
        (t5, "lm_head.weight", 0, {"tie_word_embeddings": False}, "lm_head.weight is missing"),
        (lambda: t5(family="mt5"), "lm_head.weight", 64, {}, r"\[64, 20\].*\[61, 20\]"),
        (lambda: classifier(3), "score.weight", 5, {}, r"\[5, 48\].*\[3, 48\]"),
        (lambda: classifier(3), "score.weight", 0, {}, "score.weight is missing"),
    ],
)
def test_a_head_of_another_size_than_config_says_or_none_is_refused(make, head, rows, changes, says, tmp_path):
    model = make()
    weights = {name: tensor for name, tensor in weights_of(model).items() if name != head}
    if rows:
        weights[head] = torch.randn(rows, 20 if model.config.is_encoder_decoder else 48)
    source = store(tmp_path / "source", model, weights, **changes)
    with pytest.raises(CheckpointError, match=says):
        convert(source, 8, 4, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_a_classifier_of_any_number_of_labels_is_taken(labels, tmp_path):
    model = classifier(labels)
    result = convert(store(tmp_path / "source", model, weights_of(model)), 12, 12).model
    ids = tokens()
    torch.testing.assert_close(result(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kinds", [("",), ("attn.c_attn",), ("ln_1", "ln_2", "ln_f"), ("attn.", "mlp.")])
def test_biases_that_a_checkpoint_does_without_are_zeros(kinds, storage, tmp_path):
    model = gpt2()
    without = [name for name in weights_of(model) if name.endswith(".bias") and any(kind in name for kind in kinds)]
    weights = {name: tensor for name, tensor in weights_of(model).items() if name not in without}
    source = store(tmp_path / "source", model, weights, storage)
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    conversion = convert(source, 12, 12, method="auto", calibration=None, output=tmp_path / "out")
    ids = tokens()
    torch.testing.assert_close(logits(conversion.model, ids), logits(stock, ids), rtol=1e-4, atol=1e-5)
    assert result_of(tmp_path / "out").keys() >= convert(model, 12, 12).model.state_dict().keys() - {"lm_head.weight"}
    assert any("they are zeros" in note for note in conversion.report["source"]["notes"])


@pytest.mark.parametrize(
    "name", ["transformer.h.1.attn.c_attn.bias", "transformer.h.0.ln_2.bias", "transformer.ln_f.bias"]
)
def test_one_bias_missing_among_others_is_refused(name, tmp_path):
    model = gpt2()
    weights = weights_of(model)
    del weights[name]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        convert(store(tmp_path / "source", model, weights), 8, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "there is _orig_mod.transformer.wte.weight"),
        (lambda w: {k: v.T.contiguous() if "c_attn.weight" in k else v for k, v in w.items()}, "the other way round"),
    ],
)
def test_weights_of_a_wrapper_or_of_linear_layers_are_told_from_damage(change, says, tmp_path):
    model = gpt2()
    with pytest.raises(CheckpointError, match=says):
        convert(store(tmp_path / "source", model, change(weights_of(model))), 8, 4)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model-00001-of-00002.safetensors", b"", "index, which is missing"),
        ("model.fp16.safetensors", b"", "variant="),
        ("tf_model.h5", b"", "from_tf=True"),
        ("flax_model.msgpack", b"", "from_flax=True"),
        ("ckpt.pt", b"", "there is ckpt.pt: load the weights into transformers' class"),
        ("training_args.bin", b"", r"in \S+$"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "git lfs pull"),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "git lfs pull"),
        ("pytorch_model.bin", b"\x10\0\0\0\0\0\0\0{}", "is a safetensors file"),
        ("model.safetensors", b"PK\x03\x04\0\0\0\0\0\0\0", "is a file of torch.save"),
    ],
)
def test_weights_that_are_not_read_are_named_with_the_way_out(name, content, says, tmp_path):
    source = store(tmp_path / "source", gpt2(), {})
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        convert(source, 8, 4)


@pytest.mark.parametrize("added", ["lm_head.bias", "transformer.h.0.attn.c_attn.lora_A.weight"])
def test_a_layer_in_memory_with_more_than_its_weights_is_refused(added):
    model = gpt2(tie_word_embeddings=False)
    layer, _, name = added.removesuffix(".weight").rpartition(".")
    more = torch.nn.Linear(2, 2, bias=False) if added.endswith("weight") else torch.nn.Parameter(torch.ones(61))
    setattr(model.get_submodule(layer), name, more)
    with pytest.raises(UnsupportedModelError, match=f"{added} belongs to a layer"):
        convert(model, 8, 4)


def other(weights):
    return {name: tensor + 1 for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "lie", ["single file beside shards", "stale index", "index names a tie", "bin shards too", "bin beside its shards"]
)
def test_the_weights_that_transformers_reads_are_read_and_named(lie, tmp_path):
    model = gpt2()
    weights = weights_of(model)
    source = store(tmp_path / "source", model, weights)
    read, noted = ["model.safetensors"], False
    if lie == "single file beside shards":
        shards(source, other(weights))
        noted = True
    elif lie == "stale index":
        for file in shards(source, weights):
            (source / file).unlink()
        noted = True
    elif lie == "index names a tie":
        (source / "model.safetensors").unlink()
        read = list(shards(source, weights, **{"lm_head.weight": "model-00001-of-00002.safetensors"}))
    elif lie == "bin shards too":
        shards(source, other(weights), ".bin")
    else:
        (source / "model.safetensors").unlink()
        torch.save(weights, source / "pytorch_model.bin")
        shards(source, other(weights), ".bin")
        read, noted = ["pytorch_model.bin"], True
    conversion = convert(source, 12, 12, output=tmp_path / "out")
    ids = tokens()
    expected = logits(AutoModelForCausalLM.from_pretrained(source).eval(), ids)
    torch.testing.assert_close(logits(conversion.model, ids), expected, rtol=1e-4, atol=1e-5)
    told = conversion.report["source"]
    assert told["files"] == read
    assert any(f"read from {read[0]}" in note for note in told["notes"]) == noted


@pytest.mark.parametrize("names", ["aliases", "defaults", "both"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_config_is_read_as_transformers_reads_it(family, names, tmp_path):
    model = MAKERS[family](**({"heads": 8, "d_kv": 64} if family == "t5" else {"n_positions": 1024}))
    config = model.config.to_dict()
    changes = {}
    for key in KEYS[family]:
        if names != "defaults":
            changes |= {ALIASES[key]: config[key]}
        if names == "aliases":
            changes |= {key: None}
        elif names == "both":  # the alias counts
            changes |= {key: config[key] + 1}
    if names == "defaults":
        default = type(model.config)()
        changes = {key: None for key in KEYS[family] if config[key] == getattr(default, key)} | {"n_ctx": 1024}
        assert len(changes) > 1
    source = store(tmp_path / "source", model, weights_of(model), **changes)
    heads = model.config.num_attention_heads
    conversion = convert(source, heads, heads, output=tmp_path / "out")
    ids = tokens()
    torch.testing.assert_close(logits(conversion.model, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written[KEYS[family][0]] == heads and not written.keys() & set(ALIASES.values()) - {"head_dim"}


def test_an_old_name_that_transformers_does_not_read_is_named(tmp_path):
    model = gpt2()
    source = store(tmp_path / "source", model, weights_of(model), n_positions=None, n_ctx=64)
    with pytest.raises(CheckpointError, match=r'calls for .1024, 48.; it has n_ctx.*"n_positions": 64'):
        convert(source, 8, 4)


def test_a_config_that_tells_all_is_read_without_the_class(monkeypatch):
    from sqa_convert.families import completed

    monkeypatch.setattr("transformers.GPT2Config.from_dict", None)
    config = gpt2().config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    assert completed(config) is config


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["GPT2LMHeadCustomModel", "TFGPT2LMHeadModel"])
def test_a_class_of_the_authors_own_is_taken_for_what_its_weights_are(name, storage, tmp_path):
    model = gpt2()
    source = store(tmp_path / "source", model, weights_of(model), storage, architectures=[name])
    conversion = convert(source, 12, 12, output=tmp_path / "out")
    ids = tokens()
    torch.testing.assert_close(logits(conversion.model, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    assert conversion.report["source"]["architecture"] == "GPT2LMHeadModel"
    assert any(name in note for note in conversion.report["source"]["notes"])


def test_a_class_derived_from_transformers_own_is_taken_for_that():
    class Mood(GPT2ForSequenceClassification):
        pass

    conversion = convert(Mood(gpt2(layers=1).config), 8, 4)
    assert type(conversion.model).__name__ == "SQAGPT2ForSequenceClassification"
    assert conversion.report["source"]["architecture"] == "GPT2ForSequenceClassification"
    assert any(note.startswith("Mood is none") for note in conversion.report["source"]["notes"])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2ForTokenClassification", "MyGPT2ForQuestionAnswering"])
def test_a_class_of_another_kind_is_refused(name, tmp_path):
    model = gpt2()
    source = store(tmp_path / "source", model, weights_of(model), architectures=[name])
    with pytest.raises(UnsupportedModelError, match=f"{name} is not supported"):
        convert(source, 8, 4)
