"""Evicted tokens come back: parked rows and what finds them."""
