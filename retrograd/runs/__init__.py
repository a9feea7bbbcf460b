"""What touches disk: configuration, state slots, trajectories, manifests and scores."""
