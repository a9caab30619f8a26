"""Heads fitted to what they do on text: the text, activations, and one fit for each attention site.

May import: conversion, evaluation, families, heads, text, checkpoints and below.
Exports: `calibrate.calibrate`, `calibrate.load_source`.
"""
