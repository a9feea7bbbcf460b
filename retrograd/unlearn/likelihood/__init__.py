"""Methods on what the model says: one file a method."""
