"""The order of the work, once, for the command and for Python: look first, plan, calibrate, write, verify, measure.

May import: everything but `cli`.
Exports: `convert.convert`, `conversion_object.Conversion`, `run.run`, `preflight.check_run`, `verify.verify`.
"""
