"""VESL, the paper's data engine (section 4): images and captions -> phrases -> boxes -> records."""
