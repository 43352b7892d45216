"""The front door: one line on a pipeline. `freqopt.optimize` is the way in."""
