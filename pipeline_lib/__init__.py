"""Errata: train and evaluate language models on imperfect arithmetic."""

__version__ = "0.1.0"
