"""Prediction and reference rows: where generation and scoring meet (contract C8)."""
