"""Skip branches: the module, its files, the retrofit, the closed-form fit, the released
checkpoints.
"""
