"""Fuzzers: short wherever the tests run, for as long as one likes by hand.

    LASERKV_FUZZ_SECONDS=3600 python -m pytest tests/fuzz -s

gives each of them an hour and other cases every round; what was tried is said at the end. Without
the variable they try a few cases, the same ones every time.
"""
