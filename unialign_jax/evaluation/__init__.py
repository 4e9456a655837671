"""Scores of a model's outputs, taken through the public sampling path."""
