"""Grids of arms and seeds at one utility, carried out by workers that lease tasks, with claims and their controls."""
