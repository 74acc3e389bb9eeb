"""From text to batches: corpora, tokenizers, prepared token files, a stateless sample order."""
