"""Plans: made from headers, right about the true models, right about what they cost."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from helpers import gpt2, inputs_for, t5, tokens, use_attention
from helpers import plain_convert as convert
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, MT5Config, T5Config

from sqa_convert.checkpoints.dtypes import torch_dtype
from sqa_convert.checkpoints.source import Source, TensorInfo
from sqa_convert.cli.convert import _default_output
from sqa_convert.conversion.plan import make_plan, parse_size
from sqa_convert.conversion.request import Calibration, Request
from sqa_convert.errors import CheckpointError, RecipeError, UnsupportedModelError
from sqa_convert.families import FAMILIES, Family, Site, family_of
from sqa_convert.heads import Partition, get_method
from sqa_convert.parse_amounts import amount


def gpt2_config(width, layers, heads):
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads)


def t5_config(width, inner, layers, heads, ff, vocabulary=32128, family=T5Config, **options):
    return family(
        d_model=width,
        d_kv=inner // heads,
        num_layers=layers,
        num_heads=heads,
        d_ff=ff,
        vocab_size=vocabulary,
        **options,
    )


def v11(width, inner, layers, heads, ff, vocabulary=32128, family=T5Config):
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return t5_config(width, inner, layers, heads, ff, vocabulary, family, **options)


TRUE_MODELS = {
    "gpt2": gpt2_config(768, 12, 12),
    "distilgpt2": gpt2_config(768, 6, 12),
    "gpt2-medium": gpt2_config(1024, 24, 16),
    "gpt2-large": gpt2_config(1280, 36, 20),
    "gpt2-xl": gpt2_config(1600, 48, 25),
    "t5-small": t5_config(512, 512, 6, 8, 2048),
    "t5-base": t5_config(768, 768, 12, 12, 3072),
    "t5-large": t5_config(1024, 1024, 24, 16, 4096),
    "t5-3b": t5_config(1024, 4096, 24, 32, 16384),
    "t5-11b": t5_config(1024, 16384, 24, 128, 65536),
    "t5-v1_1-small": v11(512, 384, 8, 6, 1024),
    "flan-t5-small": v11(512, 384, 8, 6, 1024),
    "flan-t5-base": v11(768, 768, 12, 12, 2048),
    "flan-t5-large": v11(1024, 1024, 24, 16, 2816),
    "flan-t5-xl": v11(2048, 2048, 24, 32, 5120),
    "flan-t5-xxl": v11(4096, 4096, 24, 64, 10240),
    "mt5-small": v11(512, 384, 8, 6, 1024, 250112, MT5Config),
}
PARAMETERS = {"gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "t5-small": 60_506_624, "t5-11b": 11_307_321_344}
NAMES = {torch.float32: "F32"}


class MetaSource(Source):
    """The names and shapes of a true model, without any weights."""

    def __init__(self, name, config):
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config)
        self.name = name
        self.config = config.to_dict() | {"architectures": [type(model).__name__]}
        self.index = {n: TensorInfo(tuple(p.shape), "F32", "meta") for n, p in model.named_parameters()}

    def pieces(self, name):
        raise AssertionError("a plan reads no weights")

    def meta(self, name):
        return torch.empty(self.index[name].shape, device="meta")


def settings_of(heads):
    return sorted({(heads, heads), (heads - heads // 3, 1), (2 * (heads // 3), heads // 3)})


@pytest.mark.parametrize("name", TRUE_MODELS)
def test_true_models_plan_and_load_on_the_meta_device(name):
    from sqa_convert import models

    source = MetaSource(name, TRUE_MODELS[name])
    if name in PARAMETERS:
        assert sum(torch.Size(i.shape).numel() for i in source.index.values()) == PARAMETERS[name]
    for heads in settings_of(source.config.get("n_head") or source.config["num_heads"]):
        plan = make_plan(source, Request(*heads))
        config_class = getattr(models, plan.config["auto_map"]["AutoConfig"].split(".")[1])
        with torch.device("meta"):
            model = getattr(models, plan.config["architectures"][0])(config_class.from_dict(plan.config))
        expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
        planned = {t.name: t.shape for tensors in plan.shards.values() for t in tensors}
        assert planned == expected, heads
        assert plan.after.parameters == model.num_parameters()
        assert plan.dimensions.head_dim == model.config.head_dim


@pytest.mark.parametrize("name", ["gpt2-xl", "t5-3b", "t5-v1_1-small"])
def test_true_shapes_convert_on_the_meta_device(name):
    """The arrays that reading, merging and writing a site really produce have the shapes that were planned."""
    from sqa_convert.heads import get_method

    source = MetaSource(name, TRUE_MODELS[name])
    for heads in settings_of(source.config.get("n_head") or source.config["num_heads"]):
        plan = make_plan(source, Request(*heads))
        planned = {t.name: t for tensors in plan.shards.values() for t in tensors}
        for site in plan.sites[:1] + plan.sites[-2:]:
            read = plan.family.read(site, lambda n, p=plan: source.meta(p.source_names[n]), plan.dimensions)
            written = plan.family.write(site, get_method("mean").convert(read, plan.partitions[site], None))
            expected = {n for n, t in planned.items() if isinstance(t.origin, Site) and t.origin == site}
            assert written.keys() == expected
            for tensor_name, tensor in written.items():
                assert tensor.shape == planned[tensor_name].shape, tensor_name
                assert tensor.dtype == torch_dtype(planned[tensor_name].dtype)


@pytest.mark.parametrize("make", [gpt2, t5])
@pytest.mark.parametrize("heads", [(8, 4), (6, 1), (12, 12), "uneven"])
def test_promised_parameters_and_flops_are_the_models(make, heads):
    source = make()
    uneven = {"q_groups": 8, "kv_groups": 4, "partition": {"decoder.1": Partition.contiguous(12, 6, 1)}}
    conversion = convert(source, **uneven) if heads == "uneven" else convert(source, *heads)
    context = conversion.report["context_tokens"]
    for model, side in ((source, "before"), (conversion.model, "after")):
        cost = conversion.report["cost"][side]
        assert cost["parameters"] == model.num_parameters()
        use_attention(model, "eager")
        ids = tokens(1, context)
        inputs = inputs_for(model, ids)
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs, use_cache=False)
        total = counter.get_total_flops()
        # what is not attention: feed-forward and language model head
        rest = 0
        for module_name, module in model.named_modules():
            if module_name.endswith((".mlp", "DenseReluDense")) or module_name == "lm_head":
                rest += 2 * context * sum(p.numel() for p in module.parameters() if p.ndim == 2)
        assert cost["attention_flops"] == total - rest


@pytest.mark.parametrize("says", ["tie_word_embeddings", "scale_decoder_outputs"])
def test_a_head_of_its_own_is_counted(says, tmp_path):
    """As v1.1 and Flan have it; their configs say so in one way on the hub and in another when they are saved again."""
    source = t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    source.lm_head.weight = torch.nn.Parameter(torch.randn_like(source.lm_head.weight))
    source.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    assert config.pop("scale_decoder_outputs") is False
    (tmp_path / "source/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True} | {says: False}))
    conversion = convert(tmp_path / "source", 8, 4, output=tmp_path / "sqa")
    assert conversion.report["cost"]["before"]["parameters"] == source.num_parameters()
    assert conversion.report["cost"]["after"]["parameters"] == conversion.model.num_parameters()


USUAL = {
    "t5": {
        "architectures": ["T5ForConditionalGeneration"], "num_decoder_layers": 2, "n_positions": 512,
        "relative_attention_num_buckets": 32, "tie_word_embeddings": True, "scale_decoder_outputs": True,
        "feed_forward_proj": "relu", "decoder_start_token_id": 0,
    },
    "mt5": {
        "architectures": ["MT5ForConditionalGeneration"], "num_decoder_layers": 2, "n_positions": 512,
        "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False,
        "decoder_start_token_id": 0,
    },
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "n_inner": None, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, usual in USUAL.items() for key in usual])
def test_what_a_config_leaves_out_is_as_usual(family, key):
    config = {
        "gpt2": gpt2_config(48, 2, 12),
        "t5": t5_config(24, 24, 2, 12, 40, 64),
        "mt5": v11(24, 24, 2, 12, 40, 64, MT5Config),
    }[family]
    whole, without = MetaSource("whole", config), MetaSource("whole", config)
    whole.config |= USUAL[family]
    without.config = {name: value for name, value in whole.config.items() if name != key}
    expected, plan = (make_plan(source, Request(8, 4)) for source in (whole, without))
    assert (plan.before, plan.after, plan.shards) == (expected.before, expected.after, expected.shards)
    assert plan.dimensions == expected.dimensions
    assert plan.config == {name: value for name, value in expected.config.items() if name != key or name in plan.config}


@pytest.mark.parametrize("distance", [None, 20, 300])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_site_attends_as_the_model_does(kind, distance):
    """Bare heads against the model's own layer, biases by distance included."""
    options = {} if distance is None else {"relative_attention_max_distance": distance}
    model = t5(layers=2, relative_attention_num_buckets=8, **options)
    use_attention(model, "eager")
    config = model.config.to_dict()
    if distance is None:
        del config["relative_attention_max_distance"]
    family = family_of(config)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    site = next(site for site in family.sites(config) if site.kind == kind)
    heads = family.read(site, weights.__getitem__, family.dimensions(config))
    x = torch.randn(2, 40, 20)
    later = torch.ones(40, 40).triu(1)[None, None] * torch.finfo(torch.float32).min
    with torch.no_grad():
        layer = getattr(model, kind).block[0].layer[0].SelfAttention
        expected = layer(x, mask=later if kind == "decoder" else None)[0]
    torch.testing.assert_close(family.attention(site, config).layer(heads, x, None), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "tokens"),
    [
        ("gpt2", {}, 65_536),  # 20 for each of 8 × 64 unknowns would be fewer
        ("t5-11b", {}, 20 * 64 * 128 * 5),  # a decoder predicts every fifth token of the text
        ("t5-11b", {"sites": ["encoder"]}, 20 * 64 * 128 * 5),  # heads that are all kept have no unknowns
        ("t5-11b", {"calibration": Calibration(tokens=7)}, 7),
        ("wide", {}, 20 * 64 * 128),
    ],
)
def test_tokens_of_calibration(name, settings, tokens):
    source = MetaSource(name, (TRUE_MODELS | {"wide": gpt2_config(8192, 1, 64)})[name])
    heads = 8 if name == "gpt2" else 64
    evenly = Request(heads, heads // 2, allocation="uniform", **settings)
    assert make_plan(source, evenly).calibration.tokens == tokens


def test_bytes_of_the_cache():
    gpt2_plan = make_plan(MetaSource("gpt2", TRUE_MODELS["gpt2"]), Request(8, 4, dtype="bfloat16"))
    assert gpt2_plan.before.kv_cache_bytes == 12 * 2 * 12 * 64 * 4
    assert gpt2_plan.after.kv_cache_bytes == 12 * 2 * 4 * 64 * 2
    t5_plan = make_plan(MetaSource("t5-small", TRUE_MODELS["t5-small"]), Request(4, 2, sites=["cross"]))
    assert t5_plan.after.kv_cache_bytes == 6 * 2 * (8 + 2) * 64 * 4  # of the decoder itself, and of what it looks at


def test_names_of_folders_say_where_layers_differ():
    few = Partition.contiguous(12, 4, 2)
    source = MetaSource("gpt2", TRUE_MODELS["gpt2"])
    for given, name in ((None, "gpt2-sqa-q8kv4"), ({"decoder.0": few, "decoder.11": few}, "gpt2-sqa-q7kv4-by-layer")):
        assert str(_default_output("gpt2", make_plan(source, Request(8, 4, partition=given)).partitions)) == name


def test_heads_that_are_all_kept_need_no_calibration():
    assert make_plan(MetaSource("gpt2", TRUE_MODELS["gpt2"]), Request(12, 12)).calibration is None


@pytest.mark.parametrize(
    ("request_", "flag"),
    [
        (Request(8, 4, sites=["encoder"]), "--sites encoder"),
        (Request(8, None, variant="sqa"), "--variant"),
        (Request(None, 4, variant="sqa"), "--variant"),
        (Request(8), "--kv-groups"),
        (Request(None, 4), "--q-groups"),
        (Request(8, 4, dtype="int8"), "--dtype int8"),
        (Request(8, 4, partition="best"), "--partition best"),
    ],
)
def test_what_cannot_be_done_names_its_flag(request_, flag):
    with pytest.raises(RecipeError, match=flag):
        make_plan(MetaSource("gpt2", TRUE_MODELS["gpt2"]), request_)


@pytest.mark.parametrize("made", [Request(8, 4), Calibration(), get_method("mean"), Partition.identity(2)])
def test_what_was_asked_for_does_not_change(made):
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


def test_a_plan_does_not_change():
    plan = make_plan(MetaSource("gpt2", TRUE_MODELS["gpt2"]), Request(8, 4))
    for made in (plan, plan.calibration, plan.after, next(iter(plan.shards.values()))[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, dataclasses.fields(made)[0].name, None)


@pytest.mark.parametrize(
    ("family", "key", "most"),
    [
        ("gpt2", "n_layer", 2_000),
        ("gpt2", "n_head", 4_096),
        ("gpt2", "vocab_size", 2**31 - 1),
        ("t5", "num_layers", 2_000),
        ("t5", "num_decoder_layers", 2_000),
        ("t5", "num_heads", 4_096),
        ("t5", "d_ff", 2**31 - 1),
        ("t5", "num_labels", 100_000),
    ],
)
def test_how_large_a_config_may_be(family, key, most):
    made = gpt2_config(4096, 2, 2) if family == "gpt2" else t5_config(24, 24, 2, 12, 40, 64)
    config = made.to_dict() | {"architectures": [next(iter(FAMILIES[family].architectures))]}
    FAMILIES[family].check(config | {"num_labels": 0} | {key: most})
    for wrong in (most + 1, -1, 1.0, True):
        with pytest.raises(UnsupportedModelError, match=f"{key} is .*to {most:,}"):
            FAMILIES[family].check(config | {key: wrong})


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation_internal"])
def test_code_on_the_hub_is_refused(key):
    source = MetaSource("gpt2", TRUE_MODELS["gpt2"])
    source.config |= {key: "someone/kernel"}
    with pytest.raises(UnsupportedModelError, match="code on the hub"):
        make_plan(source, Request(8, 4))
    source.config |= {key: "sdpa"}
    make_plan(source, Request(8, 4))


def test_a_family_has_to_bring_all_its_parts():
    parts = "dimensions sites canonical required tied consumed read attention norms write written result_config"
    assert Family.__abstractmethods__ == set(parts.split())


def test_dry_run_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nsys.argv = ['sqa-convert', 'sample:gpt2', '--variant', 'sqa', '--dry-run', '--json']\n"
        "from sqa_convert.cli.convert import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("argument", ["--help", "--version", "--list-methods"])
def test_help_imports_neither_torch_nor_transformers(argument):
    code = (
        f"import sys\nsys.argv = ['sqa-convert', '{argument}']\nfrom sqa_convert.cli.convert import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_shards_hold_every_tensor_once_within_the_limit():
    source = MetaSource("gpt2", TRUE_MODELS["gpt2"])
    plan = make_plan(source, Request(8, 4, max_shard_size="50MB"))
    names = [t.name for tensors in plan.shards.values() for t in tensors]
    assert (
        len(names)
        == len(set(names))
        == len({t.name for t in next(iter(make_plan(source, Request(8, 4)).shards.values()))})
    )
    for tensors in plan.shards.values():
        assert sum(t.nbytes for t in tensors) <= 50e6 or len(tensors) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("300MB", 3e8), ("5GB", 5e9), ("2MiB", 2**21), ("1.5 g", 1.5e9), ("1MB", 1e6), ("1000k", 1e6)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "big", "-1GB", "0", "5XB", "2", "7B", "5000000000", "1KiB", "999KB", "0.1MB", "9" * 99 + "GB", 2]
)
def test_bad_sizes_are_refused(text):
    with pytest.raises(RecipeError, match="--max-shard-size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("given", "number"),
    [(64, 64), ("4096", 4096), ("400k", 400_000), ("5M", 5_000_000), ("1.5m", 1_500_000), ("2e6", 2_000_000),
     ("1_024", 1024), ("2B", 2 * 10**9)],
)  # fmt: skip
def test_amounts(given, number):
    assert amount(given, "--tokens") == number


@pytest.mark.parametrize(
    "given", ["", "k", "many", "-4k", "4kb", "1.5", "0.0001k", "nan", "inf", "4 4", "9e99", True, 1.5]
)
def test_what_is_no_amount_is_refused(given):
    with pytest.raises(RecipeError, match=r"--tokens .*give a whole number"):
        amount(given, "--tokens")


def test_calibration_tokens_are_an_amount_from_python_too():
    assert Request(8, 4, calibration=Calibration(tokens="70k")).fitting(1).tokens == 70_000
    with pytest.raises(RecipeError, match="--calibration-tokens 'many'"):
        Request(8, 4, calibration=Calibration(tokens="many")).fitting(1)


def test_two_names_of_one_tensor_are_refused():
    source = MetaSource("gpt2", TRUE_MODELS["gpt2"])
    source.index["wte.weight"] = source.index["transformer.wte.weight"]
    with pytest.raises(CheckpointError, match="the same tensor"):
        make_plan(source, Request(8, 4))
