"""The report: one HTML page that shows what a plan does and why."""
