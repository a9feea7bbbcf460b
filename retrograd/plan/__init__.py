"""What a command would take before it is run: rows, steps, states, replays, memory, disk and time."""
