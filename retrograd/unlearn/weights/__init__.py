"""Methods on the parameters themselves: one file a method."""
