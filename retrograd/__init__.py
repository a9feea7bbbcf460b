"""retrograd."""
