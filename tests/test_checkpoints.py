"""Sources in every shape the hub has them, and what arrives in the output."""

import errno
import hashlib
import json
import shutil
import time
import warnings

import pytest
import torch
from helpers import gpt2, logits, t5, tokens
from helpers import plain_convert as convert
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    GPT2Config,
    GPT2ForSequenceClassification,
    T5EncoderModel,
)

import sqa_convert
from sqa_convert import parse_amounts
from sqa_convert.checkpoints import safetensors_writer as shards
from sqa_convert.checkpoints.dtypes import check_finite, tensor_bytes, torch_dtype
from sqa_convert.checkpoints.find import SAMPLES, open_source
from sqa_convert.checkpoints.safetensors_writer import ShardWriter
from sqa_convert.checkpoints.source import Source, TensorInfo
from sqa_convert.conversion.execute import convert_all
from sqa_convert.conversion.plan import OutputTensor, make_plan
from sqa_convert.conversion.request import Request
from sqa_convert.errors import CheckpointError, RecipeError, UnsupportedModelError
from sqa_convert.evaluation.load import load_model
from sqa_convert.families import FAMILIES
from sqa_convert.models import SQAT5EncoderModel
from sqa_convert.text.tokenizers import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "source"


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def read_all(path):
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_hub_gpt2_without_prefix_and_with_stale_buffers_is_the_same_model(folder, tmp_path):
    model = gpt2()
    model.save_pretrained(folder)
    weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = convert(folder, 8, 4, output=tmp_path / "out").model
    ids = tokens()
    assert torch.equal(logits(result, ids), logits(convert(model, 8, 4).model, ids))
    names = read_all(tmp_path / "out")
    assert all(name.startswith("transformer.") for name in names)
    assert not any(name.endswith((".attn.bias", "masked_bias")) for name in names)


