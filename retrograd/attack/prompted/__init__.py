"""Attacks that find a prompt while the model stays as it is: tokens or vectors, on half of the questions."""
