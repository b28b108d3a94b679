"""Text to batches: documents (`corpora`), token ids (`tokenizer`), packed corpora on disk (`shards`), the order in which
training reads them (`order`) and the batches themselves (`loader`, the one module here that imports torch)."""
