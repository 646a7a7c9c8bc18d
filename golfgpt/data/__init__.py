"""From text to tokens: tokenizer, shards with byte counts, streams, preparation. numpy only, no torch."""
