"""The dataclasses behind flags and YAML files; no heavy import."""
