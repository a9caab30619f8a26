"""What users do with a converted checkpoint the day after, each with the library they do it with."""

import json

import numpy as np
import pytest
import torch
from helpers import UNEVEN, VOCABULARY, gpt2, inputs_for, plain_convert, sqa_gpt2, sqa_t5, t5, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from sqa_convert import Partition
from sqa_convert.checkpoints.find import SAMPLES

pytestmark = pytest.mark.integration
AUTO = {"gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
SMALL = {"gpt2": lambda **how: sqa_gpt2(**UNEVEN["gpt2"], **how), "t5": lambda **how: sqa_t5(**UNEVEN["t5"], **how)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp("converted")
    few = {"gpt2": {"decoder.0": Partition.contiguous(12, 4, 2)}, "t5": {"cross.1": Partition.contiguous(12, 4, 2)}}
    return {
        name: plain_convert(f"sample:{name}", 8, 4, partition=few[name], output=work / name, verify=False).output
        for name in AUTO
    }


@pytest.fixture(params=["gpt2", "t5"])
def loaded(request, folders):
    folder = folders[request.param]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AUTO[request.param].from_pretrained(folder).eval()
    given = "import os\nimport " if request.param == "gpt2" else "import <extra_id_0> def <extra_id_1>"
    return model, tokenizer, tokenizer(given, return_tensors="pt")


def written(model, inputs, **how):
    torch.manual_seed(0)
    return model.generate(**inputs, max_new_tokens=8, pad_token_id=0, **how)


class TestGeneration:
    def test_greedy_sampling_and_beams(self, loaded):
        model, tokenizer, inputs = loaded
        greedy = written(model, inputs, do_sample=False)
        assert torch.equal(greedy, written(model, inputs, do_sample=False))
        sampled = written(model, inputs, do_sample=True, top_p=0.9, temperature=0.8)
        assert torch.equal(sampled, written(model, inputs, do_sample=True, top_p=0.9, temperature=0.8))
        beams = written(model, inputs, num_beams=3, num_return_sequences=2, do_sample=False)
        assert len(beams) == 2 and not torch.equal(beams[0], beams[1])
        for row in (greedy[0], sampled[0], *beams):
            assert tokenizer.decode(row, skip_special_tokens=True)

    def test_streamed_text_is_the_text(self, loaded, capsys):
        model, tokenizer, inputs = loaded
        whole = written(model, inputs, do_sample=False)[0]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        written(model, inputs, do_sample=False, streamer=streamer)
        begin = 1 if model.config.is_encoder_decoder else inputs.input_ids.shape[1]
        assert "".join(streamer) == tokenizer.decode(whole[begin:])
        written(model, inputs, do_sample=False, streamer=TextStreamer(tokenizer))
        assert capsys.readouterr().out.strip()


class TestPipelines:
    def test_text_generation(self, folders):
        write = pipeline("text-generation", model=str(folders["gpt2"]))
        texts = write(["import os", "def f("], max_new_tokens=4, do_sample=False)
        for text, start in zip(texts, ("import os", "def f("), strict=True):
            assert text[0]["generated_text"].startswith(start) and len(text[0]["generated_text"]) > len(start)

    def test_text_classification(self, tmp_path):
        classifier = gpt2(pad_token_id=0, num_labels=3, vocab_size=2048).config
        model = GPT2ForSequenceClassification(classifier)
        model.save_pretrained(tmp_path / "source")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "source" / name).write_bytes((SAMPLES / "gpt2" / name).read_bytes())
        folder = plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out").output
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token_id = 0
        assert type(AutoModelForSequenceClassification.from_pretrained(folder)).__name__.startswith("SQA")
        result = pipeline("text-classification", model=str(folder), tokenizer=tokenizer, top_k=None)("\t")
        assert len(result) == 3 or len(result[0]) == 3

    def test_feature_extraction_with_the_encoder_alone(self, folders):
        tokenizer = AutoTokenizer.from_pretrained(folders["t5"])
        encoder = AutoModelForTextEncoding.from_pretrained(folders["t5"]).eval()
        features = pipeline("feature-extraction", model=encoder, tokenizer=tokenizer)("import os")
        ids = tokenizer("import os", return_tensors="pt")
        with torch.no_grad():
            expected = encoder(**ids).last_hidden_state
        assert np.allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"), [("gpt2", ["q_proj", "v_proj"]), ("t5", ["q", "v"]), ("gpt2", "all-linear")]
)
def test_lora_trains_saves_and_merges(name, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = SMALL[name]()
    base.save_pretrained(tmp_path / "base")
    inputs = inputs_for(base, tokens())
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, task_type=task, lora_dropout=0.0))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora" in n for n in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    labels = inputs["decoder_input_ids" if name == "t5" else "input_ids"].contiguous()
    losses = []
    for _ in range(2):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] != losses[0]
    model.save_pretrained(tmp_path / "adapter")
    fresh = type(base).from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
        back = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.allclose(back(**inputs).logits, wanted, atol=1e-5)
        assert torch.allclose(back.merge_and_unload()(**inputs).logits, wanted, atol=1e-4)


