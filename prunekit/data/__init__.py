"""Corpora and token batches."""
