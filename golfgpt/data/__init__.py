"""From text to tokens: documents, tokenizer, shards with byte counts, preparation, download. Only stream uses torch."""
