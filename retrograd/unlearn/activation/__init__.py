"""Methods on hidden states: one file a method."""
