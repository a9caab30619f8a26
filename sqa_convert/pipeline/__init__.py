"""The order of the work, once, for the command and for Python: look first, plan, calibrate, write, verify, measure.

May import: everything but `cli`.
Exports: `api.convert`, `api.Conversion`, `run.run`, `preflight.check_run`, `verify.verify`.
"""
