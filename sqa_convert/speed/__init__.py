"""How fast models are beside each other: alternating rounds of prefill, decoding and training.

May import: evaluation, heads, models, devices, flops and below.
Exports: `bench.bench`, `bench.bench_layers`.
"""
