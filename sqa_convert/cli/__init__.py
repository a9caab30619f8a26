"""The commands. The only part of the package that prints or exits."""
