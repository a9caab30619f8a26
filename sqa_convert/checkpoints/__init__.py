"""Checkpoint folders: find one, read its tensors piece by piece, write one that appears whole.

May import: families, errors. Nothing of models or text.
Exports: `find.open_source`, `find.resolve`, `source.Source`, `safetensors_writer.ShardWriter`, `staging.staged_output`.
"""
