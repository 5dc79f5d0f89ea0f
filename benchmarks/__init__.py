"""Measurements and their committed results; nothing here is imported by the packages."""
