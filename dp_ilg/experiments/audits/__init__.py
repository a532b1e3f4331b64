"""Attacks on a trainer: promises checked, canaries, and lower bounds on epsilon.

Floor 11: imports runs and below.
Enter by `report.audit_trainer`, `subject`, `canaries` and `leak` (the published step).
"""
