"""Data as functions of the step."""
