"""From the settings of `retrograd magic` to everything an attributed run is made of."""

from __future__ import annotations

from retrograd.query.named import load_queries
from retrograd.runs.further import with_further_training
from retrograd.runs.setup import Loaded, attributed, differentiated, load_recipe, set_up, visits
from retrograd.settings.run import MagicConfig, queries_of

__all__ = ["assemble"]


def assemble(config: MagicConfig) -> Loaded:
    """Load and check everything an attributed run is made of.

    Raises:
        ValueError: For whatever cannot work, before anything is computed or written.
    """
    model, tokenizer, stream, texts = load_recipe(config, per_token=config.attribute == "tokens")
    size = config.train.micro_batch_size or config.train.batch_size
    asked = load_queries(queries_of(config), model, tokenizer, batch_size=size, like=stream.weights)
    queries = sum(len(query.columns) for query in asked) + config.sharpness
    how = differentiated(config, queries)
    visited = visits(stream, config.attribute, config.dtype)
    setup = set_up(model, tokenizer, stream, config.train, how, visited=visited)
    return attributed(setup, texts, with_further_training(config, setup, asked))
