"""Training an i2L model for any base model that fills `base.TrainingBase`."""
