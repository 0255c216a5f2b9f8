"""Tensors to statistics: pure functions, on the device."""
