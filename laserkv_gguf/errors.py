"""Errors a user can cause: one line each, what is wrong and what to do about it."""

from __future__ import annotations


class LaserKVError(Exception):
    """Something failed while running; the command line ends with exit code 1."""

    exit_code = 1


class UserError(LaserKVError):
    """Unusable arguments or input; the message names the remedy; exit code 2."""

    exit_code = 2


class Closed(UserError):
    """The engine, or what it works with, was closed, or belongs to another process; exit code 2.

    What was under way when it was closed ends with this, and so does every call afterwards.
    """


class OutOfMemory(UserError):
    """What is asked for does not fit into memory; it may elsewhere, or another time."""


class Busy(LaserKVError):
    """Too many calls wait for the engine already; ask again later."""


class Cancelled(LaserKVError):
    """Reading or answering was stopped on request; exit code 130."""

    exit_code = 130
