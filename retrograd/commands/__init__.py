"""One thin file a verb: settings in, the work of a room, a summary out."""
