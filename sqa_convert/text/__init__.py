"""All that this package knows of text: where documents come from, tokens, rows, batches, own samples.

May import: checkpoints and below. Nothing of models but their tokenizers.
Exports: `documents.documents`, `tokenizers.load_tokenizer`, `blocks.token_blocks`, `spans.SpanCorruption`.
"""
