"""From the text in a lake to a corpus: documents cleaned, without duplicates, tokenised, in shards."""
