"""Checkpoint folders: find one, read its tensors piece by piece, write one that appears whole.

May import: errors, amounts. Nothing of models, methods or text.
Exports: `find.open_source`, `find.resolve`, `source.Source`, `safetensors_writer.ShardWriter`, `staging.staged_output`.
"""
