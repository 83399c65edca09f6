"""Measuring what compression costs: tasks, a runner, a report."""
