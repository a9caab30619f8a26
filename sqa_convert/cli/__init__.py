"""The commands, one file each. The only part of the package that prints or exits.

May import: everything.
Exports: `convert.main`, `uptrain.main`, `evaluate.main`, `bench.main`.
"""
