"""Tasks and models to answers, intervals, summaries and verdicts."""
