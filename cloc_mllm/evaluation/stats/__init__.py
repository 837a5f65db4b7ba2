"""Intervals, paired tests and breakdowns of scores; plain numpy, no model."""
