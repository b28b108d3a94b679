"""From text to batches: documents (`corpora`), token ids (`tokenizer`), packed corpora on disk (`shards`), the order in which
training reads them (`order`), and batches (`loader`, the only module here that imports torch)."""
