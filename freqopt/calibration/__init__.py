"""Calibration: an error target in, a plan that holds it out. `calibrate` is the way in."""
