"""Adapters to language models: data sets to rows, Hugging Face models to objectives, texts to queries."""
