"""From scores to weights, masks and documents, with the controls that make acting on them a result."""
