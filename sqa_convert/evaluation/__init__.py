"""How well models predict held-out text: loss, perplexity, KL, agreement, what they write, tasks.

May import: text, checkpoints, models and below.
Exports: `evaluate.evaluate`, `evaluate.compare`, `held_out_text.prepare`, `load.load_model`.
"""
