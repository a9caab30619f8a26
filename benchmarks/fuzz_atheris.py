"""A coverage-guided fuzzer of what is read of a checkpoint: config.json, index, safetensors header, .bin files.

    pip install atheris
    python benchmarks/fuzz_atheris.py -max_total_time=600 [CORPUS]

The first byte of an input chooses the file, the rest is its content; the others are sound. Nothing but an SQAError may
come out, in 10 seconds an input (on a machine that does other things too). Options are libFuzzer's. CORPUS, a folder,
keeps what was found to reach new code; without it nothing is kept. Stops at the first input that gets through, and
writes it as crash-… or timeout-….
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

try:
    import atheris
except ImportError:
    sys.exit("skipped: atheris is not installed (pip install atheris)")

with atheris.instrument_imports(include=["sqa_convert", "pickletools", "json"]):
    from fuzzing import KINDS, Checkpoints, digest

    import sqa_convert.checkpoints.source  # noqa: F401

SECONDS = 10
LARGEST = 20_000
"""bytes of an input"""


def main() -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = Checkpoints(Path(scratch))
        seeds = Path(scratch, "seeds")
        seeds.mkdir()
        for i, kind in enumerate(KINDS):
            digest(checkpoints.write(kind, checkpoints.content(kind)))  # imports what is imported late
            (seeds / f"{i}").write_bytes(bytes([i]) + checkpoints.content(kind))

        def one(data: bytes) -> None:
            if len(data) > 1:
                digest(checkpoints.write(KINDS[data[0] % len(KINDS)], data[1:]))

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        arguments = [f"-timeout={SECONDS}", f"-max_len={LARGEST}", "-rss_limit_mb=3000", *sys.argv[1:]]
        atheris.Setup([sys.argv[0], *arguments, str(seeds)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
