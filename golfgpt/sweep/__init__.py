"""Sweeps over configurations, and trials of single changes that are kept or discarded."""