@pytest.mark.parametrize("make", [gpt2, t5])
def test_shards_and_single_files_and_pickles_give_the_same_result(make, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(parse_amounts, "LEAST_SHARD", 1)
    model = make()
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    (folder / "bin").mkdir()
    (folder / "bin" / "config.json").write_bytes((folder / "single" / "config.json").read_bytes())
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_bytes((folder / "single" / "config.json").read_bytes())
    torch.save(model.state_dict(), folder / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ids = tokens()
    expected = logits(convert(folder / "single", 8, 4, output=tmp_path / "out0").model, ids)
    for i, kind in enumerate(("shards", "bin", "old"), 1):
        size = "20KB" if kind == "shards" else "5GB"
        result = convert(folder / kind, 8, 4, output=tmp_path / f"out{i}", max_shard_size=size)
        assert torch.equal(logits(result.model, ids), expected), kind
    index = json.loads((tmp_path / "out1" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_all(tmp_path / "out1").keys()
    assert len(list((tmp_path / "out1").glob("*.safetensors"))) > 2
    for i in (1, 2, 3):
        assert same(read_all(tmp_path / f"out{i}"), read_all(tmp_path / "out0"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [gpt2, t5])
def test_dtype_is_kept_and_everything_outside_attention_passes_byte_for_byte(make, dtype, folder, tmp_path):
    model = make().to(dtype)
    model.save_pretrained(folder)
    convert(folder, 8, 4, output=tmp_path / "out")
    source, result = read_all(folder), read_all(tmp_path / "out")
    assert {tensor.dtype for tensor in result.values()} == {dtype}
    passed = {k for k in source if "attn" not in k and "Attention" not in k}
    assert len(passed) > 10
    for name in passed:
        assert torch.equal(result[name].view(torch.uint8), source[name].view(torch.uint8)), name
    assert load_model(tmp_path / "out").dtype == dtype


def test_half_precision_loses_no_more_than_rounding(folder, tmp_path):
    model = gpt2().to(torch.bfloat16)
    model.save_pretrained(folder)
    convert(folder, 8, 4, output=tmp_path / "out")
    exact = convert(model.float(), 8, 4).model.state_dict()
    for name, tensor in read_all(tmp_path / "out").items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def test_dtype_option_casts_everything(folder, tmp_path):
    gpt2().save_pretrained(folder)
    convert(folder, 8, 4, output=tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in read_all(tmp_path / "out").values()} == {torch.bfloat16}
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


def test_untied_head_and_gated_t5_pass_through(folder, tmp_path):
    model = t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"])  # as v1.1 has it
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = load_model(folder)
    result = convert(folder, 12, 12, output=tmp_path / "out").model
    ids = tokens()
    assert torch.equal(result.lm_head.weight, weights["lm_head.weight"])
    assert result.config.scale_decoder_outputs is False
    assert torch.equal(logits(result, ids), logits(source, ids))


def test_stale_cross_attention_table_of_old_t5_is_left_out(folder, tmp_path):
    t5().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 12)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, 8, 4, output=tmp_path / "out")
    assert not any("EncDecAttention.relative" in name for name in read_all(tmp_path / "out"))


def test_classification_head_comes_along(folder, tmp_path):
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=61, n_positions=64, n_embd=48, n_layer=2, n_head=12, num_labels=3, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    conversion = convert(folder, 12, 12, output=tmp_path / "out", evaluate=True)
    assert "quality" not in conversion.report  # there is no language model head to measure with
    assert type(conversion.model).__name__ == "SQAGPT2ForSequenceClassification"
    result = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(result).__name__ == "SQAGPT2ForSequenceClassification"
    assert torch.equal(result.score.weight, model.score.weight)
    ids = tokens()
    torch.testing.assert_close(result(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_t5_encoder_alone(folder, tmp_path):
    encoder = T5EncoderModel(t5().config).eval()
    encoder.save_pretrained(folder)
    conversion = convert(folder, 8, 4, output=tmp_path / "out")
    assert conversion.report["architecture"] == "SQAT5EncoderModel"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_heads"], config["num_key_value_heads"]) == (8, 4)
    assert "AutoModelForTextEncoding.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    identity = convert(folder, 12, 12).model
    ids = tokens()
    assert torch.equal(identity(ids)[0], encoder(ids)[0])


def test_layers_of_a_t5_encoder_keep_different_heads_whose_mean_is_no_pair_of_counts(folder, tmp_path):
    T5EncoderModel(t5(layers=2).config).save_pretrained(folder)
    made = convert(folder, allocation="8/4,6/2", output=tmp_path / "out")
    assert (made.model.config.num_heads, made.model.config.num_key_value_heads) == (7, 3)
    again = AutoModelForTextEncoding.from_pretrained(tmp_path / "out").eval()
    assert [again.config.heads("encoder", layer) for layer in range(2)] == [(8, 4), (6, 2)]
    ids = tokens()
    assert torch.equal(again(ids)[0], made.model(ids)[0])


def test_the_encoder_of_a_converted_t5_loads_on_its_own(tmp_path):
    whole = convert(save(t5(), tmp_path / "source"), 8, 4, output=tmp_path / "out").model
    ids = tokens()
    for loads in (SQAT5EncoderModel, AutoModelForTextEncoding):
        encoder = loads.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(encoder(ids)[0], whole.encoder(ids)[0])


@pytest.mark.parametrize("kinds", [("encoder",), ("decoder", "cross"), ("cross",)])
def test_only_the_chosen_sites_change(kinds):
    source = t5()
    result = convert(source, 8, 4, sites=kinds).model
    for kind in ("encoder", "decoder", "cross"):
        assert result.config.heads(kind) == ((8, 4) if kind in kinds else (12, 12))
    ids = tokens()
    if "encoder" not in kinds:
        assert torch.equal(result.encoder(ids)[0], source.encoder(ids)[0])
    assert not torch.equal(logits(result, ids), logits(source, ids))


def test_layers_are_converted_each_with_its_own_weights():
    source = gpt2(layers=3)
    state = convert(source, 8, 4).model.state_dict()
    merged = [state[f"transformer.h.{i}.attn.q_proj.weight"] for i in range(3)]
    for i, weight in enumerate(merged):
        stored = source.transformer.h[i].attn.c_attn.weight[:, :48].T  # (H * d, D)
        torch.testing.assert_close(weight[:4], (stored[:4] + stored[4:8]) / 2)
        torch.testing.assert_close(weight[4:8], stored[8:12])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "gpt2, mt5, t5"),
        ({"model_type": "sqa_gpt2"}, "already converted"),
        ({"model_type": None}, "not supported"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"architectures": ["GPT2ForTokenClassification"]}, "GPT2LMHeadModel, GPT2Model"),
        ({"architectures": "GPT2LMHeadModel"}, "not a list of class names"),
        ({"architectures": [7]}, "not a list of class names"),
        ({"n_head": 7}, "no multiple"),
        ({"n_head": "12"}, "n_head is '12'"),
        ({"n_embd": None}, "n_embd is None"),
    ],
)
def test_unsupported_models_are_named_with_what_is_supported(change, says, folder, tmp_path):
    gpt2().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=says):
        convert(folder, 8, 4, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_is_not_changed_and_converts_as_its_folder_does(folder, tmp_path):
    model = gpt2()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    in_memory = convert(model, 8, 4).model
    assert same(model.state_dict(), before)
    model.save_pretrained(folder)
    on_disk = convert(folder, 8, 4, output=tmp_path / "out").model
    assert same(in_memory.state_dict(), on_disk.state_dict())


def test_output_holds_all_that_loading_needs(folder, tmp_path):
    t5().save_pretrained(folder)
    for name in ("spiece.model", "tokenizer_config.json", "LICENSE"):
        (folder / name).write_text("{}")
    (folder / "code.py").write_text("raise SystemExit")
    convert(folder, 8, 4, output=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "configuration_sqa_t5.py", "modeling_sqa_t5.py",
        "spiece.model", "tokenizer_config.json", "LICENSE", "report.json", "report.html", "README.md", "heads.svg",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == FAMILIES["t5"].auto_map
    assert config["sqa"]["source_heads"] == 12
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_safetensors_are_preferred_to_pickles_beside_them(folder, tmp_path):
    gpt2().save_pretrained(folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    (folder / "pytorch_model.bin").write_bytes(b"junk")
    assert convert(folder, 8, 4, output=tmp_path / "out").model is not None


@pytest.mark.integration
@pytest.mark.parametrize("new_format", [True, False])
def test_damaged_pickles_are_refused_wherever_the_damage_is(new_format, folder):
    gpt2(layers=1).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=new_format)
    sound = path.read_bytes()
    for position in range(0, len(sound), max(1, len(sound) // 60)):
        for damaged in (sound[:position], sound[:position] + b"\xff" + sound[position + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):  # damaged, or sound and without the model's tensors
                convert(folder, 8, 4)


def test_sparse_tensors_are_refused(folder):
    gpt2().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(3).to_sparse()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no dense tensor"):
        convert(folder, 8, 4)


def test_stored_copies_of_tied_weights_are_not_counted(folder):
    model = gpt2()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    conversion = convert(folder, 8, 4)
    assert conversion.report["cost"]["before"]["parameters"] == model.num_parameters()
    assert conversion.report["cost"]["after"]["parameters"] == conversion.model.num_parameters()


def test_buffers_of_every_dtype_of_a_model_in_memory_pass_through(tmp_path):
    model = gpt2()
    model.register_buffer("counts", torch.tensor([300, -5]))
    convert(model, 8, 4, output=tmp_path / "out")
    assert torch.equal(read_all(tmp_path / "out")["counts"], torch.tensor([300, -5]))
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_a_model_in_memory_cannot_be_evaluated_for_want_of_a_tokenizer(tmp_path):
    with pytest.raises(RecipeError, match="not a model in memory"):
        convert(gpt2(), 8, 4, output=tmp_path / "out", evaluate=True)
    with pytest.raises(RecipeError, match="needs an output folder"):
        convert("sample:gpt2", 8, 4, evaluate=True)
    assert not (tmp_path / "out").exists()


def test_code_of_others_is_not_named_in_the_result(folder, tmp_path):
    gpt2().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"custom_pipelines": {"p": {"impl": "evil.P"}}, "auto_map": {"AutoModel": "evil--m.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil--tok.Evil", null]}}')
    convert(folder, 8, 4, output=tmp_path / "out")
    for path in (tmp_path / "out").glob("*.json"):
        assert "evil" not in path.read_text(), path.name


def test_the_tokenizer_class_that_config_json_names_is_kept(folder, tmp_path):
    gpt2(tokenizer_class="BertTokenizer").save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    convert(folder, 8, 4, output=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "BertTokenizer"


def test_a_sentencepiece_tokenizer_alone_is_enough(folder, tmp_path):
    """As the hub has T5 v1.1 and mT5: spiece.model and nothing else."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    t5(vocab_size=200).save_pretrained(folder)
    (tmp_path / "spiece.model").rename(folder / "spiece.model")
    lines = [f"the quick brown fox number {i} jumps over the lazy dog\n" * 30 for i in range(40)]
    for i, line in enumerate(lines):
        (tmp_path / f"{i:02}.log").write_text(line)
    report = convert(folder, 8, 4, output=tmp_path / "out", evaluate=True, data=str(tmp_path / "*.log")).report
    assert report["quality"]["converted"]["kl"] > 0
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(tokenizer("the lazy fox").input_ids, skip_special_tokens=True) == "the lazy fox"


@pytest.mark.parametrize("dtype", ["F32", "BF16", "BOOL", "I64"])
def test_what_is_written_piece_by_piece_is_what_the_library_reads(dtype, tmp_path):
    """Sizes that no alignment fits, a scalar, and an empty tensor after others."""
    path = tmp_path / "model.safetensors"
    shapes = {"b": (3, 5), "odd": (7,), "scalar": (), "a": (0, 4), "half": (3,)}
    tensors = [OutputTensor(name, shape, "F16" if name == "half" else dtype, name) for name, shape in shapes.items()]
    values = {t.name: (torch.rand(t.shape) * 9).to(torch_dtype(t.dtype)) for t in tensors}
    writer = ShardWriter(path, tensors, checked=True)
    for name in reversed(shapes):
        writer.write(name, map(tensor_bytes, values[name].flatten().split(2)))
    assert writer.verify() == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[name], values[name]) and loaded[name].dtype == values[name].dtype for name in values)


def test_a_tensor_with_a_piece_missing_is_no_tensor(tmp_path):
    writer = ShardWriter(tmp_path / "x.safetensors", [OutputTensor("a", (4,), "F32", "a")], checked=True)
    with pytest.raises(OSError, match="8 bytes are missing"):
        writer.write("a", [tensor_bytes(torch.ones(2))])


def test_what_is_written_is_put_on_the_disk_meanwhile(tmp_path, monkeypatch):
    """Each file once for what is new in it, and a disk that fails then is heard of."""
    synced = []
    monkeypatch.setattr(shards, "sync", synced.append)
    tensors = [OutputTensor("a", (4,), "F32", "a")]
    one, two = (ShardWriter(tmp_path / name, tensors, checked=False) for name in ("one", "two"))
    with shards.flushing([one, two], every=0.01):
        one.write("a", [tensor_bytes(torch.ones(4))])
        while not synced:
            time.sleep(0.01)
        time.sleep(0.1)
    assert synced == [one.path]

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards, "sync", fail)
    with pytest.raises(OSError, match="Input/output"), shards.flushing([two], every=0.01):
        two.write("a", [tensor_bytes(torch.ones(4))])
        time.sleep(0.1)


def test_keeping_all_heads_is_possible_however_they_are_grouped(tmp_path):
    for partition in ("searched", "contiguous", None):
        made = sqa_convert.convert("sample:gpt2", 12, 12, partition=partition, output=tmp_path / str(partition)).report
        assert {site["method"] for site in made["sites"]} == {"none"}


def test_numbers_that_overflow_are_refused_in_one_line(folder):
    """No numeric library's warning beside it; those that may be added stay as they are."""
    model = gpt2()
    model.transformer.h[0].attn.c_attn.weight.data.fill_(3e38)
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="weight holds NaN or infinite"):
            convert(folder, 8, 4, method="mean")


def test_a_header_that_was_not_written_so_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    writer = ShardWriter(path, [OutputTensor("a", (4,), "F32", "a")], checked=True)
    writer.write("a", [tensor_bytes(torch.ones(4))])
    writer.verify()
    path.write_bytes(path.read_bytes().replace(b"F32", b"I32"))
    with pytest.raises(CheckpointError, match="header"):
        writer.verify()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_what_is_no_number_is_found_wherever_it_stands(dtype):
    """Beyond the piece that is looked at first, too; the largest and smallest numbers there are may stand."""
    values = torch.zeros(2**20 + 3, dtype=torch_dtype(dtype))
    limits = torch.finfo(values.dtype)
    values[-3:] = torch.tensor([limits.max, limits.min, limits.smallest_normal], dtype=values.dtype)
    check_finite(tensor_bytes(values), dtype, "a", "b")
    for wrong in (float("nan"), float("inf"), -float("inf")):
        for place in (0, -1):
            spoiled = values.clone()
            spoiled[place] = wrong
            with pytest.raises(CheckpointError, match="b: a holds NaN or infinite"):
                check_finite(tensor_bytes(spoiled), dtype, "a", "b")


def test_integers_and_nothing_are_finite():
    check_finite(tensor_bytes(torch.full((3,), -1)), "I64", "a", "b")
    check_finite(tensor_bytes(torch.empty(0)), "F32", "a", "b")


class Endless(Source):
    """A model whose tensors come in pieces that never end, but for those that converting attention needs."""

    def __init__(self, model):
        self.name, self.config = "endless", model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
        self.tensors = dict(model.named_parameters())
        self.index = {name: TensorInfo(tuple(t.shape), "F32", "x") for name, t in self.tensors.items()}

    def pieces(self, name):
        if ".attn." in name or ".ln_1." in name:
            yield tensor_bytes(self.tensors[name].detach())
            return
        while True:
            yield memoryview(bytes(4))
            time.sleep(0.01)


@pytest.mark.parametrize("method", ["mean", "svd"])
@pytest.mark.parametrize("who", ["store", "progress"])
def test_what_goes_wrong_in_one_thread_stops_the_others(who, method):
    """A failure at a site, or Ctrl-C, while the rest is still being copied."""
    source, request = Endless(gpt2()), Request(8, 4, method=method, calibration=None)
    threads = torch.get_num_threads()

    def store(tensor, pieces):
        for _ in pieces:
            pass
        if who == "store" and not isinstance(tensor.origin, str):
            raise OSError("the disk is full")

    def progress(*told):
        if who == "progress":
            raise KeyboardInterrupt

    with pytest.raises(OSError if who == "store" else KeyboardInterrupt):
        convert_all(make_plan(source, request), source, {}, store, progress)
    assert torch.get_num_threads() == threads


def test_the_dtype_of_a_model_in_memory_is_that_of_its_first_tensor(folder):
    """Where a config names none; however the threads that make the tensors take turns."""
    model = gpt2().half()
    model.transformer.wte.float()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if "dtype" not in key}))
    first = open_source(str(folder)).index
    expected = torch_dtype(next(iter(first.values())).dtype)
    assert {convert(folder, 8, 4).model.dtype for _ in range(6)} == {expected}


def test_folders_with_the_same_tokenizer_share_one(tmp_path):
    """One that has encoded keeps 0.4 MB for ever: a process that converts all day must not make more and more."""
    for name, heads in (("one", 12), ("two", 6)):
        shutil.copytree(SAMPLES / "gpt2", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"n_head": heads}))
    one, two = (load_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert one is two
    settings = json.loads((tmp_path / "two/tokenizer_config.json").read_text())
    (tmp_path / "two/tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    assert load_tokenizer(tmp_path / "two").model_max_length == 77 != one.model_max_length
    (tmp_path / "one/chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(tmp_path / "one").chat_template == "{{ messages }}" != one.chat_template
    (tmp_path / "two/config.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path / "two")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
