"""Runs that are hurt on purpose: killed, on full disks, with clocks that jump."""
