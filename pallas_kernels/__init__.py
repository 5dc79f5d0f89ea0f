"""Ops that decide speed: one folder each with its contract, a plain reference and the bodies that are faster."""
