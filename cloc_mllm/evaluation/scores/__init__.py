"""Scores of single queries, before averaging: what several tasks share."""
