"""How much memory calibration takes on a large file of bare tokens, beside what the model takes.

    python benchmarks/token_memory.py

Writes a sparse file of 2 GB (1e9 tokens of uint16), converts `sample:gpt2` calibrated on it and on a small file of the
same tokens, each in a process of its own, and prints the peak of each and how much of the large file was read.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TOKENS = 10**9
SMALL = 2**21


def run(path: str) -> None:
    import sqa_convert

    start = time.perf_counter()
    how = sqa_convert.Calibration(path, tokens="65k", refine_steps=5)
    sqa_convert.convert("sample:gpt2", 8, 4, "svd", calibration=how)
    read = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    found = {"peak": peak, "read": int(read["rchar"]), "faults": faults, "seconds": time.perf_counter() - start}
    print(json.dumps(found))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        for name, tokens in (("small", SMALL), ("large", TOKENS)):
            path = Path(folder) / f"{name}.bin"
            with path.open("wb") as file:
                file.truncate(2 * tokens)
            command = [sys.executable, __file__, f"{path}:uint16"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name] = json.loads(done.stdout.splitlines()[-1])
            found = peaks[name]
            print(
                f"{name}: {2 * tokens / 1e9:.3f} GB, peak {found['peak'] / 1e6:,.0f} MB, "
                f"{found['read'] / 1e6:,.0f} MB by read(), {found['seconds']:.0f} s"
            )
    print(f"the large file takes {(peaks['large']['peak'] - peaks['small']['peak']) / 1e6:,.0f} MB more")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    run(sys.argv[1]) if len(sys.argv) > 1 else main()
