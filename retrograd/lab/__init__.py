"""A fictional world in which everything is known: corpora, questions, a model that knows and one that never did."""
