"""How each stage does its work: the store, the corpus, training, the report."""
