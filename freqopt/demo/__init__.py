"""The demo: the zoo's video transformer calibrated, compiled and sampled."""
