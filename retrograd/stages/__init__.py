"""One file per arrow of the picture: thin users of the rooms below."""
