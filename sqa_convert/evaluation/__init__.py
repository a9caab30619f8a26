"""How well models predict held-out text: loss, perplexity, KL, agreement, what they write, tasks.

May import: text, checkpoints, models and below.
Exports: `quality.evaluate`, `quality.compare`, `held_out.prepare`, `load.load_model`.
"""
