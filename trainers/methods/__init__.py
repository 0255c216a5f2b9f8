"""Continual-learning methods: how a step draws from the buffer, what its loss is, what it stores."""
