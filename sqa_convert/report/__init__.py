"""What a person sees of a conversion: report.json, tables, sentences, pictures, the page and the model card.

May import: conversion, evaluation, heads, checkpoints and below.
Exports: `content.read_report`, `content.conversion_report`, `write.write_report`.
"""
