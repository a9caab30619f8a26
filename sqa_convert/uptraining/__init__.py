"""A short training run that takes a converted model nearer to its source: recipes, loss, Trainer, resuming.

May import: evaluation, report, families, text, checkpoints and below.
Exports: `uptrain.uptrain`, `recipe.Recipe`, `recipe.load_recipe`.
"""
