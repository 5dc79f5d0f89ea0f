"""Training: `python -m train configs/<run>.yaml`. Runs from a checkout; not part of the wheel."""
