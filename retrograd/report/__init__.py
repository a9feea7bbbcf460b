"""One offline page for a run, several, an evaluation or an experiment: `report.report`."""
