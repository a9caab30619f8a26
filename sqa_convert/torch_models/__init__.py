"""Any torch model with `nn.MultiheadAttention`, converted by what its attentions do on batches of its user.

May import: calibration and below.
Exports: convert_modules, load_modules and what they return.
"""
