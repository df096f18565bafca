"""Predictions: how long a cell would take on a machine, from its schedule and from what was fitted on measured times.

Nothing in here is a measurement, and every ``Prediction`` says how far it may be off.
"""