class Logits(torch.nn.Module):
    """A model as exporters take it: tensors in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, decoder_input_ids=None):
        decoder = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        return self.model(input_ids=input_ids, use_cache=False, **decoder).logits


def exported_inputs(name, length):
    ids = torch.randint(2, VOCABULARY, (1, length))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, : length // 2]} if name == "t5" else {})


def dynamic(name):
    shapes = {"input_ids": {1: torch.export.Dim("length", min=4, max=60)}}
    return shapes | ({"decoder_input_ids": {1: torch.export.Dim("answer", min=2, max=30)}} if name == "t5" else {})


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_exported_programs_hold_for_other_lengths_and_run_in_onnx_runtime(name, tmp_path):
    # T5's float mask in sdpa is more than the ONNX exporter takes, of the original too.
    model = Logits(SMALL[name](attention="eager" if name == "t5" else "sdpa")).eval()
    program = torch.export.export(model, (), exported_inputs(name, 12), dynamic_shapes=dynamic(name), strict=False)
    run = program.module()
    cases = [(inputs, model(**inputs).detach()) for inputs in (exported_inputs(name, length) for length in (12, 8, 30))]
    for inputs, expected in cases:
        assert torch.allclose(run(**inputs), expected, atol=1e-5)

    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for inputs, expected in cases:
        (found,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_evaluation_harness_scores_what_the_model_says(name, folders, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from sqa_convert.evaluation.harness import run_tasks

    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "import", "choices": [" os", "q"], "right": 0}) + "\n")
    task = {
        "task": "words", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train", "target_delimiter": "", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
        "doc_to_target": "{{right}}", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "words.yaml").write_text(json.dumps(task))
    scores = run_tasks(folders[name], str(tmp_path / "words.yaml"), torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    model = AUTO[name].from_pretrained(folders[name]).eval()
    likely = []
    for choice in (" os", "q"):
        if name == "t5":
            labels = tokenizer(choice, return_tensors="pt", add_special_tokens=False).input_ids
            inputs = {"input_ids": tokenizer("import", return_tensors="pt").input_ids, "labels": labels}
            with torch.no_grad():
                logits = model(**inputs).logits[0].log_softmax(-1)
            likely.append(logits.gather(1, labels[0, :, None]).sum().item())
        else:
            ids = tokenizer("import" + choice, return_tensors="pt").input_ids
            start = len(tokenizer("import").input_ids)
            with torch.no_grad():
                logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            likely.append(logits.gather(1, ids[0, start:, None]).sum().item())
    assert scores["words acc"] == float(likely[0] > likely[1])


def test_serving_engines_find_every_weight_by_its_usual_name(folders):
    """vLLM and SGLang fuse q_proj, k_proj and v_proj, shard by the plan, and refuse weights that nothing takes."""
    from safetensors import safe_open

    config = json.loads((folders["gpt2"] / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= config["auto_map"].keys()
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    with safe_open(folders["gpt2"] / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert stored == model.state_dict().keys() - {"lm_head.weight"}
    d = config["head_dim"]
    for layer, of_layer in zip(model.transformer.h, model.config.per_layer_config, strict=True):
        heads, kv_heads = of_layer.num_attention_heads, of_layer.num_key_value_heads
        projections = [getattr(layer.attn, f"{name}_proj") for name in "qkvo"]
        assert all(type(projection) is torch.nn.Linear for projection in projections)
        assert [projection.out_features for projection in projections[:3]] == [heads * d, kv_heads * d, kv_heads * d]
    plan = model.config.base_model_tp_plan
    linears = {name for name, module in model.transformer.named_modules() if name.endswith(("_proj",))}
    planned = {name for name in linears if "h.*." + name.split(".", 2)[2] in plan}
    assert planned == {name for name in linears if ".attn." in name}


@pytest.mark.parametrize("build", [gpt2, t5])
def test_a_model_in_memory_round_trips_through_save_pretrained(build, tmp_path):
    model = plain_convert(build(), 8, 4).model
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    inputs = inputs_for(model, tokens())
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, model(**inputs).logits)
