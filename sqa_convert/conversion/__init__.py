"""One conversion: what is asked, the plan made from names and shapes, and the plan carried out.

May import: families, heads, checkpoints, models and below.
Exports: `request.Request`, `request.Calibration`, `plan.make_plan`, `write.write_model`, `build_model.build_model`.
"""
