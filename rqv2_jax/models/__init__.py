"""Encoders, attention, losses and model folders. Knows nothing of lists, steps or workdirs."""
