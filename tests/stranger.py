"""A user elsewhere, who has transformers, PEFT and folders, but not this package: `python stranger.py WHAT FOLDER...`.

load FOLDER...         every class that a folder's auto_map names, and what its own class computes: outputs.pt
train FOLDER... INTO   LoRA on attention, steps of the Trainer, merged, saved; outputs.pt of what was saved
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments

sys.modules["sqa_convert"] = None  # type: ignore[assignment]  # importing it fails, wherever it is installed

OUTPUTS = "outputs.pt"


def inputs(model):
    ids = torch.arange(2, 26).view(3, 8)
    both = model.config.is_encoder_decoder
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if both else {})


@torch.no_grad()
def outputs(model):
    return model.eval()(**inputs(model))[0].float()


def load(folder, auto):
    """The model, which must be of the folder's own code and hold no weights but the folder's."""
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model, sorted(info["missing_keys"])


def own(folder):
    """The model of the folder's own class, and the classes that load it."""
    config = json.loads((folder / "config.json").read_text())
    (name,) = config["architectures"]
    autos = {auto: place.rpartition(".")[2] for auto, place in config["auto_map"].items() if auto != "AutoConfig"}
    assert "AutoModel" in autos, f"{folder}: engines ask for AutoModel"
    mine = [auto for auto, loaded in autos.items() if loaded == name]
    assert mine, f"{folder}: {name} is not among {autos}"
    for auto, loaded in autos.items():
        model, missing = load(folder, auto)
        assert type(model).__name__ == loaded, (folder, auto, type(model))
        assert not missing or (auto not in (*mine, "AutoModel")), f"{folder}: {auto} finds no {missing}"
    return load(folder, mine[0])[0]


class Squares(Trainer):
    """A loss for models without a head, too."""

    def compute_loss(self, model, batch, return_outputs=False, **kwargs):
        result = model(**{name: batch[name] for name in inputs(model) if name in batch})
        loss = result[0].float().pow(2).mean()
        return (loss, result) if return_outputs else loss


def train(folder, into):
    import peft

    model = own(folder)
    before = outputs(model)
    targets = (
        ["q_proj", "k_proj", "v_proj", "o_proj"] if model.config.model_type == "sqa_gpt2" else ["q", "k", "v", "o"]
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    rows = [{name: values[row] for name, values in inputs(model).items()} for row in range(3)]
    arguments = TrainingArguments(
        output_dir=str(into / "run"), max_steps=2, learning_rate=0.01, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, per_device_train_batch_size=3, label_names=[], remove_unused_columns=False,
    )  # fmt: skip
    Squares(model=model, args=arguments, train_dataset=rows).train()
    merged = model.merge_and_unload()
    merged.save_pretrained(into / folder.name)
    after = outputs(merged)
    assert not torch.allclose(before, after), f"{folder}: nothing was trained"
    torch.save(after, into / folder.name / OUTPUTS)


def tokenize(folder):
    text = "def f(x):\n    return x"
    trusted = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(text)
    assert trusted["input_ids"] == PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"]


what, *folders = sys.argv[1:]
folders = [Path(folder) for folder in folders]
if what == "train":
    *folders, into = folders
for folder in folders:
    if what == "train":
        train(folder, into)
    elif what == "tokenize":
        tokenize(folder)
    else:
        torch.save(outputs(own(folder)), folder / OUTPUTS)
