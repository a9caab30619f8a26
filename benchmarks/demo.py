"""The whole job on `sample:gpt2`: convert 12 heads to 8/4, let the result write, uptrain it beside a control."""

import subprocess
import sys
import time
from pathlib import Path

OUTPUT = "demo/gpt2-sqa-q8kv4"
PROMPT = "import json\n\n\ndef read_config(path):\n"


def run(command: str, module: str, *arguments: str) -> None:
    print(f"$ {command} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    Path("demo").mkdir(exist_ok=True)
    start = time.perf_counter()
    convert = ["sample:gpt2", "--q-groups", "8", "--kv-groups", "4", "--overwrite", "-o", OUTPUT]
    run("sqa-convert", "sqa_convert", *convert)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    # As anybody loads it who has never heard of sqa_convert.
    model = AutoModelForCausalLM.from_pretrained(OUTPUT, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(OUTPUT, trust_remote_code=True)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    text = model.generate(**inputs, max_new_tokens=80, do_sample=True, top_p=0.9, temperature=0.7, pad_token_id=0)
    print("\nThe converted model goes on (it has 1.9 M parameters, so do not expect sense):\n")
    print(tokenizer.decode(text[0], skip_special_tokens=True), end="\n\n", flush=True)
    del model

    run("sqa-uptrain", "sqa_convert.cli.uptrain", OUTPUT, "--recipe", "quick", "--control", "--restart")
    print(f"{time.perf_counter() - start:.0f} seconds in all; report, pictures and model card: {OUTPUT}")


if __name__ == "__main__":
    main()
