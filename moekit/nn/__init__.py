"""Modules: parameters plus calls into `ops`."""
