"""Writes the results for readers: Markdown tables and one self-contained HTML page."""
