"""What users are told: the line of a first call, counters, warnings where it is not as planned."""
