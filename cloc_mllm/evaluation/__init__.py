"""Evaluation: queries from records, predictions of a model, scores of predictions, one report."""
