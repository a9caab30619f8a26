"""What a person sees of a conversion: report.json, tables, sentences, pictures, the page and the model card.

May import: conversion, evaluation, heads, checkpoints and below.
Exports: `report_json.read_report`, `report_json.conversion_report`, `write.write_report`.
"""
