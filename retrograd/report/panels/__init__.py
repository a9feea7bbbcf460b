"""The panels of a page, in their order. `retrograd.report.panel` says how to add one."""

from __future__ import annotations

from retrograd.report.panel import Panel
from retrograd.report.panels.compare import compare
from retrograd.report.panels.exam import answers, exam, samples, tradeoff, tradeoff_of_several
from retrograd.report.panels.experiment import experiment
from retrograd.report.panels.grid import grid
from retrograd.report.panels.harden import harden
from retrograd.report.panels.questions import questions
from retrograd.report.panels.rows import carriers, distribution, order, rows
from retrograd.report.panels.score_map import map_of_run, map_of_several
from retrograd.report.panels.setup import setup, training
from retrograd.report.panels.tamper import tamper
from retrograd.report.panels.trust import retraining, trust
from retrograd.report.panels.way import way
from retrograd.report.subjects import Attack, Attribution, Evaluation, Experiment, Hardened, Several, Training

__all__ = ["PANELS"]

PANELS = (
    Panel("tradeoff", "Forget against retain, all models", Several, tradeoff_of_several),
    Panel("map", "Two scores of every token, across runs", Several, map_of_several),
    Panel("setup", "What was run", Attribution, setup),
    Panel("trust", "May it be trusted?", Attribution, trust),
    Panel("retraining", "Predicted against measured by retraining", Attribution, retraining),
    Panel("distribution", "How the scores are distributed", Attribution, distribution),
    Panel("order", "Where the scores lie", Attribution, order),
    Panel("rows", "Documents and their tokens", Attribution, rows),
    Panel("carriers", "Tokens that carry most", Attribution, carriers),
    Panel("map", "Two scores of every token", Attribution, map_of_run),
    Panel("questions", "The questions and the model's answers", Attribution, questions),
    Panel("way", "Evaluation on the way", Attribution, way),
    Panel("training", "What was run", Training, training),
    Panel("way", "Evaluation on the way", Training, way),
    Panel("tradeoff", "Forget against retain", Evaluation, tradeoff),
    Panel("exam", "What the models know", Evaluation, exam),
    Panel("answers", "Answers, question by question", Evaluation, answers),
    Panel("experiment", "Arms and their controls", Experiment, experiment),
    Panel("grid", "Which recipes' scores predict retraining", Experiment, grid),
    Panel("compare", "Which hold, under the same attacks?", Attack, compare),
    Panel("tamper", "Does it come back?", Attack, tamper),
    Panel("harden", "Does it learn to hold?", Hardened, harden),
    Panel("samples", "What the models write", Evaluation, samples),
)
