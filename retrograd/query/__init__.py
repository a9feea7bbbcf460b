"""What can be asked of a model, once, for metric and derivative alike."""
