"""Predictors: `ClocPredictor` (regions and words), `GroundingPredictor` (the language model)."""
